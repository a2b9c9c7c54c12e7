"""The tables of comparisons: methods with their scores and costs, and tasks, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lora.finetune.comparison.analysis import Analysis, MethodResult, references
from lora.finetune.metrics import is_share

BASE = "(the base)"  # what a table calls the base without an adapter
MOST_FREQUENT = "(most frequent class)"
FORGETTING = "unrelated text"


def rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Returns the table of methods: a head, then a row per method with means (± standard deviation)
    over its seeds. The base and the most frequent class come first, if they were scored."""
    share = is_share(analysis.metric)
    columns = _columns(analysis)
    table = [("method", *columns)]
    for name, score in ((BASE, analysis.base_score), (MOST_FREQUENT, analysis.majority)):
        if score is not None:
            shown = {f"{analysis.split} {analysis.metric}": score_text([score], share)}
            table.append((name, *(shown.get(head, "") for head in columns)))
    for result in analysis.methods:
        table.append((result.name, *(cell(result) for cell in columns.values())))
    return table


def _columns(analysis: Analysis) -> dict[str, Callable[[MethodResult], str]]:
    """Returns the columns after the name: head -> cell of a method."""
    methods, share = analysis.methods, is_share(analysis.metric)
    memory, size = memory_measured(analysis)
    columns: dict[str, Callable[[MethodResult], str]] = {
        "trainable": lambda m: f"{m.summaries[0]['trainable']:,}",
        "share": lambda m: f"{m.summaries[0]['trainable'] / m.summaries[0]['parameters']:.2%}",
        "rate": lambda m: f"{m.summaries[0]['learning_rate']:g}",
        "train loss": _losses,
        f"{analysis.split} {analysis.metric}": lambda m: score_text(m.scores, share),
    }
    if any(m.interval for m in methods):
        columns["95 % interval"] = lambda m: interval_text(m.interval, share)
    reference = references(methods)[-1]  # full fine-tuning, if it was run
    if any(v.other == reference for m in methods for v in m.versus):
        columns[f"against {reference}"] = lambda m: "".join(
            v.words for v in m.versus if v.other == reference
        )
    if any(m.group for m in methods):
        columns["group"] = lambda m: m.group
    if any(m.forgetting for m in methods):
        columns[FORGETTING] = lambda m: (
            "{:.2f} to {:.2f}".format(*m.forgetting) if m.forgetting else ""
        )
    columns["train s"] = lambda m: f"{m.median('train_seconds'):.1f}"
    columns[memory] = lambda m: _mebibytes(m.median(size))
    if all(m.median("adapter_bytes") for m in methods):  # older runs lack it
        columns["saved MiB"] = lambda m: _mebibytes(m.median("adapter_bytes"))
    return columns


def _losses(result: MethodResult) -> str:
    """Returns the mean training loss before each evaluation."""
    runs = [[e["loss"] for e in s["evaluations"]] for s in result.summaries]
    longest = max(map(len, runs))  # some stopped early
    means = [statistics.mean([run[i] for run in runs if i < len(run)]) for i in range(longest)]
    return " ".join(f"{mean:.3f}" for mean in means)


def _mebibytes(size: float | None) -> str:
    memory = (size or 0) / 2**20
    return f"{memory:,.0f}" if memory >= 100 else f"{memory:.1f}"


def interval_text(interval: tuple[float, float] | None, share: bool) -> str:
    """Returns the ends of an interval; shares in percent."""
    if interval is None:
        return ""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %" if share else f"{low:.4f} to {high:.4f}"


