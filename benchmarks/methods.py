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
PASSED = "passed"
SOME = "on some layers: "  # begins a cell whose clause passes on the other layers


def settings() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every method and every variant of it, by the label on the page."""
    return {
        " ".join(filter(None, [name, variant])): (method, chosen)
        for name, method in sorted(METHODS.items())
        for variant, chosen in {"": method.example, **method.variants}.items()
    }


def outcomes(label: str, clause: str, chosen_cases: Sequence[Case] | None = None) -> list[str]:
    """The distinct outcomes of a clause over the cases (all by default): passed, exempt: REASON."""
    method, chosen = settings()[label]
    config = method.Config(**chosen)
    every = cases() if chosen_cases is None else chosen_cases
    return sorted({run_clause(clause, method, config, case).outcome for case in every})


def cell(outcomes: list[str]) -> str:
    """A clause's outcomes over all cases, as the page shows them."""
    if outcomes == [PASSED]:
        return PASSED
    reasons = " and ".join(
        outcome.removeprefix("exempt: ") for outcome in outcomes if outcome != PASSED
    )
    return SOME + reasons if PASSED in outcomes else reasons


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The whole page; `cells` by (label, clause)."""
    sections = [INTRODUCTION, *map(_section, sorted(METHODS)), VARIANTS, _contract(cells)]
    text = "\n\n".join(sections) + "\n"
    return text.replace("<!-- family -->\n", "<!-- family -->\n" + markdown(family()))


INTRODUCTION = """\
# The methods

This page is written by `python -m benchmarks.methods`. Do not edit it.

Start with LoRA. The learning rate is the default of `lora train`, the better of two that were tried
on 1,200 sentences ([`rates.json`](../benchmarks/results/rates.json)). On other data the best rate
is another, in the [study](study.md) up to 4.6 times as high: `lora compare --rates auto` finds it.

A step is forward, backward and AdamW on two layers with DistilBERT-base's shapes (16 × 128 tokens,
two CPU cores). Each of 11 rounds measured all methods once. In each round the times are divided by
that of a LoRA step without dropout; the table shows the medians. Dropout is 0.1. An empty cell was
not measured, or the method has no dropout.

<!-- family -->
<!-- /family -->

Measured by `python -m benchmarks.family` ([`family.json`](../benchmarks/results/family.json)). With
dropout, DoRA needs a second matmul with W, here and in PEFT.

The sections below show the docstring of each method: the equation, its source, and the adapter's
parameters with shapes and initial values. `lora train --method NAME --help` explains the settings,
which have PEFT's names if PEFT has the method. To write a method of your own, see
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
| initial values | `--init-lora-weights` gaussian, pissa, pissa_niter_4, olora, eva or lora_ga |
| QLoRA: LoRA on a 4-bit base | `--method qlora`: [qlora.md](qlora.md) |
| initial values that correct the quantization error | [qlora.md](qlora.md) |

gaussian: A ~ N(0, 1/r²). pissa (arXiv:2404.02948): the largest singular values of W; pissa_niter_4
computes them faster. olora (arXiv:2406.01775): the QR decomposition of W. eva (arXiv:2410.07170):
the singular vectors of the layer's inputs. lora_ga (arXiv:2407.05000): the gradient of W. eva and
lora_ga need data, which `lora train` gives them.

