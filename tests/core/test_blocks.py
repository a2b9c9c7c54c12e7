"""layers_to_transform in files: PEFT counts blocks by rules of its own, and reads ours rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import distilbert, gpt2, tokens
from test_ties import read_by_peft, with_peft
from torch import nn

import lora
from lora.testing import perturb


class Experts(nn.Module):
    """Blocks at the root, with numbered layers inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(99, 8)
        self.h = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.experts = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(8, 8)}) for _ in range(2))
            self.h.append(block)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for block in self.h:
            x = x + sum(torch.sin(expert["w"](x)) for expert in block.experts)  # type: ignore[union-attr]
        return x


BARE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bare GPT-2": (lambda: gpt2().transformer, {"target_modules": ("c_attn", "c_fc")}),
    "bare GPT-2, a pattern": (
        lambda: gpt2().transformer, {"target_modules": ("c_attn",), "layers_pattern": ("h",)}),
    "bare GPT-2, all-linear": (lambda: gpt2().transformer, {"target_modules": "all-linear"}),
    "bare GPT-2, excluded": (lambda: gpt2().transformer, {
        "target_modules": ("c_proj",), "exclude_modules": ("mlp.c_proj",)}),
    "one block in a body": (lambda: distilbert().distilbert.transformer, {
        "target_modules": ("q_lin",), "layers_pattern": ("layer",)}),
    "experts": (Experts, {"target_modules": ("w",)}),
    "experts, a pattern": (Experts, {"target_modules": ("w",), "layers_pattern": ("experts", "h")}),
    "GPT-2": (gpt2, {"target_modules": ("c_attn",)}),
    "GPT-2, dora": (gpt2, {"target_modules": ("c_attn",), "rank_pattern": {"c_attn": 3}}),
}  # fmt: skip


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    batch = {"input_ids": tokens()}
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if type(inner).__name__ == "Transformer":  # DistilBERT's body takes what is embedded
        generator = torch.Generator().manual_seed(1)
        batch = {"hidden_states": torch.randn(2, 5, 32, generator=generator)}
    found = model.eval()(**batch)
    found = getattr(found, "last_hidden_state", getattr(found, "logits", found))
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", BARE)
def test_peft_reads_the_blocks_of_ours(name: str, dora: bool, tmp_path: Path) -> None:
    make, settings = BARE[name]
    config = lora.METHODS["dora" if dora else "lora"].Config
    model = make()
    plan = lora.inject(model, config(r=2, layers_to_transform=(1,), **settings)).plan
    assert plan.targets
    perturb(model)
    lora.save(model, tmp_path)
    theirs = read_by_peft(make(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(model), output(make()), atol=1e-3)
    found = lora.load(other := make(), tmp_path).plan
    assert set(found.targets) == set(plan.targets)
    assert output(other).equal(output(model))


@pytest.mark.parametrize("name", BARE)
def test_we_read_the_blocks_of_pefts(name: str, tmp_path: Path) -> None:
    """Blocks that the model has not are no error there, nor here in a file of PEFT's."""
    make, settings = BARE[name]
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    try:
        theirs = with_peft(make(), peft.LoraConfig(r=2, layers_to_transform=[1, 7], **lists))
    except ValueError as error:  # it finds no block at the root, and takes no word for names
        assert "layers_to_transform" in str(error)  # noqa: PT017
        assert "pattern" not in name
        return
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    theirs.save_pretrained(tmp_path)
    lora.load(model := make(), tmp_path)
    torch.testing.assert_close(output(model), output(theirs), atol=1e-5, rtol=1e-5)
    lora.save(model, tmp_path / "again")
    again = read_by_peft(make(), tmp_path / "again")
    torch.testing.assert_close(output(again), output(theirs), atol=1e-5, rtol=1e-5)


def test_where_peft_counts_as_we_do_the_numbers_are_filed(tmp_path: Path) -> None:
    lora.inject(model := gpt2(), lora.LoRAConfig(target_modules=("c_fc",), layers_to_transform=1))
    lora.save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["target_modules"], settings["layers_to_transform"]) == (["c_fc"], [1])
