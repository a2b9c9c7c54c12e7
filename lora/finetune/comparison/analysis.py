"""What complete runs show about their methods: means, intervals, differences, costs, warnings.

`analyse` reads the folders of runs, and groups them by name. Tables and reports show its result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora.errors import RunError
from lora.finetune.comparison.grid import AGAIN_NAME, RATE_STEP, rounded
from lora.finetune.comparison.runs import (
    Run,
    TriedRate,
    Try,
    by_name,
    check_alike,
    once_per_seed,
    read_runs,
    tries_of,
    without_seed,
)
from lora.finetune.comparison.statistics import bootstrap, difference, groups
from lora.finetune.estimate import duration
from lora.finetune.metrics import LOWER, is_share, signed
from lora.finetune.record import Summary
from lora.interop.documents import read_document


@dataclass(frozen=True)
class RateSearch:
    """The learning rates that were tried for a method, in ascending order, and the chosen one."""

    tried: tuple[TriedRate, ...]
    chosen: float
    bracketed: bool  # False if the chosen rate is the lowest or the highest that was tried

    @property
    def best(self) -> TriedRate:
        """The best rate on dev. Of equal scores, the chosen rate or else the lowest."""
        return max(self.tried, key=lambda each: (each.better, each.rate == self.chosen))


@dataclass(frozen=True)
class Versus:
    """A method's mean less another's, in the unit of the metric, with its 95 % interval."""

    other: str
    value: float
    interval: tuple[float, float] | None
    p: float  # after Holm's correction for all comparisons with the same other method
    test: str  # "McNemar", or "bootstrap"
    words: str  # "no difference shown (-1.1 to +0.2 points), p = 0.4"


@dataclass(frozen=True)
class MethodResult:
    """The runs of one method, which differ in their seed only, and what they show."""

    name: str
    method: str
    folders: tuple[Path, ...]  # in the order of the seeds
    summaries: tuple[Summary, ...]
    mean: float
    deviation: float | None  # standard deviation over the seeds; None with one seed
    interval: tuple[float, float] | None  # 95 % interval of the mean; None if rows have no scores
    versus: tuple[Versus, ...]  # against each of references()
    group: str  # letters; between methods with a common one, no difference is shown
    pareto: bool  # no other method is at least as good with fewer trainable parameters
    search: RateSearch | None
    warnings: tuple[str, ...]
    again: str = ""
    """The method that was trained again, with other seeds, if this is the noise floor."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(summary["seed"] for summary in self.summaries)

    @property
    def low(self) -> float:
        """The lower end of the interval, or the mean if there is none."""
        return self.interval[0] if self.interval else self.mean

    @property
    def high(self) -> float:
        """The upper end of the interval, or the mean if there is none."""
        return self.interval[1] if self.interval else self.mean

    @property
    def scores(self) -> tuple[float, ...]:
        """The first metric of each seed."""
        return tuple(next(iter(summary["metrics"].values())) for summary in self.summaries)

    def median(self, key: str) -> float | None:
        """Returns the median over the seeds of a number in the summaries; None if one lacks it."""
        values = [summary.get(key) for summary in self.summaries]
        numbers = [value for value in values if isinstance(value, int | float)]
        return statistics.median(numbers) if numbers and len(numbers) == len(values) else None

    @property
    def forgetting(self) -> tuple[float, float] | None:
        """The perplexity of --unrelated-text before and after training, as means over the seeds."""
        texts = [summary["forgetting"] for summary in self.summaries if "forgetting" in summary]
        if not texts:
            return None
        before, after = (statistics.fmean(t[key] for t in texts) for key in ("before", "after"))
        return before, after


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
    smallest_difference: float | None  # that these rows and seeds detect with a probability of 80 %
    verdict: tuple[str, ...]  # three sentences: what is best, is that real, what does it cost

    @property
    def ranked(self) -> tuple[MethodResult, ...]:
        """The methods, the best mean first; of equal ones that with fewer trainable parameters."""

        def key(result: MethodResult) -> tuple[float, int]:
            return -signed(self.metric, result.mean), result.summaries[0]["trainable"]

        return tuple(sorted(self.methods, key=key))

    @property
    def searched_by(self) -> str:
        """The metric on dev by which learning rates were chosen; that of the runs if none were."""
        searches = [result.search for result in self.methods if result.search]
        tried = [each.metric for search in searches for each in search.tried if each.metric]
        return tried[0] if tried else self.metric

    @property
    def contenders(self) -> tuple[MethodResult, ...]:
        """The methods without the noise floor, the best mean first."""
        return tuple(result for result in self.ranked if not result.again)

    @property
    def leaders(self) -> tuple[MethodResult, ...]:
        """The contenders with the best mean: several if their means are equal but for rounding."""
        best = self.contenders[0].mean
        return tuple(r for r in self.contenders if math.isclose(r.mean, best, rel_tol=1e-12))


