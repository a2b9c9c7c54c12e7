"""How long the runs of a comparison take, and what fits into --budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from lora.errors import ConfigError, RunError
from lora.files import locked, read_json, writable, write_whole
from lora.finetune.comparison.grid import FEWEST_SEEDS, MOST_SEEDS, Grid
from lora.finetune.comparison.measure import Cost, measure
from lora.finetune.comparison.schedule import LOCKS, share_of_devices
from lora.finetune.config import RunConfig
from lora.finetune.data.rows import SPLITS
from lora.finetune.estimate import duration
from lora.finetune.inputs import read_corpus
from lora.finetune.record import has_ended

BUDGET_FILE = "budget.json"
MARGIN = 1.15
"""Runs take longer than measured: checkpoints, and other processes."""
UNMEASURED = 5
"""The most runs that start without measuring how long they will take."""
FEWEST_ROWS = {"train": 200, "dev": 300}
"""Rows that a run has at least, even if the budget is short. All of test is always scored."""


@dataclass(frozen=True)
class GridPlan:
    """A comparison whose seeds and rows are decided, and the seconds of its runs.

    rows: of train, dev and test, before a budget limits them. costs: by method; empty if nothing
    was measured.
    """

    grid: Grid
    rows: dict[str, int]
    costs: dict[str, Cost]

    def seconds(self, run: Any) -> float:
        """Returns how long a run will take; 0 if that was not measured."""
        cost = self.costs.get(_key(run))
        if cost is None:
            return 0.0
        limits = {"train": run.limit, "dev": run.dev_limit}  # of each data set
        rows = {
            split: min(count, len(run.data) * (limits.get(split) or count))
            for split, count in self.rows.items()
        }
        return MARGIN * cost.seconds(run, rows)

    def total(self, runs: list[Any]) -> float:
        """Returns how long those of these runs that are left take together."""
        return sum(map(self.seconds, left(runs))) / self.grid.jobs

    def search_runs(self) -> list[Any]:
        grid = self.grid
        return [run for name in grid.searched for run in grid.searches(name)]

    def final_runs(self) -> list[Any]:
        return [run for name in self.grid.methods for run in self.grid.finals(name)]

    def __str__(self) -> str:
        searches, finals = self.search_runs(), self.final_runs()
        runs = searches + finals
        text = f"{len(runs)} runs"
        if searches:
            text += f", {len(searches)} of them to find learning rates"
        if ended := len(runs) - len(left(runs)):
            text += f", {ended} complete"
        if self.costs:
            text += f": about {duration(self.total(runs))}"
        return text


def _key(run: RunConfig[Any]) -> str:
    return run.name or run.method


def left(runs: list[Any]) -> list[Any]:
    """Returns the runs that have not ended."""
    return [run for run in runs if not has_ended(run.run_dir)]


def planned(grid: Grid, say: Callable[[str], None], timed: bool = True) -> GridPlan:
    """Returns the plan of a comparison. Measures the first steps of each method that has runs left
    if there is a budget, or, if `timed`, if there are many such runs.

    Raises ConfigError if the budget is too short, or if a search has no test split to report on.
    """
    started = time.monotonic()
    given, grid = grid, _as_before(grid, say)
    plan = GridPlan(grid, {}, {})
    runs = left(plan.search_runs() + plan.final_runs())
    measured = runs and (grid.budget is not None or (timed and len(runs) > UNMEASURED))
    if not measured and not grid.searched:
        return plan
    corpus = read_corpus(next(iter(given.methods.values())))
    if grid.searched and not corpus.test:
        raise ConfigError(
            f"--rates: {corpus.source} has no test split. Rates are chosen on dev, so the report"
            " needs other rows. Add a test file, or a column 'split'."
        )
    plan = replace(plan, rows={split: len(getattr(corpus, split)) for split in SPLITS})
    to_decide = None if (grid.folder / BUDGET_FILE).exists() else grid.budget
    if measured:
        # A budget that decides on seeds may add runs to any method.
        names = {_key(run) for run in (runs if to_decide is None else grid.methods.values())}
        methods = [run for run in grid.methods.values() if _key(run) in names]
        say(f"measuring the first steps of {len(methods)} methods")
        plan = replace(plan, costs=_costs(methods, grid.jobs, say))
    if to_decide is None or not plan.costs:
        return plan
    fitted = _fitted(plan, to_decide - (time.monotonic() - started))
    if _write_budget(fitted, limited=fitted.grid.methods != plan.grid.methods):
        return fitted
    return replace(plan, grid=_as_before(grid, say))  # another process was first


def _costs(runs: list[Any], jobs: int, say: Callable[[str], None]) -> dict[str, Cost]:
    """Returns what runs of these methods cost, measured with as many at a time as will train.

    One that fails is reported, and its runs are not in the plan. Raises RunError if all fail.
    """
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def cost(run: Any) -> Cost | RunError:
        slot = slots.get()
        try:
            return measure(run, share_of_devices(slot, jobs) if jobs > 1 else {})
        except RunError as error:
            return error
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(cost, runs))
    failed = [each for each in found if isinstance(each, RunError)]
    if len(failed) == len(found):
        raise failed[0]
    for error in failed:
        say(f"note: {error} Its runs are not in the plan.")
    return {_key(run): each for run, each in zip(runs, found) if isinstance(each, Cost)}


def _fitted(plan: GridPlan, budget: float) -> GridPlan:
    """Returns the plan with as many seeds as fit into these seconds, and else with fewer rows of
    train and dev. Raises ConfigError if not even the fewest fit."""
    grid = plan.grid
    counts = [len(grid.seeds)] if grid.seeds_given else range(MOST_SEEDS, FEWEST_SEEDS - 1, -1)
    for count in counts:
        seeds = grid.seeds if grid.seeds_given else tuple(range(count))
        plan = replace(plan, grid=replace(grid, seeds=seeds))
        if _time(plan) <= budget:
            return plan
    low, high = FEWEST_ROWS["train"], plan.rows["train"]
    if high <= low or _time(_with_rows(plan, low)) > budget:
        least = _time(_with_rows(plan, min(low, high)))
        raise ConfigError(
            f"--budget {duration(grid.budget or budget)} is too short: {plan}, and with"
            f" {min(low, high)} training rows about {duration(least)}. Pass a longer one, or fewer"
            " --methods or --seeds."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _time(_with_rows(plan, middle)) <= budget else (low, middle)
    return _with_rows(plan, low)


def _time(plan: GridPlan) -> float:
    """Returns the seconds of all runs. The last ones may not keep all jobs busy."""
    runs = plan.search_runs() + plan.final_runs()
    return plan.total(runs) + max(map(plan.seconds, runs)) * (plan.grid.jobs > 1)


def _with_rows(plan: GridPlan, rows: int) -> GridPlan:
    """Returns the plan with at most this many training rows a run, the same share of dev, and all
    of test."""
    dev = max(plan.rows["dev"] * rows // plan.rows["train"], FEWEST_ROWS["dev"])
    dev = min(dev, plan.rows["dev"])
    sets = len(next(iter(plan.grid.methods.values())).data)  # --limit is of each of them
    limits = max(rows // sets, 1), max(dev // sets, 1)
    return replace(plan, grid=_with_limit(plan.grid, *limits, plan.rows["test"]))


def _with_limit(grid: Grid, train: int, dev: int, test: int) -> Grid:
    # --limit alone would limit test too. Without rows of test, --test-limit stays: it may be 0.
    methods = {
        name: replace(run, limit=train, dev_limit=dev, test_limit=test or run.test_limit)
        for name, run in grid.methods.items()
    }
    return replace(grid, methods=methods)


def _as_before(grid: Grid, say: Callable[[str], None]) -> Grid:
    """Returns the grid with the seeds and rows that were chosen when it began, so that its complete
    runs are used. Raises RunError if the file is damaged."""
    path = grid.folder / BUDGET_FILE
    if grid.budget is None or not path.is_file():
        return grid
    advice = "Remove it to choose again."
    table = read_json(path, RunError, advice)
    try:
        seeds = tuple(map(int, table["seeds"]))
        limits = [int(table[key]) for key in ("train", "dev", "test")] if "train" in table else None
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error!r}. {advice}") from None
    say(f"--budget: the seeds and rows are those of {path}. {advice}")
    grid = replace(grid, seeds=seeds)
    return grid if limits is None else _with_limit(grid, *limits)


def _write_budget(plan: GridPlan, limited: bool) -> bool:
    """Writes the seeds of a plan, and its rows if the budget limits them. Returns False if another
    process has written its own: all that share the folder need the same."""
    grid = plan.grid
    table: dict[str, Any] = {"seeds": list(grid.seeds)}
    run = next(iter(grid.methods.values()))
    if limited:
        table |= {"train": run.limit, "dev": run.dev_limit, "test": plan.rows["test"]}
    with writable(grid.folder, RunError, "Pass another --run-dir."):
        (grid.folder / LOCKS).mkdir(parents=True, exist_ok=True)
        with locked(grid.folder / LOCKS / BUDGET_FILE, wait=True):
            if (grid.folder / BUDGET_FILE).exists():
                return False
            write_whole(grid.folder / BUDGET_FILE, json.dumps(table, indent=2).encode())
    return True


def note_on_rows(plan: GridPlan) -> str:
    """Returns a line on the rows if the budget limits them, else ""."""
    run = next(iter(plan.grid.methods.values()))
    sets = len(run.data)
    if (
        plan.grid.budget is None
        or not plan.rows
        or run.limit is None
        or sets * run.limit >= plan.rows["train"]
    ):
        return ""
    dev = f" and {run.dev_limit:,} of {plan.rows['dev']:,} dev rows" if run.dev_limit else ""
    each = f" of each of {sets} data sets" if sets > 1 else ""
    return (
        f"to fit into the budget, every run has the first {run.limit:,} of"
        f" {plan.rows['train']:,} training rows{dev}{each}"
    )