If the initial B A ≠ 0, it is subtracted as a frozen term: W' = W at step 0 on a base that is not
quantized, and the base weights never change. The saved file holds the trained pair and the
subtracted pair as one ordinary LoRA of rank 2r. Which layers are adapted: see
[python.md](python.md#injecting)."""


def _section(name: str) -> str:
    """A method's section: its file, docstring and settings."""
    method = METHODS[name]
    source = inspect.getsourcefile(method)
    assert source is not None
    file = f"lora/methods/{Path(source).name}"
    settings = ", ".join(f"`{field.name}`" for field in fields(method.Config)) or "none"
    variants = ", ".join(_variant(name, method) for name in method.variants)
    paragraphs = [
        f"## {name}",
        f"[{file}](../{file})",
        f"```\n{inspect.getdoc(method) or ''}\n```",
        f"Settings: {settings}.",
        *(
            [f"The [contract](#the-contract) also checks the settings {variants}."]
            if variants
            else []
        ),
    ]
    return "\n\n".join(paragraphs)


def _variant(name: str, method: type[Method]) -> str:
    """A variant's name and the settings in which it differs from the method's example."""
    changed = [k for k, v in method.variants[name].items() if method.example.get(k) != v]
    return f"{name} ({', '.join(f'`{setting}`' for setting in changed)})"


def _contract(cells: Mapping[tuple[str, str], str]) -> str:
    return "\n".join(_contract_lines(cells))


def _contract_lines(cells: Mapping[tuple[str, str], str]) -> Iterator[str]:
    yield "## The contract"
    yield ""
    dtypes: dict[str, list[str]] = {}
    for case in cases():
        kind, _, dtype = str(case).rpartition(", ")
        dtypes.setdefault(kind, []).append(dtype)
    layers = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in dtypes.items())
    yield (
        "The contract is the test suite that every method must pass. Each test is a clause."
        f" `lora.testing.check_method` runs {len(CLAUSES)} clauses on {len(cases())} layers:"
        f" {layers}. NF4Linear is a linear layer with a 4-bit weight; Conv1D is that of"
        " transformers."
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
        " clauses from which a method is exempt, with the reason. If a clause does not apply to"
        " some layers, it must pass on the others; it then counts as passed."
    )
    yield ""
    yield "| method | clauses that pass | exempt, and why |"
    yield "| --- | --- | --- |"
    for label in settings():
        outcomes = {clause: cells[label, clause] for clause in CLAUSES}
        passed = sum(text == PASSED or text.startswith(SOME) for text in outcomes.values())
        column = "<br>".join(_exemptions(outcomes))
        yield f"| {label} | {passed} of {len(outcomes)} | {column} |"


ALL, OTHERS = "all clauses", "all others"
WRAPPED = [clause for clause in CLAUSES if clause in WRAPPING]
ALL_WRAPPED = "all marked (wrapped)"
ON_SOME = ", on some layers only"


def _short_names(others: list[str]) -> dict[str, list[str]]:
    """The names of groups of clauses on the page; `others` are those that a row has not named."""
    return {ALL: list(CLAUSES), OTHERS: others, ALL_WRAPPED: WRAPPED}


def _exemptions(outcomes: Mapping[str, str]) -> Iterator[str]:
    """CLAUSES: REASON for each reason in a method's row; `outcomes` are its cells by clause."""
    reasons: dict[str, list[str]] = {}
    for clause, text in outcomes.items():
        if text != PASSED:
            reasons.setdefault(text, []).append(clause)
    left = list(CLAUSES)
    # A reason for some layers only comes last, since it often is that of all other clauses.
    for text in sorted(reasons, key=lambda text: text.startswith(SOME)):
        names = reasons[text]
        short = _short_names(left)
        listed = next((word for word, group in short.items() if group == names), ", ".join(names))
        yield f"{listed}{ON_SOME if text.startswith(SOME) else ''}: {text.removeprefix(SOME)}"
        left = [clause for clause in left if clause not in names]


def read_cells(text: str) -> dict[tuple[str, str], str]:
    """The cells that a page's last table states, by (label, clause)."""
    cells: dict[tuple[str, str], str] = {}
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \| (.*) \|$", text, flags=re.MULTILINE)
    for label, column in rows:
        row = dict.fromkeys(CLAUSES, PASSED)
        for part in filter(None, column.split("<br>")):
            listed, _, reason = part.partition(": ")
            listed, mark, _ = listed.partition(ON_SOME)
            others = [clause for clause, text in row.items() if text == PASSED]
            names = _short_names(others).get(listed, listed.split(", "))
            row |= dict.fromkeys(names, SOME + reason if mark else reason)
        cells |= {(label, clause): cell for clause, cell in row.items()}
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
