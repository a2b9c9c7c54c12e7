"""LoRA in one sitting: what runs, what a forward enters, what one reads, what a method needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

import lora
from benchmarks import reading
from lora.adapter import Adapter
from lora.layers import View
from lora.method import METHODS, Method

FIGURES = json.loads((ROOT / "benchmarks/results/reading.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return reading.measure()


def test_a_lora_step_runs_few_lines(figures: dict[str, Any]) -> None:
    assert figures["lines"] <= 600


def test_a_forward_enters_few_functions(figures: dict[str, Any]) -> None:
    assert len(figures["functions"]) <= 8


def test_the_reading_path_is_short(figures: dict[str, Any]) -> None:
    assert sum(figures["path"].values()) <= 300
    assert figures["path"] == FIGURES["path"], "run python -m benchmarks.reading --json ..."


def test_the_file_of_lora_is_short() -> None:
    text = (ROOT / "lora/methods/lora.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100


def test_the_interface_of_a_method_is_eight_names() -> None:
    declared = {name for name in Method.__annotations__ if name != "keeps_base"}
    needed = declared | Adapter.__abstractmethods__ | {"keys"}
    assert needed == {
        "name", "paper", "Config", "peft_type", "merged", "fill", "size", "keys",
    }  # fmt: skip


@pytest.mark.slow
def test_eight_names_are_enough() -> None:
    """A method that defines nothing else passes the whole contract."""

    @dataclass(frozen=True, kw_only=True)
    class ShiftConfig(lora.AdapterConfig):
        """It has no settings."""

    class Shift(lora.Adapter):
        """W' = W + d 1ᵀ: each output sees the sum of the inputs, times d."""

        name, paper, Config, peft_type = "shift", "none", ShiftConfig, "SHIFT"
        keys = {"d": "shift_d"}

        def __init__(self, view: View, config: ShiftConfig, module: str) -> None:
            super().__init__(view, config, module)
            self.d = self.new(view, view.out_features, 1)

        def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return W + self.d, b

        def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
            self.d.zero_()

        @classmethod
        def size(cls, view: View, config: ShiftConfig, module: str) -> int:
            return view.out_features

    try:
        exempt = {"another_seed_other_bits": "it starts at zero"}
        Shift.exempt = exempt
        lora.testing.check_method(Shift)
    finally:
        del METHODS["shift"]
