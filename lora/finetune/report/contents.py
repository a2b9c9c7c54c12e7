"""The tables of the report: tables_of(evidence) -> Table by its key."""

from __future__ import annotations

import json
import time
from dataclasses import replace

from lora.errors import command
from lora.finetune.comparison.analysis import Analysis, MethodResult, Versus
from lora.finetune.comparison.runs import VARYING
from lora.finetune.comparison.tables import (
    interval_text,
    looser_tests,
    memory_measured,
    noise_floors,
    score_text,
    task_rows,
)
from lora.finetune.estimate import duration
from lora.finetune.listing import next_command
from lora.finetune.metrics import is_share
from lora.finetune.report.evidence import Evidence, RunFiles
from lora.finetune.report.formats import Cell, Table, cells, numeric
from lora.finetune.report.mistakes import disagreements, reports_of

MOST_EXAMPLES = 200  # rows on which methods disagree that the page shows
MOST_CONFUSIONS = 200


def tables_of(evidence: Evidence) -> dict[str, Table]:
    """Returns the tables that have rows, in the order of the page."""
    tables = [
        methods_table(evidence.analysis),
        rates_table(evidence.analysis),
        *_classes_tables(evidence),
        disagreements_table(evidence),
        tasks_table(evidence.analysis),
        differences_table(evidence),
        shared_table(evidence),
        environments_table(evidence),
        runs_table(evidence),
    ]
    return {table.key: table for table in tables if table.rows}


def methods_table(analysis: Analysis) -> Table:
    """Returns a row per method, the best first: scores, how sure they are, and costs."""
    others = list(dict.fromkeys(v.other for result in analysis.methods for v in result.versus))
    grouped = any(result.group for result in analysis.methods)
    forgets = any(result.forgetting for result in analysis.methods)
    head = [
        "method", f"{analysis.split} {analysis.metric}", "95 % interval", "trainable", "training",
        *(f"against {other}" for other in others), *(["group"] if grouped else []),
        "share", "memory MiB", "saved MiB", "tokens/s",
        *(["forgetting"] if forgets else []), "rate", "seeds", "frontier", "remarks",
    ]  # fmt: skip
    share = is_share(analysis.metric)
    low = min(result.low for result in analysis.methods)
    width = max(result.high for result in analysis.methods) - low or 1.0
    rows = []
    for result in analysis.ranked:
        ends = ((result.low - low) / width, (result.high - low) / width)
        limits = (ends[0], (result.mean - low) / width, ends[1])
        versus = {each.other: each for each in result.versus}
        rows.append(
            (
                Cell(result.name),
                Cell(score_text(result.scores, share), result.mean),
                Cell(interval_text(result.interval, share), result.low, limits),
                numeric(result.summaries[0]["trainable"]),
                _seconds(result),
                *(_versus_cell(versus.get(other)) for other in others),
                *([Cell(result.group)] if grouped else []),
                *_cost_cells(result, memory_measured(analysis)[1]),
                *([_forgetting(result)] if forgets else []),
                numeric(result.summaries[0]["learning_rate"], "{:g}"),
                Cell(", ".join(map(str, result.seeds)), float(len(result.seeds))),
                Cell("yes" if result.pareto else "no"),
                Cell("; ".join(result.warnings)),
            )
        )
    return Table("methods", "Methods", tuple(head), tuple(rows), _methods_note(analysis, grouped))


def _versus_cell(versus: Versus | None) -> Cell:
    return Cell("") if versus is None else Cell(versus.words, versus.value)


def _seconds(result: MethodResult) -> Cell:
    seconds = result.median("train_seconds")
    return Cell("" if seconds is None else duration(seconds), seconds)


def _cost_cells(result: MethodResult, size: str) -> list[Cell]:
    """Returns the cells of what else a method costs: medians over its seeds. size: the key of the
    memory that all runs measured."""
    first = result.summaries[0]
    memory = result.median(size)
    saved, speed = result.median("adapter_bytes"), result.median("tokens_per_second")
    return [
        numeric(100 * first["trainable"] / first["parameters"], "{:.2f} %"),
        numeric(memory and memory / 2**20, "{:,.0f}"),
        numeric(saved and saved / 2**20, "{:,.2f}"),
        numeric(speed),
    ]


def _forgetting(result: MethodResult) -> Cell:
    """Returns the perplexity of the unrelated text before and after training."""
    if result.forgetting is None:
        return Cell("")
    before, after = result.forgetting
    return Cell(f"{before:.2f} to {after:.2f}", after / before)


