"""Writes what is generated in README.md and docs/, between markers such as <!-- demo -->.

    python -m benchmarks.readme [--check]

Tables come from the measurements in results/, the tree of the package from its docstrings.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora.methods  # noqa: F401  (fills METHODS)
from benchmarks.machine import RESULTS
from lora.adapter import METHODS
from lora.finetune.compare import markdown, rows

ROOT = Path(__file__).parents[1]
WHO = ("ours", "peft")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def tables() -> dict[str, str]:
    """Marker -> the text that belongs there."""
    found = {}
    for name in ("demo", "demo-lm", "sst2"):
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
        "`lora.inject`, r = 16 on all of Llama-2-7B's shape, without its weights":
            seconds["inject into Llama-2-7B's shape"],
        "peft, the same": seconds["peft, the same"],
    }  # fmt: skip
    table = [("start-up", "seconds"), *((what, f"{value:.2f}") for what, value in shown.items())]
    tables = {"family": family(), "step": steps(), "memory": memory(), "epoch": epochs(),
              "checkpointing": checkpointing(), "shard": shards(), "plan": plans(),
              "kills": kills(), "language": language(), "vocabulary": vocabulary(),
              "compiled": compiled(), "nf4": four_bits(), "nf4 errors": errors()}  # fmt: skip
    found |= {name: markdown(rows) for name, rows in tables.items()} | parts()
    return found | {"startup": markdown(table), "tree": f"```\n{tree()}```\n"}


def tree() -> str:
    """Every module of the package with the first sentence of its docstring, as a text block."""
    return "lora/\n" + "".join(f"{name:<26} {text}\n" for name, text in entries(ROOT / "lora"))


def entries(folder: Path, indent: str = "  ") -> Iterator[tuple[str, str]]:
    """The lines of a folder: its modules, then its subfolders, each by name."""
    for path in sorted(folder.glob("*.py")):
        if not path.stem.startswith("__"):
            yield indent + path.name, first_sentence(path)
    for path in sorted(folder.glob("*/__init__.py")):
        yield f"{indent}{path.parent.name}/", first_sentence(path)
        yield from entries(path.parent, indent + "  ")


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"\.(?: |$)|:$", paragraph)[0]


def language() -> list[tuple[str, ...]]:
    """Texts per second of each contender, and ours over the others'."""
    found = read("language")
    names = list(found["seeds"][0])
    others = [name for name in names if name.startswith("trainer")]
    shown = {
        "ours": "`lora train`", "ours, packed": "`lora train --packing`",
        "trainer": "transformers.Trainer + peft, defaults",
        "trainer, best": "the same, texts grouped by length",
    }  # fmt: skip
    rows: list[tuple[str, ...]] = [("", "texts/s", *(f"over {shown[name]}" for name in others))]
    for name in names:
        rate = statistics.median(row[name]["rate"] for row in found["seeds"])
        ratios = (found.get(f"{name} / {other}") for other in others)
        rows.append((shown[name], f"{rate:.0f}", *(f"{r:.2f}" if r else "" for r in ratios)))
    return rows


def vocabulary() -> list[tuple[str, ...]]:
    """The most memory of a step of each loss, and its time over the plain one's."""
    found = read("vocabulary")
    shown = {
        "plain": "all logits at once, as transformers has it",
        "ours": "ours, a label at every token",
        "ours, answers": "ours, labels on a quarter of the tokens",
    }  # fmt: skip
    rows = [("loss", "most held in a step, MiB", "time over the first")]
    for name, what in shown.items():
        ratio = found["ratios"][name]
        spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        rows.append((what, f"{found['bytes'][name] / 2**20:,.0f}", spread))
    return rows


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def steps() -> list[tuple[str, ...]]:
    """A step over the frozen limit's, by setting, with the quartiles of ours."""
    head = ("rows x tokens", "ours", "ours, dropout 0.1", "peft", "peft, dropout 0.1", "full")
    found = [head]
    measured = read("step-bfloat16")["settings"]
    for name, setting in (read("step")["settings"] | measured).items():
        ratios = setting["ratios"]
        shown = []
        for contender in ("ours", "ours, dropout", "peft", "peft, dropout", "full"):
            ratio = ratios[f"{contender} / limit"]
            spread = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if "ours" in contender else ""
            shown.append(f"{ratio['median']:.2f}{spread}")
        found.append((name, *shown))
    return found


