"""Writes what is generated in README.md and docs/, between markers such as <!-- demo -->.

    python -m benchmarks.readme [--check]

Tables come from the measurements in results/, the tree of the package from its docstrings.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lora.methods  # noqa: F401  (fills METHODS)
from benchmarks.machine import RESULTS
from lora.finetune.comparison.analysis import Analysis, read_analysis
from lora.finetune.comparison.tables import markdown, notes, rate_rows, rows, task_rows
from lora.method import METHODS

ROOT = Path(__file__).parents[1]
WHO = ("ours", "peft")
T4 = 15 * 10**9  # bytes that a free notebook's card has
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def tables() -> dict[str, str]:
    """The text that belongs between each pair of markers, by the marker's name."""
    texts = {name: markdown(comparison(name)) for name in ("demo", "sst2")}
    for name in ("study-films", "study-sst2", "study-smollm2-films"):
        texts[name] = f"{markdown(comparison(name))}\n{markdown(rate_rows(analysis(name)))}"
    shown = ("method", "trainable", "rate", "test accuracy", "against full", "peak MiB")
    texts["study"] = markdown(columns(comparison("study-films"), shown))
    for name in ("demo-lm", "demo-lm-tiny"):
        texts[name] = f"{markdown(comparison(name))}\n{markdown(task_rows(analysis(name)))}"
    texts["demo"] += "\n" + textwrap.fill(notes(analysis("demo")), 100) + "\n"
    measured = {
        "family": family(), "step": steps(), "memory": memory(), "epoch": epochs(),
        "checkpointing": checkpointing(), "shard": shards(), "plan": plans(), "kills": kills(),
        "language": language(), "vocabulary": vocabulary(), "compiled": compiled(),
        "nf4": four_bits(), "nf4 errors": errors(), "startup": startup(), "peak": peaks(),
        "fits": fits("bfloat16", "card", smallest_card),
        "fits t4": fits("float16", "fits", fits_a_t4),
        "gpu steps": gpu_steps(), "gpu layers": gpu_layers(),
        "gpu nf4": gpu_nf4(), "gpu qlora": gpu_qlora(), "gpu writing": gpu_writing(),
        "tiny": conditions(),
    }  # fmt: skip
    texts |= {name: markdown(rows) for name, rows in measured.items()}
    return texts | parts() | {"tree": f"```\n{tree()}```\n"}


def comparison(name: str) -> list[tuple[str, ...]]:
    """The table of a `lora compare` in results/."""
    table = rows(analysis(name))
    # These runs shared the processor, so their times mean nothing. Those of sst2 measured the
    # memory of the whole run, which does not depend on the method alone.
    left_out = {
        "sst2": ("train s", "peak MiB of the run"),
        "demo-lm-tiny": ("train s",),
        "study-films": ("train s",),
        "study-sst2": ("train s",),
        "study-smollm2-films": ("train s",),
    }.get(name, ())
    return columns(table, [head for head in table[0] if head not in left_out])


def columns(table: Sequence[tuple[str, ...]], heads: Sequence[str]) -> list[tuple[str, ...]]:
    """Some columns of a table, by their heads."""
    numbers = [table[0].index(head) for head in heads]
    return [tuple(row[number] for number in numbers) for row in table]


def analysis(name: str) -> Analysis:
    """The result of a `lora compare` in results/."""
    return read_analysis(RESULTS / name / "comparison.json")


