"""Put the measured tables into README.md, between their markers, from benchmarks/results/.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import lora.methods  # noqa: F401  (fills METHODS)
from benchmarks.machine import RESULTS
from lora.adapter import METHODS
from lora.compare import markdown, rows

README = Path(__file__).parents[1] / "README.md"


def tables() -> dict[str, str]:
    """Marker -> the text that belongs there."""
    found = {}
    for name in ("demo", "sst2"):
        summaries = json.loads((RESULTS / name / "comparison.json").read_text())
        table = rows(summaries)
        if name == "sst2":  # run two at a time, a thread each: their seconds compare with nothing
            column = table[0].index("train s")
            table = [row[:column] + row[column + 1 :] for row in table]
        found[name] = markdown(table)
    seconds = json.loads((RESULTS / "startup.json").read_text())["seconds"]
    shown = {
        "`lora --help` answers in": seconds["lora --help"],
        "`lora train --help` answers in": seconds["lora train --help"],
        "`import lora`, all of its core, adds to `import torch`":
            seconds["import lora and all its core, added"],
    }  # fmt: skip
    table = [("start-up", "seconds"), *((what, f"{value:.2f}") for what, value in shown.items())]
    return found | {"startup": markdown(table), "family": markdown(family())}


def family() -> list[tuple[str, ...]]:
    """Each method, when to choose it, and its step over LoRA's, peft's beside ours, without and
    with dropout."""
    steps = json.loads((RESULTS / "family.json").read_text())["steps"]
    head = ("method", "choose it", "step / LoRA's", "peft's", "dropout 0.1", "peft's", "paper")
    found: list[tuple[str, ...]] = [head]
    for name, method in sorted(METHODS.items()):
        shown = [
            f"{steps[key]['over lora']:.2f}" if key in steps else ""
            for key in (name, f"peft {name}", f"{name}, dropout", f"peft {name}, dropout")
        ]
        found.append((name, method.when, *shown, method.paper))
    return found


def filled(text: str) -> str:
    """README with every table as measured."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m: m[1] + table + m[2], text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}, not 1.")
    return text


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit("README.md: run python -m benchmarks.readme" if filled(text) != text else 0)
    README.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
