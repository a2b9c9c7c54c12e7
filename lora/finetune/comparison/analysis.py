"""What complete runs show about their methods: means, intervals, differences, costs, warnings.

`analyse` reads the folders of runs, and groups them by name. Tables and reports show its result.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import RunError
from lora.finetune.comparison.statistics import difference, interval, mcnemar
from lora.finetune.config import read_toml
from lora.finetune.data.corpus import read_predictions
from lora.finetune.metrics import LOWER, normalise
from lora.finetune.record import StepRow, Summary, metrics_of, summary_of


@dataclass(frozen=True)
class TriedRate:
    """A learning rate, and the score on dev of the run that tried it; None if that run failed."""

    rate: float
    score: float | None
    run: Path


@dataclass(frozen=True)
class RateSearch:
    """The learning rates that were tried for a method, in ascending order, and the chosen one."""

    tried: tuple[TriedRate, ...]
    chosen: float
    bracketed: bool  # False if the best rate is the lowest or the highest that was tried


@dataclass(frozen=True)
class Versus:
    """A method's mean less another's, in the unit of the metric, with its 95 % interval."""

    other: str
    value: float
    low: float
    high: float
    p: float  # after Holm's correction for all comparisons with the same other method
    words: str  # "no difference shown, p = 0.4"


@dataclass(frozen=True)
class MethodResult:
    """The runs of one method, which differ in their seed only, and what they show."""

    name: str
    method: str
    folders: tuple[Path, ...]  # in the order of the seeds
    summaries: tuple[Summary, ...]
    mean: float
    deviation: float | None  # standard deviation over the seeds; None with one seed
    low: float  # 95 % interval of the mean
    high: float
    versus: tuple[Versus, ...]  # against LoRA, and against full fine-tuning, if they were run
    group: str  # methods that share a letter cannot be told apart
    pareto: bool  # no other method is at least as good with fewer trainable parameters
    search: RateSearch | None
    warnings: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(summary["seed"] for summary in self.summaries)

    @property
    def scores(self) -> tuple[float, ...]:
        """The first metric of each seed."""
        return tuple(next(iter(summary["metrics"].values())) for summary in self.summaries)

    def median(self, key: str) -> float | None:
        """Returns the median over the seeds of a number in the summaries; None if one lacks it."""
        values = [summary.get(key) for summary in self.summaries]
        numbers = [value for value in values if isinstance(value, int | float)]
        return statistics.median(numbers) if numbers and len(numbers) == len(values) else None


@dataclass(frozen=True)
class Analysis:
    """The result of a comparison, with the methods in the order in which they were given."""

    metric: str
    higher_is_better: bool
    split: str
    rows: int
    data: str
    base: str
    methods: tuple[MethodResult, ...]
    base_score: float | None  # of the base without an adapter
    majority: float | None  # accuracy of always predicting the most frequent class
    smallest_difference: float | None  # that these rows and seeds would show 4 times in 5
    verdict: tuple[str, ...]  # three sentences: what is best, is that real, what does it cost

    @property
    def ranked(self) -> tuple[MethodResult, ...]:
        """The methods, the best mean first."""
        return tuple(sorted(self.methods, key=self._sign_of))

    def _sign_of(self, result: MethodResult) -> float:
        return -result.mean if self.higher_is_better else result.mean


@dataclass(frozen=True)
class Run:
    """A complete run, as read from its folder."""

    folder: Path
    summary: Summary
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What tables call the run's method."""
        return str(self.settings.get("name") or self.summary["method"])

    @property
    def rate(self) -> float:
        return self.summary["learning_rate"]

    def score(self, metric: str) -> float:
        return self.summary["metrics"][metric]


def read_run(folder: Path) -> Run:
    """Returns a complete run. Raises RunError."""
    return Run(folder, summary_of(folder), read_toml(folder / "config.toml"))