def startup() -> list[tuple[str, ...]]:
    """Seconds until the command line and the library answer."""
    result = read("startup")
    rounds, injections = result["rounds"], result["injections"]
    core, torch = "import torch, lora and all its core", "import torch"
    shown = {
        "`lora --help`": [times["lora --help"] for times in rounds],
        "`lora train --help`": [times["lora train --help"] for times in rounds],
        "`import lora` and its core, minus `import torch`":
            [times[core] - times[torch] for times in rounds],
        "`lora.inject`, r = 16, on Llama-2-7B on the meta device":
            [times["inject into Llama-2-7B's shape"] for times in injections],
        "the same in PEFT": [times["peft, the same"] for times in injections],
    }  # fmt: skip
    table: list[tuple[str, ...]] = [("start-up", "seconds")]
    for what, seconds in shown.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        table.append((what, spread({"low": low, "median": middle, "high": high})))
    return table


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
    """Texts per second of each contender, and the ratio of ours to the others."""
    result = read("language")
    names = list(result["seeds"][0])
    others = {
        "trainer": "relative to Trainer, defaults",
        "trainer, best": "relative to Trainer, texts grouped by length",
    }
    shown = {
        "ours": "`lora train`", "ours, packed": "`lora train --packing`",
        "trainer": "transformers.Trainer with PEFT, defaults",
        "trainer, best": "the same, texts grouped by length",
    }  # fmt: skip
    rows: list[tuple[str, ...]] = [("", "texts/s", *others.values())]
    for name in names:
        rate = extremes([row[name]["rate"] for row in result["seeds"]], 0)
        ratios = (
            extremes([row[name]["rate"] / row[other]["rate"] for row in result["seeds"]], 2)
            if f"{name} / {other}" in result
            else ""
            for other in others
        )
        rows.append((shown[name], rate, *ratios))
    return rows


def conditions() -> list[tuple[str, ...]]:
    """The exact match of the byte model and of each method on it, by condition."""
    result = read("tiny")
    scores = {
        name: {
            "the base, on its five training tasks": condition["base"]["exact match"],
            **{method: run["exact match"] for method, run in condition["methods"].items()},
        }
        for name, condition in result["conditions"].items()
    }
    table: list[tuple[str, ...]] = [("exact match, %", *next(iter(scores.values())))]
    for name, row in scores.items():
        table.append((name, *(f"{100 * score:.1f}" for score in row.values())))
    points = (f"{100 * value:.1f}" for value in result["best less worst"].values())
    table.append(("best minus worst, points", *points))
    return table


def vocabulary() -> list[tuple[str, ...]]:
    """Peak memory of a step with each loss, and its time relative to the plain loss."""
    result = read("vocabulary")
    shown = {
        "plain": "all logits at once, as in transformers",
        "ours": "ours, a label at every token",
        "ours, answers": "ours, labels on a quarter of the tokens",
    }  # fmt: skip
    rows = [
        (
            "loss",
            "peak memory of a step, MiB",
            "time relative to the first row, median [quartiles]",
        )
    ]
    for name, what in shown.items():
        rows.append((what, f"{result['bytes'][name] / 2**20:,.0f}", spread(result["ratios"][name])))
    return rows


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio's median and quartiles: "1.06 [1.03, 1.15]"."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def extremes(values: Sequence[float], places: int) -> str:
    """The median, the least and the most of several seeds: "601 [590, 664]"."""
    low, middle, high = (
        f"{value:.{places}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} [{low}, {high}]"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def steps() -> list[tuple[str, ...]]:
    """The time of a step relative to that of the frozen model, by setting."""
    head = ("rows x tokens", "ours", "ours, dropout 0.1", "PEFT", "PEFT, dropout 0.1", "full")
    table: list[tuple[str, ...]] = [head]
    for name, setting in (read("step")["settings"] | read("step-bfloat16")["settings"]).items():
        cells = []
        for contender in ("ours", "ours, dropout", "peft", "peft, dropout", "full"):
            ratio = setting["ratios"][f"{contender} / limit"]
            cells.append(spread(ratio) if "ours" in contender else f"{ratio['median']:.2f}")
        table.append((name, *cells))
    return table


def epochs() -> list[tuple[str, ...]]:
    """Seconds of an epoch, relative to ours, and the accuracy after it (± standard deviation)."""
    result = read("epoch")
    best = "bfloat16, " if result["bfloat16 in hardware"] else ""
    table: list[tuple[str, ...]] = [("one epoch", "seconds", "relative to ours", "test accuracy")]
    for shown, name in (
        ("`lora train`", "ours"),
        ("transformers.Trainer with PEFT, defaults", "trainer"),
        (f"the same with its best settings: {best}rows grouped by length", "trainer, best"),
    ):
        seeds = result["seeds"]
        ratios = [seed[name]["seconds"] / seed["ours"]["seconds"] for seed in seeds]
        scores = [100 * seed[name]["accuracy"] for seed in seeds]
        table.append(
            (
                shown,
                extremes([seed[name]["seconds"] for seed in seeds], 0),
                extremes(ratios, 2) if name != "ours" else "",
                f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} %",
            )
        )
    return table