def epochs() -> list[tuple[str, ...]]:
    """Seconds of an epoch, over ours, and the accuracy after it: medians and means of the seeds."""
    found = read("epoch")
    best = "bfloat16, " if found["bfloat16 in hardware"] else ""
    table: list[tuple[str, ...]] = [("one epoch", "seconds", "over ours", "test accuracy")]
    for shown, name in (
        ("`lora train`", "ours"),
        ("transformers.Trainer + peft, defaults", "trainer"),
        (f"the same at its best: {best}rows grouped by length", "trainer, best"),
    ):
        seconds = statistics.median(seed[name]["seconds"] for seed in found["seeds"])
        over = f"{found[f'{name} / ours']:.2f}" if name != "ours" else ""
        table.append((shown, f"{seconds:.0f}", over, f"{found[f'{name} accuracy']:.2%}"))
    return table


def four_bits() -> list[tuple[str, ...]]:
    """Milliseconds of the codec and of a layer beside bitsandbytes', by what becomes of memory."""
    found, kinds = read("nf4"), ("as started", "freed memory kept")
    head = [f"{who}, {kind}" for kind in kinds for who in ("ours", "bitsandbytes")]
    table: list[tuple[str, ...]] = [("ms", *head)]
    for what in found[kinds[0]]["bitsandbytes / ours"]:
        part, dtype = what.split(", ")
        shown = [
            f"{found[kind]['milliseconds'][f'{part}, {who}, {dtype}']:.1f}"
            for kind in kinds
            for who in ("ours", "bitsandbytes")
        ]
        table.append((what, *shown))
    return table


def errors() -> list[tuple[str, ...]]:
    """Plain QLoRA's initial error over each start's, by rank."""
    found = read("nf4")["initial error"]
    starts, ranks = (list(dict.fromkeys(key.split(", ")[i] for key in found)) for i in (0, 1))
    rows = [(start, *(f"{found[f'{start}, {rank}']:.3f}" for rank in ranks)) for start in starts]
    return [("start", *ranks), *rows]


def compiled() -> list[tuple[str, ...]]:
    """A compiled step over a plain one, and what the compiling took."""
    found = [("16 x 128 tokens", "compiled / plain step", "seconds to compile")]
    for name, setting in read("compiled")["settings"].items():
        ratio = setting["compiled / plain"]
        spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        shown = name.removeprefix("16x128 ")
        found.append((shown, spread, f"{setting['seconds to compile']:.0f}"))
    return found


def memory() -> list[tuple[str, ...]]:
    """MiB that forward keeps for backward."""
    kept = {name: f"{count / 2**20:.0f}" for name, count in read("memory")["bytes"].items()}
    found = [("kept for backward, MiB", "ours", "peft", "ours, dropout 0.1", "peft, dropout 0.1")]
    for shown, key in (("LoRA", ""), ("DoRA", " dora"), ("VeRA", " vera"), ("(IA)³", " ia3")):
        row = [kept.get(f"{who}{key}{end}", "") for end in ("", ", dropout") for who in WHO]
        found.append((shown, *row))
    found.insert(2, ("LoRA on NF4", kept["ours nf4"], "", kept["ours nf4, dropout"], ""))
    found.append(("full fine-tuning", kept["full"], "", "", ""))
    found.append(("frozen model", kept["limit"], "", "", ""))
    return found


