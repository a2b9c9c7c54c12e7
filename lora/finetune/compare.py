"""`lora compare`: methods × learning rates × seeds on one base and one data set, and one table.

With --rates, the learning rate of each method is first searched on the dev split. The runs that are
reported have other seeds, and only they see the test split. The same command continues an
interrupted comparison.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import RunError, command
from lora.files import writable, write_together
from lora.finetune.comparison.analysis import (
    Analysis,
    RateSearch,
    analyse,
    as_json,
    next_rate,
    rate_search,
)
from lora.finetune.comparison.budget import GridPlan, note_on_rows, planned
from lora.finetune.comparison.grid import TRIED, Grid
from lora.finetune.comparison.matched import with_matched_ranks
from lora.finetune.comparison.runs import read_try
from lora.finetune.comparison.schedule import Outcome, Scheduler, title, train_command
from lora.finetune.comparison.standing import standing
from lora.finetune.comparison.tables import all_tables
from lora.finetune.config import read_toml
from lora.finetune.data.included import resolved, resolved_with_note

MORE_RATES = 3
"""How many rates of every method a search adds at most while the best of one is at an edge."""


@dataclass(frozen=True)
class Compared:
    """The result of a comparison."""

    analysis: Analysis
    folders: tuple[Path, ...]  # of the runs that are reported
    missing: tuple[str, ...]  # runs that failed, and reported ones for which no time was left


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compare(grid: Grid) -> Compared:
    """Run what is not complete. Returns the result, and writes it to the comparison's folder.

    Raises RunError if there is nothing to report in the end, and StoppedError after a signal.
    """
    started = time.monotonic()
    plan = prepared(grid)
    grid = plan.grid
    _tell(", ".join(filter(None, (str(plan), note_on_rows(plan)))))
    finals = plan.total(plan.final_runs())
    deadline = None if grid.budget is None else started + grid.budget
    searched = None if deadline is None else deadline - finals
    searching = Scheduler(grid.folder, grid.jobs, deadline, plan.seconds, _tell, searched)
    searches, outcome = _search(grid, searching)
    runs = _in_order_of_seeds(grid, searches)
    reported = Scheduler(grid.folder, grid.jobs, deadline, plan.seconds, _tell).train(runs)
    folders = [run.run_dir for run in runs if run in reported.complete]
    _tell_of_others(grid.folder, [run.run_dir for run in runs])
    tried = [run for search in searches.values() for each in search.tried for run in each.runs]
    analysis = analyse([*folders, *tried])
    with writable(grid.folder, RunError, "Pass another --run-dir."):
        files = {
            "comparison.json": as_json(analysis),
            "comparison.md": all_tables(analysis).encode(),
        }
        write_together(grid.folder, files)
    missing = [f"{name}: no rate has a score" for name in grid.searched if name not in searches]
    missing += _missing(outcome, reported)
    return Compared(analysis, tuple(folders), tuple(missing))


def _tell_of_others(folder: Path, runs: Sequence[Path]) -> None:
    """Print a note if the folder has complete runs that are not in the tables."""
    others = [each.parent for each in folder.glob("*/summary.json") if each.parent not in runs]
    if others:
        names = ", ".join(sorted(each.name for each in others)[:3])
        more = ", ..." if len(others) > 3 else ""
        _tell(
            f"note: {len(others)} other runs in {folder} are not in the tables: {names}{more}. Name"
            f" their methods and seeds too, or run {command('lora', 'report', folder)}."
        )


def _missing(searched: Outcome, reported: Outcome) -> list[str]:
    """Returns the runs that the user asked for and did not get. Rates that were not tried for lack
    of time are none of them: a budget says how many there is time for."""
    for run in searched.left:
        _tell(f"note: {title(run)} was not tried for lack of time. The same command tries it.")
    failed = []
    for run in searched.failed + reported.failed:
        diverged = standing(run) == "diverged"
        again = f"; to train it again, remove {run.run_dir}"
        failed.append(f"{title(run)} {f'diverged{again}' if diverged else 'failed'}")
    return failed + [f"{title(run)} was left for lack of time" for run in reported.left]


def report_missing(result: Compared) -> None:
    """Raise RunError if a run is missing."""
    if result.missing:
        runs = "1 run is" if len(result.missing) == 1 else f"{len(result.missing)} runs are"
        raise RunError(f"{runs} missing: {', '.join(result.missing)}. Run the same command again.")


def prepared(grid: Grid, timed: bool = True) -> GridPlan:
    """Returns the plan: data sets resolved, ranks matched, seeds and rows decided, and, if `timed`,
    how long it will take."""
    data = dict.fromkeys(source for run in grid.methods.values() for source in run.data)
    for note in dict.fromkeys(note for source in data for note in resolved_with_note(source)[1]):
        _tell(f"note: {note}.")
    # All runs train on the same data, even if `demo` gets another meaning meanwhile.
    methods = {n: replace(r, data=tuple(map(resolved, r.data))) for n, r in grid.methods.items()}
    grid = replace(grid, methods=methods)
    if grid.match_parameters:
        grid = with_matched_ranks(grid, _tell)
    return planned(grid, _tell, timed)


def dry_run(grid: Grid) -> list[str]:
    """Returns the commands of the runs that are left: of the search, or, if it is complete, of the
    runs that are reported. Raises ConfigError."""
    plan = prepared(grid, timed=False)
    _tell(", ".join(filter(None, (str(plan), note_on_rows(plan)))))
    searches, outcome = _search(plan.grid, OnDisk())
    if left := outcome.left:
        _tell("the commands are those that find the learning rates. Run them, then this one again.")
    else:
        left = OnDisk().train(_in_order_of_seeds(plan.grid, searches)).left
    return [train_command(run, standing(run)) for run in left]


class OnDisk:
    """Takes the place of a Scheduler, and trains nothing: runs that have not ended are left."""

    def train(self, runs: Sequence[Any]) -> Outcome:
        outcome = Outcome()
        ended = {"complete": outcome.complete, "diverged": outcome.failed}
        for run in runs:
            ended.get(standing(run), outcome.left).append(run)
        return outcome

    def too_late(self, runs: Sequence[Any]) -> bool:
        return False


def _in_order_of_seeds(grid: Grid, searches: dict[str, RateSearch]) -> list[Any]:
    """Returns the runs that are reported: a seed of every method before the next seed, so that all
    methods have the same seeds if time runs out."""
    rates: dict[str, float | None] = dict.fromkeys(grid.methods)
    if grid.searched:
        rates = {name: _rate_of(grid, name, search) for name, search in searches.items()}
        if grid.again and grid.searched[0] in rates:
            rates[grid.again] = rates[grid.searched[0]]
    by_method = [grid.finals(name, rate) for name, rate in rates.items()]
    return [run for runs in zip(*by_method, strict=True) for run in runs]


def _rate_of(grid: Grid, name: str, search: RateSearch) -> float:
    """Returns the rate that a method's reported runs began with, or the best if none has begun.

    Another method's search may have widened this one's since, and have found a better rate.
    """
    for run in grid.finals(name):
        if (run.run_dir / "config.toml").is_file():
            rate = read_toml(run.run_dir / "config.toml").get("learning_rate")
            if rate in [each.rate for each in search.tried]:
                return float(rate)
    return search.chosen


def _search(grid: Grid, schedule: Scheduler | OnDisk) -> tuple[dict[str, RateSearch], Outcome]:
    """Train the runs that find each method's rate. Returns the searches of the methods of which at
    least one run is complete, and what became of the runs.

    Every method gets the same number of rates. If the best rate of one is the lowest or the
    highest, each gets one more, until it has MORE_RATES more than at the beginning.
    """
    runs = {name: grid.searches(name) for name in grid.searched}
    outcome, searches, ended = Outcome(), dict[str, RateSearch](), list[Any]()
    # Bounded: a rate that fails, or is one that was tried, does not bring a method to the others.
    for _ in range(1 + 2 * MORE_RATES if runs else 0):
        # The rates in the middle first: if time runs out, they are the most useful.
        columns = itertools.zip_longest(*runs.values())
        rates = max(map(len, runs.values())) // len(grid.search_seeds)
        by_rate = sorted(
            enumerate(columns), key=lambda i: (i[0] // rates, abs(i[0] % rates - TRIED // 2))
        )
        now = schedule.train(
            [r for _, column in by_rate for r in column if r not in [None, *ended]]
        )
        outcome.complete += now.complete
        outcome.failed += now.failed  # not tried again with the next rate
        outcome.left += now.left
        ended = outcome.complete + outcome.failed
        complete = {n: r for n, r in runs.items() if any(run in outcome.complete for run in r)}
        found = {n: _searched([r for r in each if r in ended]) for n, each in complete.items()}
        # Without the methods of which a seed diverged at each rate.
        searches = {n: each for n, each in found.items() if each.best.score is not None}
        counts = {name: len(runs[name]) // len(grid.search_seeds) for name in searches}
        reason, names = ("", []) if outcome.left else _to_widen(grid, searches, counts)
        if not names:
            break
        wider = {name: _with_next_rate(grid, name, searches[name]) for name in names}
        if schedule.too_late([run for name in wider for run in wider[name] if run not in ended]):
            _tell(f"{reason}, and the budget leaves no time for one more rate")
            break
        _tell(f"{reason}: one more rate for {', '.join(names)}")
        runs |= wider
    return searches, outcome


def _to_widen(
    grid: Grid, searches: dict[str, RateSearch], counts: dict[str, int]
) -> tuple[str, list[str]]:
    """Returns why methods get one more rate, and which: those with fewer than another has, or all
    if a best rate is at an edge; none if the user gave the rates."""
    most = max(counts.values(), default=0)
    if grid.rates is not None:
        return "", []
    if fewer := [name for name, count in counts.items() if count < most]:
        return f"fewer rates of {', '.join(fewer)} were tried than of others", fewer
    edges = [name for name, search in searches.items() if not search.bracketed]
    if not edges or most >= TRIED + MORE_RATES:
        return "", []
    return f"the best rate of {', '.join(edges)} is at an edge", list(searches)


def _with_next_rate(grid: Grid, name: str, search: RateSearch) -> list[Any]:
    """Returns the runs of a method's search with one more rate."""
    return grid.searches(name, sorted([*(each.rate for each in search.tried), next_rate(search)]))


def _searched(runs: Sequence[Any]) -> RateSearch:
    """Returns the search that these runs of one method made, without those that failed in another
    way than by diverging."""
    return rate_search(list(filter(None, (read_try(run.run_dir) for run in runs))))