def four_bits() -> list[tuple[str, ...]]:
    """Milliseconds of quantization and of a layer, ours and bitsandbytes'."""
    result = read("nf4")
    kinds = {"as started": "freed memory returned", "freed memory kept": "freed memory kept"}
    head = [f"{who}, {shown}" for shown in kinds.values() for who in ("ours", "bitsandbytes")]
    table: list[tuple[str, ...]] = [("ms", *head)]
    for what in result["as started"]["bitsandbytes / ours"]:
        part, dtype = what.split(", ")
        cells = [
            f"{result[kind]['milliseconds'][f'{part}, {who}, {dtype}']:.1f}"
            for kind in kinds
            for who in ("ours", "bitsandbytes")
        ]
        table.append((what.replace("quantise", "quantize"), *cells))
    return table


def errors() -> list[tuple[str, ...]]:
    """Plain QLoRA's initial error divided by that of each init, by rank."""
    ratios = read("nf4")["initial error"]
    inits, ranks = (list(dict.fromkeys(key.split(", ")[i] for key in ratios)) for i in (0, 1))
    rows = [(init, *(f"{ratios[f'{init}, {rank}']:.3f}" for rank in ranks)) for init in inits]
    return [("`init_lora_weights`", *ranks), *rows]


def compiled() -> list[tuple[str, ...]]:
    """The time of a compiled step relative to a plain one, and the time to compile."""
    table = [("16 x 128 tokens", "compiled / plain step", "seconds to compile")]
    for name, setting in read("compiled")["settings"].items():
        seconds = f"{setting['seconds to compile']:.0f}"
        table.append((name.removeprefix("16x128 "), spread(setting["compiled / plain"]), seconds))
    return table


def memory() -> list[tuple[str, ...]]:
    """MiB that the forward pass keeps for the backward pass."""
    kept = {name: f"{count / 2**20:.0f}" for name, count in read("memory")["bytes"].items()}
    head = ("kept for backward, MiB", "ours", "PEFT", "ours, dropout 0.1", "PEFT, dropout 0.1")
    table = [head]
    for shown, key in (("LoRA", ""), ("DoRA", " dora"), ("VeRA", " vera"), ("(IA)³", " ia3")):
        row = [kept.get(f"{who}{key}{end}", "") for end in ("", ", dropout") for who in WHO]
        table.append((shown, *row))
    table.insert(2, ("LoRA on NF4", kept["ours nf4"], "", kept["ours nf4, dropout"], ""))
    table.append(("full fine-tuning", kept["full"], "", "", ""))
    table.append(("frozen model", kept["limit"], "", "", ""))
    return table


def peaks() -> list[tuple[str, ...]]:
    """MiB of whole runs: the median of each number that summary.json has, and its extremes."""
    sizes = ("training_bytes", "peak_bytes", "process_bytes")
    table: list[tuple[str, ...]] = [("peak, MiB", "method", *(f"`{size}`" for size in sizes))]
    for base, methods in read("peak")["runs"].items():
        for method, runs in methods.items():
            cells = []
            for size in sizes:
                low, middle, high = sorted(run[size] / 2**20 for run in runs)
                cells.append(f"{middle:,.1f} [{low:,.1f}, {high:,.1f}]")
            table.append((base, method, *cells))
    return table


def checkpointing() -> list[tuple[str, ...]]:
    """Memory and time with activation checkpointing, relative to those without."""
    result = read("checkpointing")
    times = [(name.split()[-1], setting["ratios"]) for name, setting in result["time"].items()]
    table: list[tuple[str, ...]] = [
        ("with / without", "memory kept by forward", "peak memory of a step",
         *(f"time of a step, {dtype}" for dtype, _ in times))
    ]  # fmt: skip
    for shown, key in (("LoRA", "ours"), ("LoRA on NF4", "nf4"), ("full fine-tuning", "full")):
        memory = result["memory"]["ratios"][key]
        steps = [spread(ratios[key]) for _, ratios in times]
        table.append((shown, f"{memory['kept']:.2f}", f"{memory['peak']:.2f}", *steps))
    return table