def _methods_note(analysis: Analysis, grouped: bool) -> str:
    """Returns what the columns mean, in words."""
    unit = 100 if is_share(analysis.metric) else 1
    notes = [f"Measured on {analysis.rows:,} {analysis.split} rows of {analysis.data}."]
    if analysis.base_score is not None:
        shown = score_text([analysis.base_score], is_share(analysis.metric))
        notes.append(f"The base without an adapter: {shown}.")
    if analysis.majority is not None:
        shown = score_text([analysis.majority], share=True)
        notes.append(f"Always predicting the most frequent class: {shown}.")
    if analysis.smallest_difference is not None:
        points = "points" if unit == 100 else analysis.metric
        notes.append(
            "With this many rows and seeds, a difference smaller than about"
            f" {unit * analysis.smallest_difference:.2g} {points} would probably not be detected"
            + (" (the median over all pairs)." if len(analysis.methods) > 2 else ".")
        )
    notes += noise_floors(analysis)
    if grouped:
        notes.append("Between methods with a common group letter, no difference is shown.")
        notes += looser_tests(analysis)
    texts = {each["forgetting"]["source"] for result in analysis.methods
             for each in result.summaries if "forgetting" in each}  # fmt: skip
    if texts:
        notes.append(
            f"Forgetting: the perplexity of {', '.join(sorted(texts))} before and after training."
        )
    notes.append(
        "Costs are medians over the seeds. On the frontier: no other method is at least as good"
        " with fewer trainable parameters."
    )
    return " ".join(notes)


def lead_of(analysis: Analysis) -> str:
    """Returns by how much the best method is ahead of the next, in words; "" if it is alone."""
    if len(analysis.contenders) < 2:
        return ""
    best, second = analysis.contenders[:2]
    if second in analysis.leaders:
        return f"{second.name} scores the same."
    gap = abs(best.mean - second.mean)
    shown = f"{gap:.4g}"
    if is_share(analysis.metric):
        shown = f"{100 * gap:.1f} points" if gap >= 0.0005 else "less than 0.1 points"
    return f"It is {shown} ahead of {second.name}, the next."


def rates_table(analysis: Analysis) -> Table:
    """Returns a row per learning rate that was tried, and its score on dev."""
    rows = []
    for result in analysis.methods:
        search = result.search
        for tried in search.tried if search else ():
            chosen = "chosen" if search and tried.rate == search.chosen else ""
            if chosen and search and not search.bracketed:
                chosen += ", at the edge of the rates that were tried: not bracketed"
            shown = tried.failures or score_text(tried.scores, is_share(tried.metric))
            rows.append(
                (
                    Cell(result.name),
                    numeric(tried.rate, "{:g}"),
                    Cell(shown, tried.score),
                    Cell(chosen),
                )
            )
    head = ("method", "rate", f"dev {analysis.searched_by}", "remark")
    return Table("rates", "Learning rates that were tried", head, tuple(rows))


def _classes_tables(evidence: Evidence) -> list[Table]:
    """Returns the scores per class, and the confusions, of every method of a classification."""
    if evidence.task != "classification":
        return []
    reports = reports_of(evidence.answers)
    scores, counts = [], []
    for result in evidence.analysis.ranked:
        name, report = result.name, reports[result.name]
        for each, row in zip(report.classes, report.matrix, strict=True):
            numbers = [numeric(x, "{:.3f}") for x in (each.precision, each.recall, each.f1)]
            rows = each.rows // len(result.seeds)
            scores.append((*cells(name, each.label), *numbers, numeric(rows)))
            for other, count in zip(report.classes, row, strict=True):
                if count and other is not each:
                    counts.append((count, name, each.label, other.label))
    counts.sort(key=lambda each: -each[0])
    note = "Rows of a class for which another was predicted, summed over the seeds."
    if len(counts) > MOST_CONFUSIONS:
        note += f" The {MOST_CONFUSIONS} largest of {len(counts):,}."
    confused = [
        (*cells(name, true, predicted), numeric(count))
        for count, name, true, predicted in counts[:MOST_CONFUSIONS]
    ]
    return [
        Table(
            "classes", "Scores per class",
            ("method", "class", "precision", "recall", "F1", "rows"), tuple(scores),
            "Over the predictions of all seeds together.",
        ),
        Table(
            "confusions", "Confusions", ("method", "class", "predicted", "rows"), tuple(confused),
            note,
        ),
    ]  # fmt: skip


def disagreements_table(evidence: Evidence) -> Table:
    """Returns the rows that some methods have right and others do not, the most evenly divided
    first; at most MOST_EXAMPLES."""
    answers = evidence.answers
    all_rows = disagreements(answers)
    rows = []
    for each in all_rows[:MOST_EXAMPLES]:
        right = ", ".join(each.right)
        wrong = ", ".join(f"{name}: {text[:60]}" for name, text in each.wrong.items())
        label = " or ".join(answers.references[each.row])
        rows.append((numeric(each.row + 1), *cells(answers.texts[each.row], label, right, wrong)))
    note = (
        f"The methods disagree on {len(all_rows):,} of {len(answers.texts):,} rows. A method is"
        " right on a row if most of its seeds are."
    )
    if len(all_rows) > MOST_EXAMPLES:
        note += f" Shown are the {MOST_EXAMPLES} that divide the methods most evenly."
    head = ("row", "text", "label", "right", "wrong: predicted")
    return Table("disagreements", "Where methods disagree", head, tuple(rows), note)


