"""--match-parameters: ranks with which the methods train about as many parameters."""

from __future__ import annotations

import re

import pytest

from lora.finetune.comparison.grid import parse_compare
from lora.finetune.comparison.matched import CLOSE, with_matched_ranks
from lora.finetune.plan import report_for


@pytest.mark.parametrize("method", ["dora", "adalora", "hira", "vera"])
def test_a_methods_rank_is_chosen_by_its_parameters(method: str) -> None:
    flags = ["--methods", "lora", method, "--match-parameters", "--base", "demo-lm-tiny",
             "--data", "tasks/copy", "--target-modules", "all-linear", "--r", "32"]  # fmt: skip
    _, grid = parse_compare(flags)
    lines: list[str] = []
    methods = with_matched_ranks(grid, lines.append).methods
    first, other = (report_for(methods[name]).trainable for name in ("lora", method))
    assert methods["lora"] == grid.methods["lora"]
    assert lines[0] == f"lora trains {first:,} parameters"
    near = abs(other / first - 1) <= CLOSE
    assert ("cannot be matched" in lines[1]) != near
    assert near or method == "vera"  # its parameters hardly depend on its rank
    assert re.match(rf"{method} with rank \d+ trains {other:,} parameters", lines[1])
    before, after = (run[method].settings for run in (grid.methods, methods))
    if method == "dora":
        assert after.lora_alpha / after.r == before.lora_alpha / before.r
    if method == "adalora":
        assert after.target_r / after.init_r == pytest.approx(8 / 12, abs=0.1)
        assert after.lora_alpha / after.init_r == before.lora_alpha / before.init_r


def test_a_method_without_a_rank_keeps_its_size() -> None:
    flags = ["--methods", "lora", "ia3", "--base", "demo-lm-tiny", "--data", "tasks/copy"]
    _, grid = parse_compare(flags)
    lines: list[str] = []
    assert with_matched_ranks(grid, lines.append).methods["ia3"] == grid.methods["ia3"]
    assert re.match(r"ia3 trains [\d,]+ parameters, which is -\d+%: it cannot be matched", lines[1])
