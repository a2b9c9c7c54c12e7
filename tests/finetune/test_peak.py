"""The memory of a run: what its training needs, apart from the process around it."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lora.finetune import cli, peak
from lora.finetune.models import load_base
from lora.nf4 import NF4Linear

MIB = 2**20


def ordinary_block(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


def mapped_block(mib: int) -> torch.Tensor:
    """A block from the system itself: malloc may give one that a test before has freed, and that
    is resident already."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return torch.frombuffer(mmap.mmap(-1, mib * MIB, **private), dtype=torch.float32).fill_(1)


@pytest.mark.parametrize("allocator", ["glibc", "another"])
def test_training_needs_the_model_and_what_grows_beyond_it(
    allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = ordinary_block
    if allocator == "another":
        monkeypatch.setattr(peak, "_glibc_count", lambda: None)
        block = mapped_block
    model = nn.Linear(1024, 1024, bias=False)
    with peak.PeakMemory() as memory:
        data = block(64)
        with memory.training(model):
            activations = block(128)
            memory.sample()
            del activations
            with memory.paused():
                imports = block(96)
            moments = block(128)
            memory.sample()
        unscored = block(256)
        memory.sample()
    assert memory.training_peak == pytest.approx(132 * MIB, abs=24 * MIB)
    del data, imports, moments, unscored


def test_tensors_that_share_their_memory_count_once() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].weight.detach()[:8])
    model.append(nn.Linear(8, 8, device="meta"))
    assert peak.tensor_bytes(model) == 64 * 32 * 4
    packed = NF4Linear.of(nn.Linear(64, 64, bias=False))
    assert peak.tensor_bytes(packed) < 64 * 64


def test_the_resident_set_of_the_process_has_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peak.process_peak() >= peak.private_bytes() > 0
    monkeypatch.setattr(peak, "STATUS", tmp_path / "none")
    assert peak.process_peak() >= peak.private_bytes() > 0


def test_lora_needs_less_than_full_and_qlora_less_than_lora(tmp_path: Path) -> None:
    """On a model whose weights are most of it."""
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    load_base("demo-lm-tiny", 1, "text", 0).tokenizer.save_pretrained(tmp_path / "base")
    needed = {}
    for method in ("qlora", "lora", "full"):
        run = tmp_path / method
        flags = ("--method", method, "--base", tmp_path / "base", "--data", "tasks/copy")
        flags = (*flags, "--limit", 32, "--batch-size", 8, "--epochs", 1, "--max-length", 64)
        flags = (*flags, "--dtype", "float32", "--answered", 0, "--run-dir", run)
        assert cli.main(["train", *map(str, flags)]) == 0
        summary = json.loads((run / "summary.json").read_text())
        needed[method] = summary["training_bytes"]
        assert summary["process_bytes"] > summary["training_bytes"]
    assert needed["qlora"] < needed["lora"] < needed["full"]
