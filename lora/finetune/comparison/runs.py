"""Reads the runs of a comparison: complete ones, and those that only tried a learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora.errors import ConfigError, DataError, RunError
from lora.finetune.answers import scores_by_row
from lora.finetune.comparison.grid import SEARCH
from lora.finetune.config import read_toml
from lora.finetune.data.corpus import Predicted, read_predictions
from lora.finetune.data.rows import read_rows
from lora.finetune.metrics import OF_RIGHT_ROWS, signed
from lora.finetune.record import (
    DIVERGED,
    StepRow,
    Summary,
    environment_of,
    metrics_of,
    shown_name,
    summary_of,
)

VARYING = ("seed", "run_dir", "note")
"""Settings in which the runs of one method may differ."""
OF_TRIES = ("learning_rate", "test_limit")
"""Settings in which the runs that try its rates differ from them."""


@dataclass(frozen=True)
class Try:
    """A run that only tried a learning rate, and its score on dev; None if it diverged."""

    folder: Path
    rate: float
    seed: int
    score: float | None
    metric: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TriedRate:
    """A learning rate, and the scores on dev of the runs that tried it, one per seed. A run that
    diverged has None."""

    rate: float
    scores: tuple[float | None, ...]
    metric: str
    runs: tuple[Path, ...]

    @property
    def score(self) -> float | None:
        """The mean; None if a run diverged, as others at this rate may."""
        scores = [score for score in self.scores if score is not None]
        return statistics.fmean(scores) if len(scores) == len(self.scores) else None

    @property
    def failures(self) -> str:
        """What tables show in place of a score if a run diverged, else ""."""
        diverged, runs = self.scores.count(None), len(self.scores)
        return f"{diverged} of {runs} diverged" if diverged and runs > 1 else "diverged" * diverged

    @property
    def better(self) -> float:
        """The score with its sign, so that larger is better; less than any if there is none."""
        return signed(self.metric, self.score)


@dataclass(frozen=True)
class Run:
    """A complete run, as read from its folder."""

    folder: Path
    summary: Summary
    settings: dict[str, Any] = field(default_factory=dict)
    by_row: Sequence[float] | None = None
    """The scores of the test rows whose mean is the first metric; None if it is no such mean."""
    right: Sequence[bool] | None = None
    """Whether each test row is right; None if that cannot be said."""
    falling: bool = False  # the training loss was still falling at the end
    content: str = ""
    """The digest of the rows of all its splits."""
    predictions: Sequence[str] = ()
    references: Sequence[Sequence[str]] = ()  # of each test row

    @property
    def name(self) -> str:
        """What tables call the run's method."""
        return shown_name(self.summary)

    def score(self, metric: str) -> float:
        return self.summary["metrics"][metric]


def read_run(folder: Path) -> Run:
    """Returns a complete run. Raises RunError or DataError."""
    summary = summary_of(folder)
    metric = next(iter(summary["metrics"]))
    classes, path = summary["task"] == "classification", folder / "predictions.jsonl"
    answers = Predicted([], [], [])
    if summary["task"] != "text" or "exact_match" in summary["metrics"]:  # else nothing was asked
        answers = read_predictions(path)
    predictions, references, _ = answers
    # Of texts only some of the prompts may have been answered.
    if classes and len(predictions) != summary["rows"]:
        raise RunError(
            f"{path} has {len(predictions):,} rows, and summary.json says {summary['rows']:,}."
            f" Remove {folder}, and run it again."
        )
    table = _table_of(folder)
    by_row: Sequence[float] | None = None
    right: Sequence[bool] | None = None
    if classes:
        right = [text in texts for text, texts in zip(predictions, references, strict=True)]
        by_row = right if metric == "accuracy" else None
    elif metric == "rougeL":
        by_row = _recorded(path, metric)
    elif summary["task"] == "text":
        try:
            by_row = scores_by_row(table["data"], answers, metric)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if by_row and metric in OF_RIGHT_ROWS:
            right = [score == 1 for score in by_row]
    falling, content = still_falling(folder), environment_of(folder)["data"]
    return Run(folder, summary, table, by_row, right, falling, content, predictions, references)


def _recorded(path: Path, metric: str) -> tuple[float, ...] | None:
    """Returns the score that predictions.jsonl has for each row; None if a row has none."""
    values = [row.get(metric) for _, row in read_rows(path) if isinstance(row, dict)]
    numbers = tuple(float(value) for value in values if isinstance(value, int | float))
    return numbers if len(numbers) == len(values) else None


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Try]]:
    """Returns the complete runs, and those that tried a learning rate. Runs that have not ended are
    left out."""
    tries, runs = [], []
    for folder in folders:
        in_search = folder.resolve().parent.name == SEARCH
        if in_search and _table_of(folder).get("test_limit") == 0:
            tries.append(read_try(folder))
        elif (folder / "summary.json").is_file():
            runs.append(read_run(folder))
    return runs, list(filter(None, tries))


