"""How long runs take, and what fits into a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from lora.errors import ConfigError, RunError
from lora.finetune.comparison import budget
from lora.finetune.comparison.budget import (
    BUDGET_FILE,
    FEWEST_ROWS,
    GridPlan,
    note_on_rows,
    planned,
)
from lora.finetune.comparison.grid import FEWEST_SEEDS, MOST_SEEDS, parse_compare
from lora.finetune.comparison.measure import Cost

COST = Cost(load=4.0, step=0.1, row=0.01, answer=0.5)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the methods that were measured. Each costs the same."""
    names: list[str] = []

    def measure(run: Any, environment: Any = None) -> Cost:
        names.append(run.name or run.method)
        return replace(COST, answer=0.0)  # a classifier writes nothing

    monkeypatch.setattr(budget, "measure", measure)
    return names


def plan(folder: Path, *flags: str, timed: bool = True) -> GridPlan:
    data = () if "--data" in flags else ("--data", "demo-tiny")
    arguments = [*data, "--run-dir", str(folder), "--epochs", "2", *flags]
    return planned(parse_compare(arguments)[1], lambda line: None, timed)


def test_a_run_costs_its_steps_and_its_evaluations() -> None:
    run = parse_compare(["--epochs", "2", "--batch-size", "10"])[1].finals("lora")[0]
    rows = {"train": 101, "dev": 20, "test": 30}
    run = replace(run, data=("a", "b"), answered=4)
    assert COST.seconds(run, rows) == pytest.approx(4 + 2.2 + 2 * 0.2 + 0.3 + 8 * 0.5)
    search = replace(run, test_limit=0, eval_steps=5, baseline=True, answered=None)
    assert COST.seconds(search, rows) == pytest.approx(4 + 2.2 + 5 * 0.2 + 2 * (0.2 + 20 * 0.5))
    assert replace(COST, answer=0.0).seconds(run, rows) == pytest.approx(4 + 2.2 + 2 * 0.2 + 0.3)


def test_few_runs_start_at_once_and_many_are_measured(measured: list[str], tmp_path: Path) -> None:
    assert plan(tmp_path, "--seeds", "2").costs == {}
    plan(tmp_path, "--rates", "auto", timed=False)  # a dry run
    assert measured == []
    many = plan(tmp_path, "--rates", "auto")
    assert sorted(measured) == ["full", "lora"]
    assert len(many.search_runs()) == 10
    assert len(many.final_runs()) == 6
    assert "16 runs, 10 of them to find learning rates: about " in str(many)
    one = many.seconds(many.final_runs()[0])
    assert many.total(many.final_runs()) == pytest.approx(6 * one)
    halved = GridPlan(replace(many.grid, jobs=2), many.rows, many.costs)
    assert halved.total(many.final_runs()) == pytest.approx(3 * one)


def test_what_has_ended_takes_no_time_and_is_not_measured(
    measured: list[str], tmp_path: Path
) -> None:
    new = plan(tmp_path, "--rates", "auto")
    for run in new.search_runs() + new.final_runs():
        if run.method == "full":
            run.run_dir.mkdir(parents=True)
            (run.run_dir / "diverged.json").write_text("{}")
    measured.clear()
    resumed = plan(tmp_path, "--rates", "auto")
    assert measured == ["lora"]
    assert "16 runs, 10 of them to find learning rates, 8 complete: about " in str(resumed)
    runs = [run for run in resumed.final_runs() if run.method == "lora"]
    assert resumed.total(resumed.final_runs()) == resumed.total(runs) > 0


