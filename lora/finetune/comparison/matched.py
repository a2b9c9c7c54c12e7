"""--match-parameters: ranks with which all methods train about as many parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora.finetune.comparison.grid import Grid
from lora.finetune.plan import report_for

CLOSE = 0.05
"""Trainable parameters may differ from the first method's by this share."""


def with_matched_ranks(grid: Grid, say: Callable[[str], None]) -> Grid:
    """Returns the grid with ranks that match the first method's trainable parameters.

    lora_alpha / r stays as it was. Methods without a rank keep their size. Prints each result.
    """
    first, *others = (name for name in grid.methods if name != grid.again)
    target = _trainable(grid.methods[first])
    say(f"{first} trains {target:,} parameters")
    methods = dict(grid.methods)
    for name in others:
        run = methods[name]
        key = _rank_of(run)
        methods[name] = _matched(run, target) if key else run
        count = _trainable(methods[name])
        share = count / target - 1
        rank = f" with rank {getattr(methods[name].settings, key)}" if key else ""
        close = "" if abs(share) <= CLOSE else f", which is {share:+.0%}: it cannot be matched"
        say(f"{name}{rank} trains {count:,} parameters{close}")
    return replace(grid, methods=methods)


def _rank_of(run: Any) -> str:
    """Returns the name of the setting that is a method's rank; "" if it has none."""
    return next((key for key in ("r", "init_r") if hasattr(run.settings, key)), "")


def _matched(run: Any, target: int) -> Any:
    """Returns the run with the rank whose trainable parameters are closest to the target.

    They grow linearly with the rank, so two ranks tell how.
    """
    one, two = (_trainable(_with_rank(run, rank)) for rank in (1, 2))
    if two == one:
        return run
    rank = max(1, round(1 + (target - one) / (two - one)))
    return _with_rank(run, rank)


def _with_rank(run: Any, rank: int) -> Any:
    """Returns the run with this rank. lora_alpha, and AdaLoRA's final rank, grow with it."""
    settings, key = run.settings, _rank_of(run)
    share, more = rank / getattr(settings, key), {key: rank}
    if hasattr(settings, "lora_alpha"):
        alpha = settings.lora_alpha * share
        more["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    if hasattr(settings, "target_r"):
        more["target_r"] = max(1, round(settings.target_r * share))
    return replace(run, settings=replace(settings, **more))


def _trainable(run: Any) -> int:
    return report_for(run).trainable