def analyse(folders: Sequence[Path]) -> Analysis:
    """Returns what runs on the same data show. Raises RunError if none is complete, or if they
    cannot be compared."""
    return analysis_of(*read_runs(folders))


def analysis_of(runs: Sequence[Run], tries: Sequence[Try] = ()) -> Analysis:
    """Returns what complete runs show. tries: the runs that tried learning rates.

    Raises RunError if there is no run, or if they cannot be compared.
    """
    if not runs:
        raise RunError("there is no complete run to compare. Run lora train or lora compare first.")
    check_alike(runs)
    first = runs[0].summary
    metric = next(iter(first["metrics"]))
    once = {name: once_per_seed(group) for name, group in by_name(runs).items()}
    groups = {name: kept for name, (kept, _) in once.items()}
    methods = []
    for name, (group, repeated) in once.items():
        result = _method_result(name, group, metric, tries_of(group[0], tries))
        if repeated:
            names = ", ".join(str(run.folder) for run in repeated)
            warning = f"left out, since other runs have the same seeds: {names}"
            result = replace(result, warnings=(*result.warnings, warning))
        methods.append(replace(result, again=_trained_again(name, groups)))
    bases = [run.summary["baseline"][metric] for run in runs if "baseline" in run.summary]
    analysis = Analysis(
        metric=metric,
        higher_is_better=metric not in LOWER,
        split=first["split"],
        rows=first["rows"],
        data=first["data"],
        base=", ".join(dict.fromkeys(run.summary["base"] for run in runs)),
        methods=tuple(methods),
        base_score=statistics.mean(bases) if bases else None,
        majority=first.get("majority", {}).get(first["split"]) if metric == "accuracy" else None,
        smallest_difference=None,
        verdict=(),
    )
    scores = {name: [run.by_row for run in group] for name, group in groups.items()}
    return _with_verdict(_with_pareto(_with_statistics(analysis, scores)))


def _method_result(
    name: str, group: Sequence[Run], metric: str, tried: Sequence[Try]
) -> MethodResult:
    """Returns a method's result without what comes from comparing it with others."""
    scores = [run.score(metric) for run in group]
    scored = any(each.score is not None for each in tried)
    search = _search_of(group, tried) if scored else None
    return MethodResult(
        name=name,
        method=group[0].summary["method"],
        folders=tuple(run.folder for run in group),
        summaries=tuple(run.summary for run in group),
        mean=statistics.mean(scores),
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        interval=None,
        versus=(),
        group="",
        pareto=False,
        search=search,
        warnings=_warnings(group, search),
    )


def _search_of(group: Sequence[Run], tried: Sequence[Try]) -> RateSearch:
    """Returns the search, with the rate that the runs have as the chosen one, if it was tried."""
    search, rate = rate_search(tried), group[0].summary["learning_rate"]
    if rate == search.chosen or rate not in [each.rate for each in search.tried]:
        return search
    return replace(
        search, chosen=rate, bracketed=search.tried[0].rate < rate < search.tried[-1].rate
    )


def _trained_again(name: str, groups: Mapping[str, Sequence[Run]]) -> str:
    """Returns the method of which this one is the noise floor; "" if it is a method like others.

    The noise floor has the settings of the other method, and is named after it.
    """

    def settings(of: str) -> dict[str, Any]:
        return {k: v for k, v in without_seed(groups[of][0]).items() if k != "name"}

    own = groups[name][0].name  # without the settings that differ between runs of this name
    named = (other for other in groups if own == AGAIN_NAME.format(groups[other][0].name))
    return next((other for other in named if settings(other) == settings(name)), "")