def shards() -> list[tuple[str, ...]]:
    """Peak memory of a rank with a sharded base, beside a process with the whole base."""
    head = ("memory of a rank, MB", "peak of loading", "peak of a step", "parameters afterwards")
    shown = {"whole": "one rank", "in pieces": "sharded on two", "dense": "float32", "nf4": "NF4"}
    table: list[tuple[str, ...]] = [head]
    for name, ranks in read("shard").items():
        if name not in ("machine", "stored"):
            most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            cells = (f"{most[key] / 10**6:,.0f}" for key in ("read", "step", "held"))
            table.append((", ".join(shown[word] for word in name.split(", ")), *cells))
    return table


def plans() -> list[tuple[str, ...]]:
    """The peak memory that `lora plan` predicts, beside the run's."""
    table: list[tuple[str, ...]] = [("run", "planned, MB", "measured, MB", "planned / measured")]
    for name, run in read("plan")["runs"].items():
        planned, peak = run["planned"]["peak"], run["peak_bytes"]
        cells = (f"{planned / 10**6:,.0f}", f"{peak / 10**6:,.0f}", f"{run['ratio']:.2f}")
        table.append((name.replace("nf4", "NF4"), *cells))
    return table


def fits(dtype: str, head: str, verdict: Callable[[Any], str]) -> list[tuple[str, ...]]:
    """What training needs by the size of the model, with a base in this dtype and in NF4, and what
    a verdict says of each need."""
    models = read("fits")["models"]
    table: list[tuple[str, ...]] = [("model", f"{dtype}, GB", head, "NF4, GB", head)]
    for size in dict.fromkeys(name.partition(",")[0] for name in models):
        needs = [models[f"{size}, {dtype}{end}"] for end in ("", ", NF4")]
        cells = ((gigabytes(need["bytes"]), verdict(need)) for need in needs)
        table.append((size, *itertools.chain(*cells)))
    return table


def smallest_card(need: Any) -> str:
    return f"{need['smallest card, GB']} GB" if need["smallest card, GB"] else "several"


def fits_a_t4(need: Any) -> str:
    return "yes" if need["bytes"] <= T4 else "no"


def on_gpu(section: str) -> Any:
    """What a section of `benchmarks.gpu` measured."""
    found = dict(read("gpu/gpu")["sections"][section])
    del found["took seconds"]
    return found


def gpu_steps() -> list[tuple[str, ...]]:
    """Steps of 8 layers of an 8B model on a GPU: tokens/s, time relative to the limit, memory."""
    step = on_gpu("step")
    head = ("step", "tokens/s", "time / limit", "peak memory, GB", "kernels launched")
    table: list[tuple[str, ...]] = [head]
    for name, rate in step["tokens per second"].items():
        kernels = step["profiles"][name]["kernels"]
        cells = (f"{rate:,.0f}", over_limit(step, name), gigabytes(step["peak bytes"][name]))
        table.append((contender(name), *cells, f"{kernels:,}"))
    return table


def over_limit(step: Any, name: str) -> str:
    """The time of a step relative to that of the limit."""
    seconds = step["seconds"][name] / step["seconds"]["limit"]
    return f"{step['ratios'].get(f'{name} / limit', {'median': seconds})['median']:.2f}"


def gigabytes(count: float) -> str:
    return f"{count / 10**9:.1f}"


def contender(name: str) -> str:
    """What the tables of the GPU call a contender."""
    shown = {
        "limit": "limit, frozen model",
        "bf16": "ours, base in bfloat16",
        "nf4": "ours, base in NF4",
        "bitsandbytes, peft": "PEFT, base in bitsandbytes' NF4",
    }
    return shown.get(name, name.replace("peft", "PEFT"))


def gpu_layers() -> list[tuple[str, ...]]:
    """Steps of all layers of an 8B model on a GPU, with activation checkpointing and without."""
    found = on_gpu("all layers")
    table = [("step", "activation checkpointing", "tokens/s", "time / limit", "peak memory, GB")]
    for name, steps, cells in by_kind(found):
        peak = gigabytes(found["base bytes"] + steps["peak bytes"][name])
        table.append((*cells, over_limit(steps, name), peak))
    return table


