"""Writes docs/methods.md from the code: each method, when to choose it, and the contract it keeps.

    python -m benchmarks.methods            runs the contract (a minute or two) and writes the page
    python -m benchmarks.methods --text     rewrites the text and keeps the page's contract table

tests/core/test_contract.py runs the contract again and compares it with the page.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import lora.methods  # noqa: F401  (fills METHODS)
from benchmarks.readme import family
from lora.finetune.comparison.tables import markdown
from lora.method import METHODS, Method
from lora.testing import CLAUSES, WRAPPING, Case, cases, run_clause

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def settings() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every method and every variant of it, by the label on the page."""
    return {
        " ".join(filter(None, [name, variant])): (method, chosen)
        for name, method in sorted(METHODS.items())
        for variant, chosen in {"": method.example, **method.variants}.items()
    }


def outcomes(label: str, clause: str, chosen_cases: Sequence[Case] | None = None) -> list[str]:
    """The distinct outcomes of a clause over the cases (all by default): held, exempt: REASON."""
    method, chosen = settings()[label]
    config = method.Config(**chosen)
    every = cases() if chosen_cases is None else chosen_cases
    return sorted({run_clause(clause, method, config, case).outcome for case in every})


def cell(outcomes: list[str]) -> str:
    """A clause's outcomes over all cases, as the page shows them."""
    if outcomes == ["held"]:
        return "held"
    reasons = " and ".join(
        outcome.removeprefix("exempt: ") for outcome in outcomes if outcome != "held"
    )
    return f"on some layers: {reasons}" if "held" in outcomes else reasons


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The whole page; `cells` by (label, clause)."""
    sections = [INTRODUCTION, *map(_section, sorted(METHODS)), VARIANTS, _contract(cells)]
    text = "\n\n".join(sections) + "\n"
    return text.replace("<!-- family -->\n", "<!-- family -->\n" + markdown(family()))


INTRODUCTION = """\
# The methods

This page is written by `python -m benchmarks.methods`. Do not edit it.

The rate is the default learning rate of `lora train`. A step is forward, backward and AdamW on a
model of DistilBERT-base's width (16 × 128 tokens, two CPU cores). Its time is given relative to a
step of LoRA without dropout that was measured in the same round. The columns "step" and "dropout"
are ours without and with dropout 0.1; each is followed by PEFT's. An empty cell was not measured,
or the method has no dropout.

<!-- family -->
<!-- /family -->

Measured by `python -m benchmarks.family` into
[`family.json`](../benchmarks/results/family.json). With dropout, DoRA needs a second matmul with W,
here and in PEFT.

Below, each method is given as its docstring states it: the equation, its source, and the adapter's
parameters with shapes and initial values. To write a method of your own, see
[own-method.md](own-method.md)."""

VARIANTS = """\
## Variants of LoRA

These variants are settings of LoRA:

| variant | setting |
| --- | --- |
| rsLoRA | `--use-rslora` |
| LoRA+ | `--loraplus-lr-ratio 16` |
| LoRA-FA | `--use-lorafa` |
| another rank or alpha for some layers | `--rank-pattern q_lin 16`, `--alpha-pattern q_lin 32` |
| trainable biases | `--bias lora_only` or `all` |
| trainable tokens | `--trainable-token-indices 17 42` |
| another start | `--init-lora-weights` with gaussian, pissa, pissa_niter_4, olora, eva or lora_ga |
| a start that corrects 4-bit quantization | [qlora.md](qlora.md) |