def test_a_method_that_cannot_be_measured_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are measured at a time have a device each."""
    lines: list[str] = []
    devices = Barrier(2), list[int]()

    def measure(run: Any, environment: dict[str, str]) -> Cost:
        devices[0].wait(20)  # both at a time
        devices[1].append(int(environment["slot"]))
        if run.method in broken:
            raise RunError(f"the first steps of {run.method} failed: no such layer.")
        return COST

    monkeypatch.setattr(budget, "measure", measure)
    monkeypatch.setattr(budget, "share_of_devices", lambda slot, jobs: {"slot": str(slot)})
    broken, flags = {"full"}, ["--rates", "auto", "--jobs", "2", "--data", "demo-tiny"]
    grid = parse_compare([*flags, "--run-dir", str(tmp_path)])[1]
    assert list(planned(grid, lines.append).costs) == ["lora"]
    words = "note: the first steps of full failed: no such layer. Its runs are not in the plan."
    assert words in lines
    assert sorted(devices[1]) == [0, 1]
    broken |= {"lora"}
    with pytest.raises(RunError, match="the first steps of lora failed"):
        planned(grid, lines.append)


def test_the_budget_chooses_the_seeds(measured: list[str], tmp_path: Path) -> None:
    full = plan(tmp_path / "a", "--budget", "10h")
    assert full.grid.seeds == tuple(range(MOST_SEEDS))
    one = full.seconds(full.final_runs()[0])
    four = plan(tmp_path / "b", "--budget", f"{2 * 4.5 * one:.0f}s")
    assert len(four.grid.seeds) == 4
    assert note_on_rows(four) == ""
    given = plan(tmp_path / "c", "--budget", "10h", "--seeds", "2")
    assert given.grid.seeds == (0, 1)


def test_a_short_budget_trains_on_fewer_rows(measured: list[str], tmp_path: Path) -> None:
    whole = plan(tmp_path / "a", "--budget", "10h", "--seeds", "3", "--rates", "auto")
    time = whole.total(whole.search_runs() + whole.final_runs())
    short = plan(
        tmp_path / "b", "--budget", f"{0.8 * time:.0f}s", "--seeds", "3", "--rates", "auto"
    )
    assert short.total(short.search_runs() + short.final_runs()) <= 0.8 * time
    (limit,) = {run.limit for run in short.final_runs()}
    assert limit is not None
    assert len(short.grid.seeds) == FEWEST_SEEDS
    rows = short.rows
    ((dev, test),) = {(run.dev_limit, run.test_limit) for run in short.final_runs()}
    assert test == rows["test"]
    assert dev == min(rows["dev"], max(FEWEST_ROWS["dev"], rows["dev"] * limit // rows["train"]))
    assert {run.test_limit for run in short.search_runs()} == {0}
    note = f"the first {limit:,} of {rows['train']:,} training rows and {dev:,} of"
    assert note in note_on_rows(short)
    # The same command again makes the same runs, whatever is measured then.
    flags = ("--budget", "10h", "--seeds", "3", "--rates", "auto")
    assert plan(tmp_path / "b", *flags).final_runs() == [
        replace(run, run_dir=run.run_dir) for run in short.final_runs()
    ]
    assert note in note_on_rows(plan(tmp_path / "b", *flags))
    (tmp_path / "b" / BUDGET_FILE).write_text(json.dumps({"seeds": ["x"]}))
    with pytest.raises(RunError, match="is damaged"):
        plan(tmp_path / "b", *flags)
    with pytest.raises(ConfigError, match="budget 20 s is too short"):
        plan(tmp_path / "c", "--budget", "20s", "--rates", "auto")
    assert not (tmp_path / "c").exists()


def test_limits_of_the_user_stay_as_they_are(measured: list[str], tmp_path: Path) -> None:
    """The same command again makes the same runs, and no budget brings back the test split."""
    flags = ("--limit", "400", "--budget", "10h", "--seeds", "3")
    first, again = (plan(tmp_path / "a", *flags).final_runs() for _ in range(2))
    assert first == again
    assert {(run.limit, run.dev_limit, run.test_limit) for run in first} == {(400, None, None)}
    whole = plan(tmp_path / "b", "--test-limit", "0", "--budget", "10h", "--seeds", "3")
    short = f"{0.8 * whole.total(whole.final_runs()):.0f}s"
    flags = ("--test-limit", "0", "--budget", short, "--seeds", "3")
    for _ in range(2):
        runs = plan(tmp_path / "c", *flags).final_runs()
        assert {run.test_limit for run in runs} == {0}
        assert all(run.limit < whole.rows["train"] for run in runs)


def test_a_limit_is_of_each_data_set(measured: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = (f'{{"prompt": "{name} {i}?", "response": "yes"}}\n' for i in range(1000))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    arguments = ["--data", *paths, "--base", "demo-lm-tiny", "--task", "text", "--seeds", "3"]

    def planned_in(folder: str, *flags: str) -> GridPlan:
        every = [*arguments, "--run-dir", str(tmp_path / folder), "--budget", *flags]
        return planned(parse_compare(every)[1], lambda line: None)

    whole = planned_in("x", "10h")
    assert whole.rows["train"] == 1600
    time = whole.total(whole.final_runs())
    short = planned_in("y", f"{0.8 * time:.0f}s")
    (limit,) = {run.limit for run in short.final_runs()}
    assert limit is not None
    assert 400 < limit < 700
    assert f"the first {limit:,} of 1,600 training rows" in note_on_rows(short)
    assert note_on_rows(short).endswith("of each of 2 data sets")
    own = planned_in("z", "10h", "--limit", "400")
    assert own.seconds(own.final_runs()[0]) < whole.seconds(whole.final_runs()[0])


def test_the_time_of_measuring_is_in_the_budget(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(tmp_path / "a", "--budget", "10h", "--seeds", "2")
    time = whole.total(whole.final_runs())
    clock = iter((0.0, 0.5 * time))
    monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
    short = plan(tmp_path / "b", "--budget", f"{1.2 * time:.0f}s", "--seeds", "2")
    assert short.total(short.final_runs()) <= 0.7 * time + 1


def test_a_process_that_planned_later_takes_the_plan_of_the_first(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Any] = []
    fitted = budget._fitted

    def while_another_plans(of: GridPlan, seconds: float) -> GridPlan:
        if not first:
            monkeypatch.setattr(budget, "_fitted", fitted)
            first.append(plan(tmp_path / "c", "--budget", "10h"))
        return fitted(of, seconds / 300)

    monkeypatch.setattr(budget, "_fitted", while_another_plans)
    second = plan(tmp_path / "c", "--budget", "10h")
    assert second.final_runs() == first[0].final_runs()


def test_without_a_test_split_dev_is_scored(measured: list[str], tmp_path: Path) -> None:
    for split in ("train", "dev"):
        lines = [f"good {i}\t1\nbad {i}\t0\n" for i in range(300)]
        (tmp_path / f"{split}.tsv").write_text("".join(["text\tlabel\n", *lines]))
    flags = ("--data", str(tmp_path), "--seeds", "1")
    whole = plan(tmp_path / "a", "--budget", "10h", *flags)
    time = whole.total(whole.final_runs())
    short = plan(tmp_path / "b", "--budget", f"{0.9 * time:.0f}s", *flags)
    assert {run.test_limit for run in short.final_runs()} == {None}
    assert all(run.limit < 600 for run in short.final_runs())
    assert note_on_rows(GridPlan(short.grid, {}, {})) == ""  # if all runs are complete


def test_a_search_needs_a_test_split(measured: list[str], tmp_path: Path) -> None:
    for split in ("train", "dev"):
        lines = [f"good {i}\t1\nbad {i}\t0\n" for i in range(20)]
        (tmp_path / f"{split}.tsv").write_text("".join(["text\tlabel\n", *lines]))
    with pytest.raises(ConfigError, match="has no test split. Rates are chosen on dev"):
        plan(tmp_path / "c", "--data", str(tmp_path), "--rates", "auto")