def gpu_qlora() -> list[tuple[str, ...]]:
    """Steps on a base in 4 bits and on one in 16 on a GPU."""
    found = on_gpu("qlora")
    table = [("step", "activation checkpointing", "tokens/s", "peak memory, GB")]
    for name, steps, cells in by_kind(found):
        table.append((*cells, gigabytes(found["base bytes"][name] + steps["peak bytes"][name])))
    return table


def by_kind(found: Any) -> Iterator[tuple[str, Any, tuple[str, str, str]]]:
    """Each contender of a section that was measured with activation checkpointing and without, the
    steps that it belongs to, and the first cells of its row."""
    for kind, says in (("plain", "no"), ("checkpointed", "yes")):
        for name, rate in found[kind]["tokens per second"].items():
            yield name, found[kind], (contender(name), says, f"{rate:,.0f}")


def gpu_writing() -> list[tuple[str, ...]]:
    """Tokens per second of greedy decoding on a GPU, and their share of the base's."""
    found = on_gpu("writing")
    shown = {
        "base": "the base alone",
        "NF4": "the base in NF4",
        "bitsandbytes": "the base in bitsandbytes' NF4",
    }
    table = [("model", *(f"{batch}: {what}" for batch in found for what in ("tokens/s", "share")))]
    for name in next(iter(found.values()))["tokens per second"]:
        cells = []
        for each in found.values():
            share = each["rate / base's"].get(name, {"median": 1.0})["median"]
            cells += [f"{each['tokens per second'][name]:,.0f}", f"{share:.2f}"]
        table.append((shown.get(name, contender(name)), *cells))
    return table


def gpu_nf4() -> list[tuple[str, ...]]:
    """The time to dequantize a weight on a GPU, relative to a copy of the same bytes."""
    table: list[tuple[str, ...]] = [("weight", "ours", "bitsandbytes")]
    for shape, row in on_gpu("nf4").items():
        times = row["over the copy limit"]
        cells = (f"{times[name]:.2f}" for name in ("ours", "bitsandbytes"))
        table.append((shape.replace("x", "×"), *cells))
    return table


def kills() -> list[tuple[str, ...]]:
    """How often a run was killed, and which of its results equal an uninterrupted run's."""
    result = read("kills")
    equal = ", ".join(name for name, same in result["equal"].items() if same)
    counts = (str(result[key]) for key in ("kills", "within a save", "before the first checkpoint"))
    head = (
        "kills",
        "of them during a save",
        "of them before the first checkpoint",
        "same as in an uninterrupted run",
    )
    return [head, (*counts, equal)]


def parts() -> dict[str, str]:
    """Milliseconds of the alternatives for each part of a layer, by the marker's name."""
    measured = {
        shape: layer
        for name, bfloat16 in (("parts", False), ("parts-bfloat16", True))
        for shape, layer in read(name)["milliseconds"].items()
        if shape.endswith("bfloat16") == bfloat16
    }
    texts = {}
    for part, alternatives in next(iter(measured.values())).items():
        layers = {shape: layer for shape, layer in measured.items() if part in layer}
        table = [("ms", *layers)]
        for name in alternatives:
            table.append((name, *(f"{layer[part][name]:.2f}" for layer in layers.values())))
        texts[f"parts: {part}"] = markdown(table)
    return texts


def family() -> list[tuple[str, ...]]:
    """Each method, when to choose it, and its step over LoRA's, ours and PEFT's."""
    steps = read("family")["steps"]
    head = (
        "method", "when to choose it", "learning rate", "step", "step in PEFT", "step with dropout",
        "the same in PEFT", "paper",
    )  # fmt: skip
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
    """The text of each page with everything between its markers up to date."""
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
            raise SystemExit(f"the pages have {total} places for {name!r}, and need exactly one.")
    return pages


def main() -> None:
    for page, text in filled().items():
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif page.read_text(encoding="utf-8") != text:
            sys.exit(f"{page.name}: run python -m benchmarks.readme")


if __name__ == "__main__":
    main()