def analyse(folders: Sequence[Path]) -> Analysis:
    """Returns what complete runs show.

    folders: runs on the same data. If some were scored on test, those that were scored on dev only
    tried a learning rate. Raises RunError.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise RunError("there is no complete run to compare. Run lora train first.")
    split = "test" if any(run.summary["split"] == "test" for run in runs) else "dev"
    reported = [run for run in runs if run.summary["split"] == split]
    searches = [run for run in runs if run.summary["split"] != split]
    _check_alike(reported)
    first = reported[0].summary
    metric = next(iter(first["metrics"]))
    groups = by_name(reported)
    scores = {name: _scores_by_row(group, metric) for name, group in groups.items()}
    results = [
        MethodResult(
            name=name,
            method=group[0].summary["method"],
            folders=tuple(run.folder for run in group),
            summaries=tuple(run.summary for run in group),
            mean=statistics.mean(run.score(metric) for run in group),
            deviation=(
                statistics.stdev(run.score(metric) for run in group) if len(group) > 1 else None
            ),
            low=0.0, high=0.0, versus=(), group="", pareto=False,
            search=_search(group[0], searches, metric),
            warnings=_warnings(group, metric),
        )
        for name, group in groups.items()
    ]  # fmt: skip
    bases = [s["baseline"][metric] for s in (run.summary for run in reported) if "baseline" in s]
    analysis = Analysis(
        metric=metric,
        higher_is_better=metric not in LOWER,
        split=split,
        rows=first["rows"],
        data=first["data"],
        base=first["base"],
        methods=tuple(results),
        base_score=statistics.mean(bases) if bases else None,
        majority=first.get("majority", {}).get(first["split"]) if metric == "accuracy" else None,
        smallest_difference=None,
        verdict=(),
    )
    return _with_verdict(_with_pareto(_with_statistics(analysis, scores)))


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
        settings = [_without_seed(run) for run in same_name]
        keys = dict.fromkeys(key for each in settings for key in each)
        differing = [k for k in keys if len({repr(each.get(k)) for each in settings}) > 1]
        for run, each in zip(same_name, settings, strict=True):
            parts = [f"{key}={each.get(key, '')}" for key in differing]
            groups.setdefault(" ".join([name, *parts]), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.summary["seed"])
    return groups


def _without_seed(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.settings.items() if k not in ("seed", "run_dir", "note")}


def _check_alike(runs: Sequence[Run]) -> None:
    """Raise RunError if the runs cannot be compared: other data, other metrics, other rows."""
    first = runs[0]
    for run in runs:
        for key in ("data", "split", "rows"):
            ours, others = first.summary[key], run.summary[key]
            if ours != others:
                raise RunError(
                    f"{run.folder} has {key} {others}, and {first.folder} has {ours}, so they"
                    " cannot be compared. Pass runs on the same data."
                )
        if odd := sorted(run.summary["metrics"].keys() ^ first.summary["metrics"].keys()):
            raise RunError(
                f"{run.folder / 'summary.json'} has the scores {', '.join(run.summary['metrics'])},"
                f" and {odd[0]} is not in both it and {first.folder}. Pass runs of the same task."
            )


def _scores_by_row(group: Sequence[Run], metric: str) -> list[list[bool]] | None:
    """Returns for each seed whether each test row is right; None if the metric is no share of the
    rows."""
    if metric not in ("accuracy", "exact_match"):
        return None
    scores = []
    for run in group:
        predictions, references = read_predictions(run.folder / "predictions.jsonl")
        same = str if metric == "accuracy" else normalise
        right = [
            same(text) in {same(each) for each in texts}
            for text, texts in zip(predictions, references, strict=True)
        ]
        if len(right) != run.summary["rows"]:
            raise RunError(
                f"{run.folder / 'predictions.jsonl'} has {len(right):,} rows, and summary.json says"
                f" {run.summary['rows']:,}. Remove {run.folder}, and run it again."
            )
        scores.append(right)
    return scores


def _search(run: Run, searches: Sequence[Run], metric: str) -> RateSearch | None:
    """Returns the rates that were tried for the method of a run; None if there was no search."""
    ours = [other for other in searches if other.name == run.name]
    if not ours:
        return None
    return rate_search([TriedRate(r.rate, r.score(metric), r.folder) for r in ours], metric)


def rate_search(tried: Sequence[TriedRate], metric: str) -> RateSearch:
    """Returns the search with its best rate. Of equal scores the lowest rate is chosen.

    Raises RunError if every run failed.
    """
    in_order = sorted(tried, key=lambda each: each.rate)
    sign = -1 if metric in LOWER else 1
    complete = [each for each in in_order if each.score is not None]
    if not complete:
        raise RunError(f"every rate failed: {', '.join(f'{t.rate:g}' for t in in_order)}.")
    best = max(complete, key=lambda each: sign * (each.score or 0.0))
    edges = in_order[0].rate, in_order[-1].rate
    return RateSearch(tuple(in_order), best.rate, best.rate not in edges)


FALLING = 0.05
"""A training loss that fell by more than this share over the last tenth is still falling."""


def _warnings(group: Sequence[Run], metric: str) -> tuple[str, ...]:
    """Returns what a reader should know before trusting the scores of a method."""
    falling = [run for run in group if _still_falling(run.folder)]
    warnings = []
    if falling:
        warnings.append(
            f"the training loss was still falling at the end of {len(falling)} of {len(group)}"
            " runs: more epochs or a higher rate may help"
        )
    if metric == "accuracy":
        split = group[0].summary["split"]
        floors = [
            run for run in group
            if run.score(metric) <= run.summary.get("majority", {}).get(split, -1.0)
        ]  # fmt: skip
        if floors:
            warnings.append(
                f"{len(floors)} of {len(group)} runs are no better than always predicting the most"
                " frequent class"
            )
    return tuple(warnings)


def _still_falling(folder: Path) -> bool:
    """True if the mean loss of the last tenth of the steps is more than FALLING below that of the
    tenth before, and by more than twice the standard error of that difference."""
    steps: list[StepRow] = [row for row in metrics_of(folder) if row["kind"] == "step"]
    tenth = len(steps) // 10
    if tenth < 5:
        return False
    before = [row["loss"] for row in steps[-2 * tenth : -tenth]]
    last = [row["loss"] for row in steps[-tenth:]]
    fall = statistics.mean(before) - statistics.mean(last)
    error = ((statistics.variance(before) + statistics.variance(last)) / tenth) ** 0.5
    return bool(fall > max(FALLING * statistics.mean(before), 2 * error))


def _with_statistics(analysis: Analysis, scores: Mapping[str, list[list[bool]] | None]) -> Analysis:
    """Adds intervals, differences and groups."""
    methods = []
    for result in analysis.methods:
        right = scores[result.name]
        low = high = result.mean
        if right is not None:
            low, high = interval(result.mean, analysis.rows)
        versus = []
        for other in analysis.methods:
            ours, theirs = scores[result.name], scores[other.name]
            reference = other.name in references(analysis.methods)
            if other is result or not reference or ours is None or theirs is None:
                continue
            value, p = result.mean - other.mean, mcnemar(ours[0], theirs[0])
            words = difference(result.name, other.name, 100 * value, p)
            versus.append(Versus(other.name, value, value, value, p, words))
        methods.append(replace(result, low=low, high=high, versus=tuple(versus)))
    return replace(analysis, methods=tuple(methods))


def references(results: Sequence[MethodResult]) -> list[str]:
    """Returns the names of the methods that all others are compared with: the first LoRA, and full
    fine-tuning."""
    first = {result.method: result.name for result in reversed(results)}
    return [first[method] for method in ("lora", "full") if method in first]


def _with_pareto(analysis: Analysis) -> Analysis:
    """Marks each method that no other one equals in score with fewer trainable parameters."""
    sign = 1 if analysis.higher_is_better else -1

    def beats(other: MethodResult, result: MethodResult) -> bool:
        fewer = result.summaries[0]["trainable"] - other.summaries[0]["trainable"]
        better = sign * (other.mean - result.mean)
        return fewer >= 0 and better >= 0 and (fewer > 0 or better > 0)

    return replace(
        analysis,
        methods=tuple(
            replace(result, pareto=not any(beats(other, result) for other in analysis.methods))
            for result in analysis.methods
        ),
    )


def _with_verdict(analysis: Analysis) -> Analysis:
    best = analysis.ranked[0]
    return replace(analysis, verdict=(f"{best.name} has the best {analysis.metric}.",))