def _table_of(folder: Path) -> dict[str, Any]:
    """Returns the settings of a run, complete or not. Raises RunError if it is not a run."""
    try:
        return read_toml(folder / "config.toml")
    except ConfigError as error:
        raise RunError(f"{folder} is not a run: {error}") from None


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the runs of each method in the order of their seeds.

    Runs of one name whose settings differ in more than the seed are different methods: the settings
    that differ are added to their names.
    """
    names: dict[str, list[Run]] = {}
    for run in runs:
        names.setdefault(run.name, []).append(run)
    groups: dict[str, list[Run]] = {}
    for name, same_name in names.items():
        settings = [without_seed(run) for run in same_name]
        keys = dict.fromkeys(key for each in settings for key in each)
        differing = [k for k in keys if len({repr(each.get(k)) for each in settings}) > 1]
        for run, each in zip(same_name, settings, strict=True):
            parts = [f"{key}={each.get(key, '')}" for key in differing]
            groups.setdefault(" ".join([name, *parts]), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.summary["seed"])
    return groups


def without_seed(run: Run | Try) -> dict[str, Any]:
    """Returns the settings that runs of one method share."""
    return {k: v for k, v in run.settings.items() if k not in VARYING}


def once_per_seed(group: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Returns the first run of each seed, in their order, and the others: they repeat a result, and
    are no further evidence."""
    first = {run.summary["seed"]: run for run in reversed(group)}
    kept = [run for run in group if first[run.summary["seed"]] is run]
    return kept, [run for run in group if run not in kept]


def tries_of(run: Run, tries: Sequence[Try]) -> list[Try]:
    """Returns the tries with the settings of a run, but for the rate."""
    settings = {k: v for k, v in without_seed(run).items() if k not in OF_TRIES}
    return [
        each
        for each in tries
        if {k: v for k, v in without_seed(each).items() if k not in OF_TRIES} == settings
    ]


def check_alike(runs: Sequence[Run]) -> None:
    """Raise RunError if the runs cannot be compared: other data, other metrics, other rows."""
    first = runs[0]
    for run in runs:
        metrics = [next(iter(each.summary["metrics"])) for each in (first, run)]
        if metrics[0] != metrics[1]:
            raise RunError(
                f"{run.folder} is scored by {metrics[1]}, and {first.folder} by {metrics[0]}, so"
                " they cannot be compared. Train both with the same --metric, in a new --run-dir."
            )
        for key in ("data", "split", "rows"):
            ours, others = first.summary[key], run.summary[key]
            if ours != others:
                raise RunError(
                    f"{run.folder} has {key} {others}, and {first.folder} has {ours}, so they"
                    " cannot be compared. Pass runs on the same data."
                )
        limits = [
            [each.settings.get(key) for key in ("limit", "dev_limit", "test_limit")]
            for each in (first, run)
        ]
        if limits[0] == limits[1] and run.content != first.content:
            raise RunError(
                f"{run.folder} read other rows of {run.summary['data']} than {first.folder}: the"
                " files changed between the runs, so they cannot be compared. Remove the older"
                " runs, and compare again."
            )
        if run.references != first.references:
            raise RunError(
                f"{run.folder / 'predictions.jsonl'} has other rows than that of {first.folder}, so"
                " they cannot be compared. Pass runs on the same data."
            )
        if odd := sorted(run.summary["metrics"].keys() ^ first.summary["metrics"].keys()):
            raise RunError(
                f"{run.folder / 'summary.json'} has the scores {', '.join(run.summary['metrics'])},"
                f" and {odd[0]} is not in both it and {first.folder}. Pass runs of the same task."
            )


def read_try(folder: Path) -> Try | None:
    """Returns what a run that tried a rate shows; None if it has not ended. One with a rate that is
    too high diverges, and has no score."""
    complete = (folder / "summary.json").is_file()
    if not complete and not (folder / DIVERGED).is_file():
        return None
    table = _table_of(folder)
    rate, seed = float(table["learning_rate"]), int(table["seed"])
    if not complete:
        return Try(folder, rate, seed, None, "", table)
    metric, score = next(iter(summary_of(folder)["metrics"].items()))
    return Try(folder, rate, seed, score, metric, table)


FALLING = 0.05
"""A training loss that fell by more than this share over the last tenth is still falling."""


FEWEST_STEPS = 5
"""Steps over which losses are averaged at least. A run of fewer than four times as many is too
short for saying whether its loss was falling."""


def still_falling(folder: Path) -> bool:
    """True if the mean loss of the last tenth of the steps, or of the last FEWEST_STEPS, is more
    than FALLING below that of as many before, and by more than twice the standard error of that
    difference."""
    steps: list[StepRow] = [row for row in metrics_of(folder) if row["kind"] == "step"]
    if len(steps) < 4 * FEWEST_STEPS:
        return False
    tenth = max(FEWEST_STEPS, len(steps) // 10)
    before = [row["loss"] for row in steps[-2 * tenth : -tenth]]
    last = [row["loss"] for row in steps[-tenth:]]
    fall = statistics.mean(before) - statistics.mean(last)
    error = ((statistics.variance(before) + statistics.variance(last)) / tenth) ** 0.5
    return bool(fall > max(FALLING * statistics.mean(before), 2 * error))