def task_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Returns the table of the scores of several tasks: a head, then a row per task and metric with
    a column per method, and one for the base if it was scored. [] if there is one task only.

    The metrics are the first, and those that only some of the tasks with answers have.
    """
    every = [summary for result in analysis.methods for summary in result.summaries]
    metrics = every[0]["metrics"]
    tasks = dict.fromkeys(name.partition("/")[2] for name in metrics if "/" in name)
    kinds: dict[str, list[str]] = {}
    for name in metrics:
        kind, mark, task = name.partition("/")
        if mark:
            kinds.setdefault(kind, []).append(task)
    first = analysis.metric
    answered = kinds.get("exact_match", tasks)  # some tasks may have no prompts
    shown = [kind for kind in kinds if kind == first or len(kinds[kind]) < len(answered)]
    columns = {
        BASE: [s["baseline"] for s in every if "baseline" in s],
        **{m.name: [s["metrics"] for s in m.summaries] for m in analysis.methods},
    }
    columns = {name: scores for name, scores in columns.items() if scores}
    table = [("task", "metric", *columns)]
    for task in tasks:
        for kind in shown:
            if task in kinds[kind]:
                key = f"{kind}/{task}"
                cells = [
                    score_text([s[key] for s in scores], is_share(kind))
                    for scores in columns.values()
                ]
                table.append((task, kind, *cells))
    return table if tasks else []


def rate_rows(analysis: Analysis) -> list[tuple[str, ...]]:
    """Returns the table of the learning rates that were tried: a head, then a row per method. []
    if none was."""
    table: list[tuple[str, ...]] = [("method", "chosen", "dev score of each rate that was tried")]
    for result in analysis.methods:
        if search := result.search:
            tried = [
                f"{each.rate:g}: {each.failures or score_text(each.scores, is_share(each.metric))}"
                for each in search.tried
            ]
            table.append((result.name, f"{search.chosen:g}", ", ".join(tried)))
    return table if len(table) > 1 else []


def all_tables(analysis: Analysis) -> str:
    """Returns the comparison as text: its verdict, the tables and what they mean."""
    parts = ["\n".join(analysis.verdict), markdown(rows(analysis)), notes(analysis)]
    parts += [markdown(table) for table in (task_rows(analysis), rate_rows(analysis)) if table]
    return "\n".join(f"{part.rstrip()}\n" for part in parts if part)


SIZES = {
    "peak MiB": (
        "training_bytes",
        "peak MiB is what training needed: the model, gradients, optimizer and activations, without"
        " imports and data.",
    ),
    "peak MiB of the run": (
        "peak_bytes",
        "peak MiB of the run is how far its private memory rose during the run.",
    ),
}
"""What a table can show as memory: its head, its key in a summary, and what it means."""


def memory_measured(analysis: Analysis) -> tuple[str, str]:
    """Returns head and key of the memory that all runs measured. Older ones lack training_bytes."""
    measured = all("training_bytes" in s for m in analysis.methods for s in m.summaries)
    head = "peak MiB" if measured else "peak MiB of the run"
    return head, SIZES[head][0]


def notes(analysis: Analysis) -> str:
    """Returns what the table's columns mean, in words, and on how many rows they were measured."""
    columns = _columns(analysis)
    methods = analysis.methods
    once = [result.name for result in methods if len(result.seeds) == 1]
    several = len(once) < len(methods)
    lines = [f"Measured on {analysis.rows:,} {analysis.split} rows of {analysis.data}."]
    lines.append("share: trainable parameters / all parameters. rate: the learning rate.")
    if "95 % interval" in columns:
        lines.append(
            f"The interval covers the choice of the {analysis.split} rows and of the seeds."
            if several
            else "Each method was trained once. The interval (Wilson) covers the choice of the"
            f" {analysis.split} rows, not that of the seed."
        )
        if several and once:
            lines.append(f"Trained once, so that this holds for the rows only: {', '.join(once)}.")
    for head in columns:
        if head.startswith("against "):
            tests = {v.test for m in methods for v in m.versus}
            exact = tests == {"McNemar"}
            test = "McNemar's exact test" if exact else "Student's t over seeds and rows"
            lines.append(
                f"{head}: the difference on the same {analysis.split} rows. p is from {test}, with"
                " Holm's correction for the number of methods."
            )
    if "group" in columns:
        lines.append("group: between methods with a common letter, no difference is shown.")
        lines += looser_tests(analysis)
    if analysis.smallest_difference is not None:
        points = f"{100 * analysis.smallest_difference:.1f} points"
        lines.append(
            f"With this many rows and seeds, a difference of {points} is detected with a"
            " probability of 80 %, before Holm's correction"
            + (": the median over all pairs of methods." if len(methods) > 2 else ".")
        )
    if FORGETTING in columns:
        lines.append(f"{FORGETTING}: its perplexity before and after training. More is forgetting.")
    lines.append(SIZES[memory_measured(analysis)[0]][1])
    if len(analysis.contenders) > 1:
        frontier = ", ".join(result.name for result in methods if result.pareto)
        lines.append(
            f"On the frontier: {frontier}. No method with as few or fewer parameters scores higher"
            " than one of these."
        )
    lines += noise_floors(analysis)
    lines += [f"{m.name}: {warning}." for m in methods for warning in m.warnings]
    return "".join(f"{line}\n" for line in lines)


def looser_tests(analysis: Analysis) -> list[str]:
    """Returns a sentence on each pair of methods with a common letter that differ in a column."""
    groups = {result.name: set(result.group) for result in analysis.methods}
    pairs = [
        (result.name, v.other)
        for result in analysis.methods
        for v in result.versus
        if v.p < 0.05 and groups[result.name] & groups[v.other]
    ]
    return [
        f"{name} and {other} have a common letter, although a difference is shown between them: the"
        f" letters are corrected for all pairs of methods, the column only for those with {other}."
        for name, other in {tuple(sorted(pair)): pair for pair in pairs}.values()
    ]


def noise_floors(analysis: Analysis) -> list[str]:
    """Returns a sentence on each method that is another one, trained again."""
    return [
        f"{m.name} is {m.again} trained again with other seeds: the difference between them is"
        " due to chance alone."
        for m in analysis.methods
        if m.again
    ]


def score_text(values: Sequence[float | None], share: bool) -> str:
    """Returns mean ± standard deviation of the values that are no None; shares in percent."""
    scale, places = (100, 2) if share else (1, 4)
    scores = [scale * value for value in values if value is not None]
    spread = f" ± {statistics.stdev(scores):.{places}f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.{places}f}{spread}" + (" %" if scale == 100 else "")


def by_task(metrics: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Returns the table of scores of several tasks: a head, a row for all, and one per task."""
    names = [name for name in metrics if "/" not in name]
    tasks = dict.fromkeys(name.partition("/")[2] for name in metrics)
    table = [("task", *names)]
    for task in tasks:
        keys = [f"{name}/{task}" if task else name for name in names]
        cells = [f"{metrics[key]:.4f}" if key in metrics else "" for key in keys]
        table.append((task or "all", *cells))
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Returns the table in GitHub's Markdown, with padded columns for a terminal."""
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |\n"
        for cells in lines
    )
