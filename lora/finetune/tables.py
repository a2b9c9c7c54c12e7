"""The tables of comparisons: methods with their scores and costs, and tasks, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lora.finetune.comparison.statistics import difference, interval
from lora.finetune.record import Summary

BASE = "(the base)"  # what a table calls the base without an adapter


def rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Returns the table: a head, then a row per method with means (± standard deviation) over its
    seeds. The base and the most frequent class come first, if they were scored."""
    if not summaries:
        return []
    split, metric = summaries[0]["split"], next(iter(summaries[0]["metrics"]))
    extra = _certainty_columns(summaries)
    heads = [f"{split} {metric}", *extra]
    size = _measured_size(summaries)
    memory = SIZES[size][0]
    head = ("method", "trainable", "share", "rate", "train loss", *heads, "train s", memory)
    table: list[tuple[str, ...]] = [head]
    others = {
        BASE: [s["baseline"][metric] for s in summaries if "baseline" in s],
        "(most frequent class)": [
            s["majority"][split] for s in summaries if split in s.get("majority", {})
        ][:1],
    }
    for name, values in others.items():
        if values:
            scores = [_scores(values, is_share(metric)), *[""] * len(extra)]
            table.append((name, "", "", "", "", *scores, "", ""))
    for seeds in _by_method(summaries).values():
        scores = [_scores([s["metrics"][metric] for s in seeds], is_share(metric))]
        scores += [cell(seeds[0]) for cell in extra.values()]
        table.append(_method_row(seeds, scores, size))
    return table


def task_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Returns the table of the scores of several tasks: a head, then a row per task and metric with
    a column per method, and one for the base if it was scored. [] if there is one task only.

    The metrics are the first, and those that only some of the tasks have.
    """
    metrics = summaries[0]["metrics"] if summaries else {}
    tasks = dict.fromkeys(name.partition("/")[2] for name in metrics if "/" in name)
    kinds: dict[str, list[str]] = {}
    for name in metrics:
        kind, mark, task = name.partition("/")
        if mark:
            kinds.setdefault(kind, []).append(task)
    first = next(iter(metrics), "")
    shown = [kind for kind in kinds if kind == first or len(kinds[kind]) < len(tasks)]
    columns = {
        BASE: [s["baseline"] for s in summaries if "baseline" in s],
        **{name: [s["metrics"] for s in seeds] for name, seeds in _by_method(summaries).items()},
    }
    columns = {name: scores for name, scores in columns.items() if scores}
    table = [("task", "metric", *columns)]
    for task in tasks:
        for kind in shown:
            if task in kinds[kind]:
                share = kind != first or is_share(kind)  # metrics of some tasks only are shares
                key = f"{kind}/{task}"
                cells = [_scores([s[key] for s in scores], share) for scores in columns.values()]
                table.append((task, kind, *cells))
    return table if tasks else []


def both_tables(summaries: Sequence[Summary]) -> str:
    """Returns the comparison as text: the table of methods with its notes, and that of tasks."""
    text = f"{markdown(rows(summaries))}\n{notes(summaries)}" if summaries else ""
    table = task_rows(summaries)
    return f"{text}\n{markdown(table)}" if table else text


def _by_method(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Returns the summaries of each method's seeds."""
    methods: dict[str, list[Summary]] = {}
    for summary in summaries:
        methods.setdefault(summary["method"], []).append(summary)
    return methods


SIZES = {
    "training_bytes": (
        "peak MiB",
        "peak MiB is what training needed: the model, gradients, optimizer and activations, without"
        " imports and data.",
    ),
    "peak_bytes": (
        "peak MiB of the run",
        "peak MiB of the run is the peak of its private memory above the start.",
    ),
}
"""The keys of a summary that a table can show as memory: its head, and what it means."""


def _measured_size(summaries: Sequence[Summary]) -> Literal["training_bytes", "peak_bytes"]:
    """Returns the key of the memory that all runs measured. Older ones lack training_bytes."""
    measured = all("training_bytes" in summary for summary in summaries)
    return "training_bytes" if measured else "peak_bytes"


def _method_row(
    seeds: Sequence[Summary], scores: Sequence[str], size: Literal["training_bytes", "peak_bytes"]
) -> tuple[str, ...]:
    """Returns the table's row of a method with these scores."""
    first = seeds[0]
    memory = statistics.median(summary[size] for summary in seeds) / 2**20
    ends = [[e["loss"] for e in s["evaluations"]] for s in seeds]  # shorter if stopped early
    losses = [[run[i] for run in ends if i < len(run)] for i in range(max(map(len, ends)))]
    return (
        first["method"],
        f"{first['trainable']:,}",
        f"{first['trainable'] / first['parameters']:.2%}",
        f"{first['learning_rate']:g}",
        " ".join(f"{statistics.mean(epoch):.3f}" for epoch in losses),
        *scores,
        f"{statistics.median(s['train_seconds'] for s in seeds):.1f}",
        f"{memory:,.0f}" if memory >= 100 else f"{memory:.1f}",
    )


def _certainty_columns(summaries: Sequence[Summary]) -> dict[str, Callable[[Summary], str]]:
    """Returns the columns that say how sure an accuracy is: head -> cell of a run.

    There are none if a method has several seeds, whose spread the table shows instead.
    """
    several_seeds = len({s["method"] for s in summaries}) < len(summaries)
    if several_seeds or "accuracy" not in summaries[0]["metrics"]:
        return {}
    columns: dict[str, Callable[[Summary], str]] = {"95 % interval": _interval_cell}
    if any("against_full" in s for s in summaries):
        columns["against full"] = _against_cell
    return columns


def _interval_cell(summary: Summary) -> str:
    low, high = interval(summary["metrics"]["accuracy"], summary["rows"])
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _against_cell(summary: Summary) -> str:
    result = summary.get("against_full")
    if result is None:
        return ""
    return difference(summary["method"], "full", result["points"], result["p"])


def notes(summaries: Sequence[Summary]) -> str:
    """Returns what the table's columns mean, in words, and on how many rows they were measured."""
    if not summaries:
        return ""
    split, extra = summaries[0]["split"], _certainty_columns(summaries)
    lines = [f"Measured on {summaries[0]['rows']:,} {split} rows of {summaries[0]['data']}."]
    if extra:
        lines.append(
            f"Each method was trained once. The interval (Wilson) covers the choice of the {split}"
            " rows. It does not cover the seed."
        )
    if "against full" in extra:
        lines.append(
            f"against full: McNemar's exact test on the {split} rows that only one of the two"
            " methods has right."
        )
    lines.append(SIZES[_measured_size(summaries)][1])
    return "".join(f"{line}\n" for line in lines)


def is_share(metric: str) -> bool:
    """True if a general metric is a share of the rows, which tables show in percent."""
    return metric in ("accuracy", "exact_match")


def _scores(values: Sequence[float], share: bool) -> str:
    """Returns mean ± standard deviation; shares in percent."""
    scale, places = (100, 2) if share else (1, 4)
    scores = [scale * value for value in values]
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