def tasks_table(analysis: Analysis) -> Table:
    """Returns the scores of each task; no rows if there is one task only."""
    head, *rows = task_rows(replace(analysis, methods=analysis.ranked)) or [()]
    body = [(Cell(task), Cell(kind), *map(_score_cell, scores)) for task, kind, *scores in rows]
    return Table("tasks", "Scores per task", tuple(head), tuple(body))


def _score_cell(text: str) -> Cell:
    """Returns the cell of "82.10 ± 0.30 %"."""
    return Cell(text, float(text.split()[0]) if text else None)


def _settings_of(evidence: Evidence) -> dict[str, dict[str, str]]:
    """Returns the settings of each method's first run, as texts."""
    files = {run.row.run: run for run in evidence.runs}
    return {
        result.name: {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in files[result.folders[0]].settings.items()
            if key not in (*VARYING, "name")
        }
        for result in evidence.analysis.ranked
    }


def differences_table(evidence: Evidence) -> Table:
    """Returns the settings in which methods differ: a row per setting, a column per method."""
    settings = _settings_of(evidence)
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    rows = []
    for key in keys:
        values = [each.get(key, "") for each in settings.values()]
        if len(set(values)) > 1:
            rows.append(cells(key, *values))
    note = "Empty: the method has no such setting."
    return Table("differences", "Settings that differ", ("setting", *settings), tuple(rows), note)


def shared_table(evidence: Evidence) -> Table:
    """Returns the settings that all methods share."""
    first, *others = _settings_of(evidence).values()
    rows = [
        cells(key, value)
        for key, value in first.items()
        if all(each.get(key) == value for each in others)
    ]
    return Table("shared", "Settings that all runs share", ("setting", "value"), tuple(rows))


MACHINE = {
    "processor": "processor", "cores": "cores", "threads": "threads", "ranks": "processes",
    "device": "device", "platform": "system", "python": "Python", "torch": "torch",
    "transformers": "transformers", "lora-from-scratch": "lora-from-scratch",
    "deterministic": "deterministic",
}  # fmt: skip
"""The keys of environment.json that the report compares, and what it calls them."""


def environments_table(evidence: Evidence) -> Table:
    """Returns the machines and versions: a row per key, a column per distinct machine."""
    machines: dict[tuple[str, ...], int] = {}
    for run in filter(lambda run: run.environment, evidence.runs):
        machine = tuple(str(run.environment.get(key, "")) for key in MACHINE)
        machines[machine] = machines.get(machine, 0) + 1
    head = ["", *(f"{count} run{'s' * (count > 1)}" for count in machines.values())]
    rows = [cells(name, *values) for name, *values in zip(MACHINE.values(), *machines)]
    note = ""
    if len(machines) > 1:
        note = "The runs were made on different machines or versions: do not compare their times."
    return Table("environments", "Machines and versions", tuple(head), tuple(rows), note)


def runs_table(evidence: Evidence) -> Table:
    """Returns a row per run, complete or not, with the command that repeats or resumes it."""
    rows = [_cells_of_run(run) for run in evidence.runs]
    note = "The settings of a run are all in its config.toml, which the last column saves."
    if missing := len(evidence.incomplete):
        note = f"{missing} of {len(rows)} runs are incomplete and in no other table. {note}"
    head = ("run", "method", "seed", "rate", "state", "score", "begun", "command", "settings")
    return Table("runs", "How to repeat each run", head, tuple(rows), note)


def _cells_of_run(run: RunFiles) -> tuple[Cell, ...]:
    row = run.row
    again = command("lora", "train", "--config", run.config_name, "--run-dir", f"{run.name}-again")
    if row.state != "complete":
        again = next_command(row.run, row.state, row.learning_rate)
    changed = time.strftime("%Y-%m-%dT%H:%M", time.localtime(row.changed))
    return (
        Cell(run.name),
        Cell(row.name),
        numeric(row.seed),
        numeric(row.learning_rate, "{:g}"),
        Cell(row.state),
        Cell("" if row.score is None else f"{row.metric} {row.score:.4g}", row.score),
        Cell(str(run.environment.get("time", changed))[:16].replace("T", " ")),
        Cell(again),
        Cell(run.config_name, download=run.config_name) if run.config else Cell(""),
    )


def configurations(evidence: Evidence) -> dict[str, str]:
    """Returns the text of each run's config.toml by the name under which the page saves it."""
    return {run.config_name: run.config for run in evidence.runs if run.config}