def rate_search(tries: Sequence[Try]) -> RateSearch:
    """Returns the search with its best rate; of equal ones, that in the middle.

    Only the seeds count that all rates were tried with, so that a lucky one favours none. If a run
    diverged at each rate, the best one has no score. Raises RunError if rates are scored by
    different metrics.
    """
    metrics = {each.metric: each.folder for each in tries if each.metric}
    if len(metrics) > 1:
        (first, run), (second, other) = list(metrics.items())[:2]
        raise RunError(
            f"{run} is scored by {first}, and {other} by {second}: no best rate can be chosen."
            f" Remove {run}, and compare again."
        )
    by_rate: dict[float, dict[int, Try]] = {}  # rate -> seed -> run
    for each in sorted(tries, key=lambda each: each.rate):
        by_rate.setdefault(each.rate, {}).setdefault(each.seed, each)
    common = set.intersection(*map(set, by_rate.values()))
    in_order = []
    for rate, by_seed in by_rate.items():
        kept = [by_seed[seed] for seed in sorted(common or by_seed)]
        metric = next((each.metric for each in kept if each.metric), "")
        scores = tuple(each.score for each in kept)
        in_order.append(TriedRate(rate, scores, metric, tuple(each.folder for each in kept)))
    highest = max(each.better for each in in_order)
    equal = [each for each in in_order if each.better == highest]
    best = equal[(len(equal) - 1) // 2]  # of two the lower one: high rates diverge
    edges = in_order[0].rate, in_order[-1].rate
    return RateSearch(tuple(in_order), best.rate, best.rate not in edges)


def next_rate(search: RateSearch) -> float:
    """Returns the rate to try next: beyond the best one if that is at an edge, else between it and
    its better neighbour."""
    rates = [each.rate for each in search.tried]
    best = rates.index(search.chosen)
    if best == 0:
        return rounded(rates[0] / RATE_STEP)
    if best == len(rates) - 1:
        return rounded(rates[-1] * RATE_STEP)
    above, below = search.tried[best + 1], search.tried[best - 1]
    neighbour = above if above.better >= below.better else below
    return rounded(math.sqrt(search.chosen * neighbour.rate))


def _warnings(group: Sequence[Run], search: RateSearch | None) -> tuple[str, ...]:
    """Returns what a reader should know before trusting the scores of a method."""
    falling = [run for run in group if run.falling]
    warnings = []
    if search and not search.bracketed:
        warnings.append(
            f"not bracketed: the rate of these runs, {search.chosen:g}, is the lowest or the"
            " highest that was tried"
        )
    if search and search.best.rate != search.chosen:
        warnings.append(
            f"the rate {search.best.rate:g} is better on dev than {search.chosen:g}, the rate of"
            " these runs. To use it, remove the runs and compare again"
        )
    if falling:
        warnings.append(
            f"the training loss was still falling at the end of {len(falling)} of {len(group)}"
            " runs: more epochs or a higher rate may help"
        )
    if "accuracy" in group[0].summary["metrics"]:
        split = group[0].summary["split"]
        floors = [
            run for run in group
            if run.score("accuracy") <= run.summary.get("majority", {}).get(split, -1.0)
        ]  # fmt: skip
        if floors:
            warnings.append(
                f"{len(floors)} of {len(group)} runs are no better than always predicting the most"
                " frequent class"
            )
    return tuple(warnings)


def _with_statistics(analysis: Analysis, scores: Mapping[str, list[Any]]) -> Analysis:
    """Adds intervals, differences and groups.

    scores: by method, the scores of the test rows in each of its runs.
    """
    if any(rows is None or len(rows) < 2 for runs in scores.values() for rows in runs):
        return analysis  # no interval is known
    result = bootstrap(scores)
    names, compared = list(scores), references(analysis.methods)
    versus: dict[str, list[Versus]] = {name: [] for name in names}
    for other in compared:
        pairs = [(name, other) for name in names if name != other]
        for (name, _), d in result.differences(pairs).items():
            limits = (d.low, d.high)
            words = difference(name, other, 100 * d.value, d.p, (100 * d.low, 100 * d.high))
            versus[name].append(Versus(other, d.value, limits, d.p, d.test, words))
    every = result.differences()
    shared = groups({m.name: m.mean for m in analysis.methods}, {k: d.p for k, d in every.items()})
    distinct = len(set(shared.values())) > 1 or len(names) > 2
    methods = []
    for method in analysis.methods:
        mean = result.mean(method.name)
        limits = (mean.low, mean.high)
        letters = shared[method.name] if distinct else ""
        methods.append(
            replace(method, interval=limits, versus=tuple(versus[method.name]), group=letters)
        )
    smallest = [d.smallest for d in every.values()]
    return replace(
        analysis,
        methods=tuple(methods),
        smallest_difference=statistics.median(smallest) if smallest else None,
    )


def references(results: Sequence[MethodResult]) -> list[str]:
    """Returns the names of the methods that all others are compared with: LoRA (of several, the one
    of that name, or else the first) and full fine-tuning. The first method if there is neither."""
    chosen = {}
    for method in ("lora", "full"):
        alike = [result.name for result in results if result.method == method]
        if alike:
            chosen[method] = method if method in alike else alike[0]
    return list(chosen.values()) or [results[0].name]


def _with_pareto(analysis: Analysis) -> Analysis:
    """Marks each method that no other one equals in score with fewer trainable parameters."""
    sign = 1 if analysis.higher_is_better else -1

    def beats(other: MethodResult, result: MethodResult) -> bool:
        if other.again:
            return False
        fewer = result.summaries[0]["trainable"] - other.summaries[0]["trainable"]
        better = sign * (other.mean - result.mean)
        return fewer >= 0 and better >= 0 and (fewer > 0 or better > 0)

    return replace(
        analysis,
        methods=tuple(
            replace(
                result,
                pareto=not result.again
                and not any(beats(other, result) for other in analysis.methods),
            )
            for result in analysis.methods
        ),
    )


def _with_verdict(analysis: Analysis) -> Analysis:
    """Adds three sentences: which method is best, whether that is certain, and what it costs.

    If there is one method, only its score.
    """
    best, *others = analysis.contenders
    share = is_share(analysis.metric)
    score = f"{100 * best.mean:.1f} %" if share else f"{best.mean:.4g}"
    spread = ""
    if best.interval and share:
        low, high = (100 * limit for limit in best.interval)
        spread = f" (95 % interval {low:.1f} to {high:.1f} %)"
    what = f"{analysis.split} {analysis.metric}"
    if not others:
        return replace(analysis, verdict=(f"{best.name} has a {what} of {score}{spread}.",))
    leaders = ", ".join(each.name for each in analysis.leaders)
    has = f"{leaders} has" if leaders == best.name else f"{leaders} all have"
    verdict = (
        f"{has} the best {what}: {score}{spread}.",
        _certainty(best, others),
        _cost(best, others),
    )
    return replace(analysis, verdict=verdict)


def _certainty(best: MethodResult, others: Sequence[MethodResult]) -> str:
    """Returns a sentence on whether the best method is better than the others."""
    if not best.group:  # two methods without a difference shown, or untested differences
        pairs = [(result, v) for result in (best, *others) for v in result.versus]
        words = [f"{result.name} against {v.other}: {v.words}" for result, v in pairs]
        return f"{words[0]}." if words else "The differences were not tested."
    alike = [o.name for o in others if set(o.group) & set(best.group)]
    if not alike:
        return "All others are worse by more than chance explains (after Holm's correction)."
    listed = ", ".join(alike)
    return f"No difference to it is shown for {listed} (after Holm's correction)."


def _cost(best: MethodResult, others: Sequence[MethodResult]) -> str:
    """Returns a sentence on the best method's cost, beside that of the smallest one like it."""

    def size(result: MethodResult) -> int:
        return result.summaries[0]["trainable"]

    def described(result: MethodResult) -> str:
        seconds = result.median("train_seconds") or 0.0
        return f"{size(result):,} parameters in {duration(seconds)}"

    alike = [other for other in others if not best.group or set(other.group) & set(best.group)]
    smallest = min(alike or others, key=size)
    sentence = f"{best.name} trains {described(best)}"
    return f"{sentence}; {smallest.name} trains {described(smallest)}."


ANALYSIS = TypeAdapter(Analysis)


def as_json(analysis: Analysis) -> bytes:
    """Returns the content of comparison.json."""
    return ANALYSIS.dump_json(analysis, indent=2)


def read_analysis(path: Path) -> Analysis:
    """Returns the result in a comparison.json. Raises RunError."""
    advice = "Run the same lora compare again."
    return read_document(path, ANALYSIS, RunError, advice)
