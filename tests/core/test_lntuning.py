"""LN tuning, held to peft's: files in and out, the layers that it means, training."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from conftest import distilbert, gpt2, llama, roberta, tokens
from test_foreign import off
from test_peft import fill
from torch import nn

import lora
from lora.methods.lntuning import LNTuningConfig
from lora.testing import perturb


def read_by_peft(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # which it says of every layer that is no linear one, in its own method for norms too
        warnings.filterwarnings("ignore", "Unsupported layer type")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def written(folder: Path, base: nn.Module, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, peft.LNTuningConfig(**settings)).eval()
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(folder)
    return theirs


CASES: list[tuple[Callable[[], nn.Module], dict[str, Any], int]] = [
    (llama, {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}, 5),
    (llama, {"target_modules": None}, 5),  # what PEFT knows of the architecture
    (gpt2, {"target_modules": ["ln_1", "nope"], "exclude_modules": ["h.0.ln_1"]}, 2),
    (distilbert, {"target_modules": ["sa_layer_norm"], "task_type": "SEQ_CLS"}, 4),
    (roberta, {"target_modules": r"roberta.*LayerNorm", "task_type": "SEQ_CLS"}, 10),
]


@pytest.mark.parametrize(("build", "settings", "count"), CASES)
def test_we_read_pefts_and_peft_reads_ours(
    build: Callable[[], nn.Module], settings: dict[str, Any], count: int, tmp_path: Path
) -> None:
    base = build()
    theirs = written(tmp_path / "a", copy.deepcopy(base), **settings)
    model = copy.deepcopy(base)
    report = lora.load(model, tmp_path / "a", trainable=True)
    assert len(report.plan.selected) == count
    assert off(model, theirs) < 1e-5
    assert off(model, base) > 1e-3
    lora.save(model, tmp_path / "b")
    first, second = (
        safetensors.torch.load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("a", "b")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    judge = read_by_peft(copy.deepcopy(base), tmp_path / "b")
    assert off(judge, theirs) < 1e-5
    again = copy.deepcopy(base)
    lora.load(again, tmp_path / "b")
    assert off(again, theirs) < 1e-5
    with lora.disabled(again):
        assert off(again, base) == 0
    lora.merge(again)
    lora.eject(again)
    assert off(again, theirs) < 1e-5


@pytest.mark.parametrize(
    ("build", "count"), [(llama, 160), (gpt2, 320), (distilbert, 320), (roberta, 320)]
)
def test_all_norms_are_written_so_that_peft_reads_them(
    build: Callable[[], nn.Module], count: int, tmp_path: Path
) -> None:
    base = build()
    model = copy.deepcopy(base)
    assert lora.inject(model, LNTuningConfig()).adapter_parameters == count
    perturb(model)
    lora.save(model, tmp_path)
    assert off(read_by_peft(copy.deepcopy(base), tmp_path), model) < 1e-5
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text()), dict)
    model.train()(input_ids=tokens()).logits.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"target_modules": ("ln_9",)}, lora.TargetError, "target_modules='ln_9'"),
        ({"target_modules": ("ln_1", "ln_9")}, lora.TargetError, "target_modules='ln_9'"),
        ({"exclude_modules": ("ln_9",)}, lora.TargetError, "exclude_modules='ln_9'"),
        ({"target_modules": "("}, lora.ConfigError, "target_modules"),
        ({"target_modules": ("ln_1",), "exclude_modules": ("ln_1",)}, lora.TargetError, "selects"),
        ({"target_modules": 3}, lora.ConfigError, "target_modules must be"),
    ],
)
def test_what_does_not_fit_is_named(
    settings: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        lora.inject(gpt2(), LNTuningConfig(**settings))


def test_a_copy_of_another_layer_is_refused(tmp_path: Path) -> None:
    written(tmp_path, gpt2(), target_modules=["ln_1"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    for key in [key for key in tensors if ".h.0." in key]:
        tensors[key.replace("ln_1", "ln_2")] = tensors.pop(key)
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    with pytest.raises(lora.CheckpointError, match="h.0.ln_1.ln_tuning_layers.* not in the file"):
        lora.load(gpt2(), tmp_path)