def checkpointing() -> list[tuple[str, ...]]:
    """What activation checkpointing makes of memory and of a step, over the same without."""
    found = read("checkpointing")
    times = [(name.split()[-1], setting["ratios"]) for name, setting in found["time"].items()]
    table: list[tuple[str, ...]] = [
        ("with / without", "kept by forward", "most held in a step",
         *(f"a step, {dtype}" for dtype, _ in times))
    ]  # fmt: skip
    for shown, key in (("LoRA", "ours"), ("LoRA on NF4", "nf4"), ("full fine-tuning", "full")):
        held = found["memory"]["ratios"][key]
        steps = [
            f"{ratios[key]['median']:.2f} [{ratios[key]['low']:.2f}, {ratios[key]['high']:.2f}]"
            for _, ratios in times
        ]
        table.append((shown, f"{held['kept']:.2f}", f"{held['peak']:.2f}", *steps))
    return table


def shards() -> list[tuple[str, ...]]:
    """What a rank holds of a base in pieces, beside a process that holds all of it."""
    found = read("shard")
    table: list[tuple[str, ...]] = [("peak, MB", "reading the base", "with a step", "held after")]
    for name, ranks in found.items():
        if name not in ("machine", "stored"):
            most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            cells = (f"{most[key] / 10**6:,.0f}" for key in ("read", "step", "held"))
            table.append((name.replace("nf4", "NF4"), *cells))
    return table


def plans() -> list[tuple[str, ...]]:
    """The dry run's peak beside the run's."""
    table: list[tuple[str, ...]] = [("run", "planned, MB", "measured, MB", "planned / measured")]
    for name, run in read("plan")["runs"].items():
        planned, peak = run["planned"]["peak"], run["peak_bytes"]
        cells = (f"{planned / 10**6:,.0f}", f"{peak / 10**6:,.0f}", f"{run['ratio']:.2f}")
        table.append((name, *cells))
    return table


def kills() -> list[tuple[str, ...]]:
    """What happened to the run that was killed."""
    found = read("kills")
    shown = ("kills", "within a save", "before the first checkpoint")
    equal = ", ".join(name for name, same in found["equal"].items() if same)
    head = (*shown, "equal to the undisturbed run's")
    return [head, (*(str(found[name]) for name in shown), equal)]


def parts() -> dict[str, str]:
    """Marker -> milliseconds of the forms of one question, by the layer's shape."""
    measured = {
        shape: layer
        for name, bfloat16 in (("parts", False), ("parts-bfloat16", True))
        for shape, layer in read(name)["milliseconds"].items()
        if shape.endswith("bfloat16") == bfloat16
    }
    found = {}
    for question, forms in next(iter(measured.values())).items():
        layers = {shape: layer for shape, layer in measured.items() if question in layer}
        table = [("ms", *layers)]
        table += [(form, *(f"{layer[question][form]:.2f}" for layer in layers.values()))
                  for form in forms]  # fmt: skip
        found[f"parts: {question}"] = markdown(table)
    return found


def family() -> list[tuple[str, ...]]:
    """Each method, when to choose it, and its step over LoRA's, ours and PEFT's."""
    steps = read("family")["steps"]
    head = ("method", "choose it", "rate", "step", "PEFT's", "dropout", "PEFT's", "paper")
    table: list[tuple[str, ...]] = [head]
    for name, method in sorted(METHODS.items()):
        ratios = [
            f"{steps[key]['over lora']:.2f}" if key in steps else ""
            for key in (name, f"peft {name}", f"{name}, dropout", f"peft {name}, dropout")
        ]
        link, rate = f"[{name}](#{name})", f"{method.learning_rate:g}"
        table.append((link, method.when, rate, *ratios, method.paper))
    return table


def filled() -> dict[Path, str]:
    """Each page with every table as measured."""
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name, table in tables().items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)"
        total = 0
        for page, text in pages.items():
            pages[page], count = re.subn(
                pattern,
                lambda m: m[1] + table + m[2],  # noqa: B023
                text,
                flags=re.DOTALL,
            )
            total += count
        if total != 1:
            raise SystemExit(f"the pages have {total} places for the table {name!r}, not 1.")
    return pages


def main() -> None:
    for page, text in filled().items():
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif page.read_text(encoding="utf-8") != text:
            sys.exit(f"{page.name}: run python -m benchmarks.readme")


if __name__ == "__main__":
    main()
