"""docs/methods.md from the code: what each method is, when to choose it, and the contract it keeps.

    python -m benchmarks.methods            writes docs/methods.md (a minute or two)

Every cell of the table is run here; tests/core/test_contract.py runs them again and holds the page
to what it finds.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import lora.methods  # noqa: F401  (fills METHODS)
from lora.adapter import METHODS, Method
from lora.testing import CLAUSES, WRAPPING, cases, run_clause

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def settings() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every method, and every variant of it, under the label that the page gives it."""
    return {
        " ".join(filter(None, [name, variant])): (method, chosen)
        for name, method in sorted(METHODS.items())
        for variant, chosen in {"": method.example, **method.variants}.items()
    }


def outcomes(label: str, clause: str) -> list[str]:
    """What a clause found under a label: "held", or "exempt: REASON", each once."""
    method, chosen = settings()[label]
    config = method.Config(**chosen)
    return sorted({run_clause(clause, method, config, case).outcome for case in cases()})


def cell(found: list[str]) -> str:
    """A clause's outcomes over all cases as the page shows them."""
    if found == ["held"]:
        return "held"
    reasons = " and ".join(
        outcome.removeprefix("exempt: ") for outcome in found if outcome != "held"
    )
    return f"on some layers: {reasons}" if "held" in found else reasons


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The whole page; `cells` by (label, clause)."""
    return "\n".join(_lines(cells)) + "\n"


def _lines(cells: Mapping[tuple[str, str], str]) -> Iterator[str]:
    yield "# The methods"
    yield ""
    yield "Written by `python -m benchmarks.methods`; do not edit."
    yield ""
    yield "| method | choose it | rate | paper |"
    yield "| --- | --- | --- | --- |"
    for name, method in sorted(METHODS.items()):
        yield f"| [{name}](#{name}) | {method.when} | {method.learning_rate:g} | {method.paper} |"
    for name, method in sorted(METHODS.items()):
        source = inspect.getsourcefile(method)
        assert source is not None
        yield ""
        yield f"## {name}"
        yield ""
        yield f"[lora/methods/{Path(source).name}](../lora/methods/{Path(source).name})"
        yield ""
        yield "```"
        yield inspect.getdoc(method) or ""
        yield "```"
        yield ""
        listed = ", ".join(f"`{field.name}`" for field in fields(method.Config))
        yield f"Settings: {listed or 'none'}."
        if method.variants:
            yield ""
            yield f"Also checked as: {', '.join(method.variants)}."
    yield ""
    yield "## The contract"
    yield ""
    yield (
        f"`lora.testing.check_method` runs {len(CLAUSES)} clauses on {len(cases())} layers:"
        f" {'; '.join(map(str, cases()))}. A clause that is not in the last column of a method is"
        " held on all of them."
    )
    yield ""
    yield "| clause | what it demands |"
    yield "| --- | --- |"
    for clause, check in CLAUSES.items():
        said = " ".join((inspect.getdoc(check) or "").split())
        mark = " (wrapped)" if clause in WRAPPING else ""
        yield f"| {clause}{mark} | {said} |"
    yield ""
    yield "Clauses marked as of the wrapped concern layers that a method wraps."
    yield ""
    yield "| method | held | not asked, and why |"
    yield "| --- | --- | --- |"
    for label in settings():
        own = {clause: cells[label, clause] for clause in CLAUSES}
        held = sum(value == "held" or value.startswith("on some") for value in own.values())
        reasons: dict[str, list[str]] = {}
        for clause, value in own.items():
            if value != "held":
                reasons.setdefault(value, []).append(clause)
        parts = {_short(names): reason for reason, names in reasons.items()}
        first, *_ = [*parts, ""]
        if len(parts) > 1 and sum(map(len, reasons.values())) == len(own):
            parts = {OTHERS: parts.pop(first)} | parts
        said = "<br>".join(f"{names}: {reason}" for names, reason in parts.items())
        yield f"| {label} | {held} of {len(own)} | {said} |"


OTHERS = "every other clause"  # first in a row, so that the rest of the row says more
GROUPS = {
    OTHERS: list(CLAUSES),
    "every clause": list(CLAUSES),
    "all of the wrapped": [c for c in CLAUSES if c in WRAPPING],
}


def _short(names: list[str]) -> str:
    groups = {short: group for short, group in GROUPS.items() if short != OTHERS}
    return next((short for short, group in groups.items() if group == names), ", ".join(names))


def read_cells(text: str) -> dict[tuple[str, str], str]:
    """The cells of a page: what it claims."""
    found: dict[tuple[str, str], str] = {}
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \| (.*) \|$", text, flags=re.MULTILINE)
    for label, said in rows:
        found |= {(label, clause): "held" for clause in CLAUSES}
        for part in filter(None, said.split("<br>")):
            listed, _, reason = part.partition(": ")
            names = GROUPS.get(listed, listed.split(", "))
            found |= {(label, name): reason for name in names}
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cells = {}
    for label in settings():
        print(label, flush=True)
        for clause in CLAUSES:
            found = outcomes(label, clause)
            failed = [outcome for outcome in found if outcome.startswith("failed")]
            if failed:
                raise SystemExit(f"{label} breaks {clause}: {failed[0]}")
            cells[label, clause] = cell(found)
    PAGE.write_text(page(cells), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