A start with B A ≠ 0 never changes the base weights. The saved file is an ordinary LoRA of rank 2r.
Which layers are adapted: see [python.md](python.md#injecting)."""


def _section(name: str) -> str:
    """A method's section: its file, docstring and settings."""
    method = METHODS[name]
    source = inspect.getsourcefile(method)
    assert source is not None
    file = f"lora/methods/{Path(source).name}"
    settings = ", ".join(f"`{field.name}`" for field in fields(method.Config)) or "none"
    variants = ", ".join(method.variants)
    paragraphs = [
        f"## {name}",
        f"[{file}](../{file})",
        f"```\n{inspect.getdoc(method) or ''}\n```",
        f"Settings: {settings}.",
        *([f"The contract also checks it as: {variants}."] if variants else []),
    ]
    return "\n\n".join(paragraphs)


def _contract(cells: Mapping[tuple[str, str], str]) -> str:
    return "\n".join(_contract_lines(cells))


def _contract_lines(cells: Mapping[tuple[str, str], str]) -> Iterator[str]:
    yield "## The contract"
    yield ""
    yield (
        f"`lora.testing.check_method` checks {len(CLAUSES)} clauses on {len(cases())} layers:"
        f" {'; '.join(map(str, cases()))}."
    )
    yield ""
    yield "| clause | what it demands |"
    yield "| --- | --- |"
    for clause, check in CLAUSES.items():
        demand = " ".join((inspect.getdoc(check) or "").split())
        mark = " (wrapped)" if clause in WRAPPING else ""
        yield f"| {clause}{mark} | {demand} |"
    yield ""
    yield (
        "Clauses marked (wrapped) concern only methods that wrap layers. The next table names the"
        " clauses that are not asked of a method, with the reason."
    )
    yield ""
    yield "| method | held | not asked, and why |"
    yield "| --- | --- | --- |"
    for label in settings():
        outcomes = {clause: cells[label, clause] for clause in CLAUSES}
        held = sum(text == "held" or text.startswith("on some") for text in outcomes.values())
        reasons: dict[str, list[str]] = {}
        for clause, text in outcomes.items():
            if text != "held":
                reasons.setdefault(text, []).append(clause)
        parts = {_short(names): reason for reason, names in reasons.items()}
        first, *_ = [*parts, ""]
        if len(parts) > 1 and sum(map(len, reasons.values())) == len(outcomes):
            parts = {OTHERS: parts.pop(first)} | parts
        column = "<br>".join(f"{names}: {reason}" for names, reason in parts.items())
        yield f"| {label} | {held} of {len(outcomes)} | {column} |"


OTHERS = "every other clause"  # comes first in a row; the rest of the row names its exceptions
GROUPS = {
    OTHERS: list(CLAUSES),
    "every clause": list(CLAUSES),
    "all of the wrapped": [c for c in CLAUSES if c in WRAPPING],
}


def _short(names: list[str]) -> str:
    groups = {short: group for short, group in GROUPS.items() if short != OTHERS}
    return next((short for short, group in groups.items() if group == names), ", ".join(names))


def read_cells(text: str) -> dict[tuple[str, str], str]:
    """The cells that a page's last table states, by (label, clause)."""
    cells: dict[tuple[str, str], str] = {}
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \| (.*) \|$", text, flags=re.MULTILINE)
    for label, column in rows:
        cells |= {(label, clause): "held" for clause in CLAUSES}
        for part in filter(None, column.split("<br>")):
            listed, _, reason = part.partition(": ")
            names = GROUPS.get(listed, listed.split(", "))
            cells |= {(label, name): reason for name in names}
    return cells


def checked_cells() -> dict[tuple[str, str], str]:
    """The cells as the contract finds them now. Exits if a method breaks a clause."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cells = {}
    for label in settings():
        print(label, flush=True)
        for clause in CLAUSES:
            results = outcomes(label, clause)
            failed = [outcome for outcome in results if outcome.startswith("failed")]
            if failed:
                raise SystemExit(f"{label} breaks {clause}: {failed[0]}")
            cells[label, clause] = cell(results)
    return cells


def main() -> None:
    keep = "--text" in sys.argv
    cells = read_cells(PAGE.read_text(encoding="utf-8")) if keep else checked_cells()
    PAGE.write_text(page(cells), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
