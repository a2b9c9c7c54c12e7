"""Reads what a report shows from the folders of runs: collect(folders) -> Evidence."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import RunError
from lora.files import read_json, readable
from lora.finetune.comparison.analysis import Analysis, analysis_of
from lora.finetune.comparison.runs import Run, read_runs
from lora.finetune.config import read_toml
from lora.finetune.data.rows import read_rows
from lora.finetune.listing import RunRow, next_command, run_folders, run_row
from lora.finetune.report.curves import Point, curves

LONGEST_TEXT = 300  # characters of a text that the page shows


@dataclass(frozen=True, eq=False)
class Answers:
    """What the methods predicted for the rows that they were scored on."""

    texts: list[str]
    references: list[list[str]]
    predictions: dict[str, list[list[str]]]  # by method: (seeds, rows)
    right: dict[str, list[Sequence[bool]]]  # the same; empty if no answer is simply right
    labels: tuple[str, ...]  # the classes in the order of the data's labels; () if there are none


@dataclass(frozen=True)
class RunFiles:
    """A run, complete or not: its state, and the files that say how it was made."""

    name: str  # its folder, from the folder that all runs are in
    row: RunRow
    config: str  # config.toml
    settings: dict[str, Any]  # the same as a table; empty if it is damaged
    environment: dict[str, Any]
    config_name: str  # under which the page saves config.toml


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows."""

    analysis: Analysis
    runs: tuple[RunFiles, ...]
    curves: dict[str, dict[str, list[Point]]]  # by method, and by what is drawn
    answers: Answers

    @property
    def task(self) -> str:
        return self.analysis.methods[0].summaries[0]["task"]

    @property
    def incomplete(self) -> list[RunRow]:
        return [run.row for run in self.runs if run.row.state != "complete"]


def folders_of_runs(folders: Sequence[Path]) -> list[Path]:
    """Returns the runs in the folders, each once. Raises RunError if there is none, or if one is
    not a folder."""
    for folder in folders:
        with readable(folder, RunError, "Pass a run, or a folder of runs."):
            exists = folder.is_dir()
        if not exists:
            raise RunError(
                f"{folder} is not a folder. Pass a run, or a folder of runs: lora report FOLDER."
            )
    runs = {run.resolve(): run for folder in folders for run in run_folders(folder)}
    if not runs:
        shown = ", ".join(map(str, folders))
        raise RunError(f"there is no run in {shown}. Run lora train first, or pass another folder.")
    return list(runs.values())


def collect(runs: Sequence[Path], advance: Callable[[str], None]) -> Evidence:
    """Returns the contents of a report on runs. `advance` is called before each step with what it
    does: reading each run, statistics, the curves of each method, predictions. Raises RunError and
    DataError."""
    files: list[RunFiles] = []
    around = Path(os.path.commonpath([run.resolve().parent for run in runs]))
    for run in runs:
        name = run.resolve().relative_to(around).as_posix()
        advance(f"reading {name}")
        files.append(_files(name, run, {each.config_name for each in files}))
    complete = [each.row.run for each in files if each.row.state == "complete"]
    if not complete:
        first = files[0].row
        again = next_command(first.run, first.state, first.learning_rate)
        raise RunError(
            f"there is no complete run among {len(files)}; {first.run} is {first.state}."
            + (f" Run {again}." if again else " Train it again.")
        )
    advance("computing statistics")
    undamaged = [each.row.run for each in files if not each.row.state.startswith("damaged")]
    read, tries = read_runs(undamaged)
    analysis = analysis_of(read, tries)
    drawn = {}
    for result in analysis.methods:
        advance(f"reading the curves of {result.name}")
        drawn[result.name] = curves(result.folders, analysis.metric)
    advance("reading predictions")
    settings = {each.row.run: each.settings for each in files}
    shared = settings[analysis.methods[0].folders[0]]
    return Evidence(analysis, tuple(files), drawn, _answers(analysis, read, shared))


def _files(name: str, run: Path, taken: Collection[str]) -> RunFiles:
    """Returns a run's row and files. What cannot be read is empty, and named in the row.

    `taken`: the names under which the page saves the config.toml of other runs.
    """
    row, plain = run_row(run), re.sub(r"[^a-zA-Z0-9._-]+", "-", name)
    numbered = (f"{plain}-{number}.toml" for number in itertools.count(2))
    names = itertools.chain([f"{plain}.toml"], numbered)
    config_name = next(each for each in names if each not in taken)
    if row.state.startswith("damaged"):
        return RunFiles(name, row, "", {}, {}, config_name)
    path = run / "config.toml"
    environment = {}
    with suppress(RunError):
        environment = read_json(run / "environment.json", RunError, "")
    text = path.read_text(encoding="utf-8")
    return RunFiles(name, row, text, read_toml(path), environment, config_name)


def _answers(analysis: Analysis, runs: Sequence[Run], settings: dict[str, Any]) -> Answers:
    """Returns the predictions of all runs, with the names of classes for their labels."""
    labels = settings.get("labels", ())
    names = dict(zip(labels, settings.get("class_names", ())))
    by_folder = {run.folder: run for run in runs}
    predictions = {
        result.name: [
            [names.get(label, label) for label in by_folder[folder].predictions]
            for folder in result.folders
        ]
        for result in analysis.methods
    }
    right: dict[str, list[Sequence[bool]]] = {}
    if all(run.right is not None for run in runs):
        right = {r.name: [by_folder[f].right or () for f in r.folders] for r in analysis.methods}
    references = [[names.get(text, text) for text in texts] for texts in runs[0].references]
    rows = read_rows(runs[0].folder / "predictions.jsonl") if references else ()
    texts = [_text_of(row) for _, row in rows]
    shown = tuple(names.get(label, label) for label in labels)
    return Answers(texts, references, predictions, right, shown)


def _text_of(row: Any) -> str:
    """Returns what was predicted from: a text, a pair of texts, a prompt or a conversation."""
    if not isinstance(row, dict):  # read_predictions has raised its error
        return ""
    if "messages" in row:
        text = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in row["messages"])
    else:
        parts = [row[key] for key in ("text", "pair", "prompt") if isinstance(row.get(key), str)]
        text = " ⏐ ".join(parts) or json.dumps(row, ensure_ascii=False)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
