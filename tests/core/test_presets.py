"""Default targets of every architecture: inject, step, save, load, merge, eject; PEFT's reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch, build
from conftest import distilbert
from test_peft import read_by_peft
from torch import Tensor, nn

import lora
from lora.finetune.config import parse_run
from lora.targets import ATTENTION

LAYERS = {  # of one block; of a block in each stack where there are two
    "llama": (7, 4), "mistral": (7, 4), "mixtral": (4, 4), "qwen2": (7, 4), "qwen3": (7, 4),
    "gemma": (7, 4), "gemma2": (7, 4), "phi": (6, 4), "phi3": (4, 2), "gpt2": (4, 2),
    "gpt_neox": (4, 2), "t5": (16, 12), "bart": (16, 12), "distilbert": (6, 4), "bert": (6, 4),
    "roberta": (6, 4), "deberta": (6, 4), "deberta-v2": (6, 4),
}  # fmt: skip
POOLER = {"bert": 1}  # which is no head


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_the_injection_to_a_plain_model(name: str, targets: str, tmp_path: Path) -> None:
    model, inputs = build(name), batch(name)
    before = logits(model, inputs)
    config = lora.LoRAConfig(r=2, lora_alpha=8, target_modules=targets)
    report = lora.inject(model, config)
    found = report.plan.targets
    if targets == "attention":
        assert len(found) == 2 * LAYERS[name][1]
    else:
        assert len(found) == 2 * LAYERS[name][0] + POOLER.get(name, 0)
    assert not [n for n in found if n.endswith(("lm_head", "classifier", "mlp.gate"))]
    assert logits(model, inputs).equal(before)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    first = model(**inputs).loss
    first.backward()
    held = {n: p for n, p in model.named_parameters() if n.endswith("lora_B")}
    assert len(held) == len(found)
    assert all(p.grad is not None and bool(p.grad.any()) for p in held.values())
    optimizer.step()
    assert bool(model(**inputs).loss < first)

    after = logits(model, inputs)
    assert float((after - before).abs().max()) > 1e-4
    lora.save(model, tmp_path)
    filed = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert set(filed) == set(found)
    again = build(name)
    lora.load(again, tmp_path)
    assert logits(again, inputs).equal(after)
    theirs = read_by_peft(build(name), tmp_path)
    assert float((logits(theirs, inputs) - after).abs().max()) < 1e-5

    lora.merge(model)
    lora.eject(model)
    assert float((logits(model, inputs) - after).abs().max()) < 1e-5
    assert [n for n, _ in model.named_modules()] == [n for n, _ in build(name).named_modules()]


def test_every_promised_architecture_has_its_attention() -> None:
    assert set(ARCHITECTURES) == set(ATTENTION)


def test_a_fused_projection_is_attention_and_the_feed_forward_is_not() -> None:
    def endings(name: str) -> set[str]:
        report = lora.inject(build(name), lora.LoRAConfig(r=2, target_modules="attention"))
        return {".".join(n.split(".")[-2:]) for n in report.plan.targets}

    assert endings("gpt2") == {"attn.c_attn", "attn.c_proj"}
    assert endings("gpt_neox") == {"attention.query_key_value", "attention.dense"}
    assert endings("phi3") == {"self_attn.qkv_proj", "self_attn.o_proj"}
    assert endings("bert") == {"self.query", "self.key", "self.value", "output.dense"}


def test_what_has_no_view_is_in_the_report() -> None:
    report = lora.inject(build("mixtral"), lora.LoRAConfig(r=2))
    assert "gate (no view) ×2, experts (no view) ×2" in str(report)


def test_attention_is_narrowed_like_all_linear() -> None:
    config = lora.LoRAConfig(
        r=2, target_modules="attention", layers_to_transform=(1,), exclude_modules=("o_proj",)
    )
    assert lora.inject(build("llama"), config).plan.targets == tuple(
        f"model.layers.1.self_attn.{one}_proj" for one in "qkv"
    )


def test_an_architecture_without_an_entry_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        lora.TargetError, match="(?s)works for model_type llama.*no model_type.*Try --target-m"
    ):
        lora.inject(model, lora.LoRAConfig(target_modules="attention"))
    other = build("llama")
    other.config.model_type = "newest"
    with pytest.raises(
        lora.TargetError, match="this model has 'newest'.\n.*--target-modules q_proj"
    ):
        lora.inject(other, lora.LoRAConfig(target_modules="attention"))
    with pytest.raises(lora.TargetError, match="all-linear or attention"):
        lora.inject(distilbert(), lora.LoRAConfig(target_modules=("typo",)))


def test_a_layer_named_attention_is_meant_by_its_name(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attention": nn.Linear(4, 4), "other": nn.Linear(4, 4)})

    model = make()
    config = lora.LoRAConfig(r=2, target_modules=("attention",))
    assert lora.inject(model, config).plan.targets == ("attention",)
    lora.save(model, tmp_path)
    assert lora.load(make(), tmp_path).plan.targets == ("attention",)


@pytest.mark.parametrize("given", ["attention", ("attention",), ["attention"]])
def test_the_word_and_not_a_name(given: Any) -> None:
    assert lora.LoRAConfig(target_modules=given).target_modules == "attention"


def test_the_word_after_a_flag() -> None:
    config = parse_run(["--target-modules", "attention"])
    assert config.settings.target_modules == "attention"
