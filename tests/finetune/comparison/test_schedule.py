"""Runs of a comparison: in processes of their own, each once, whatever ends in between.

A small program stands in for `lora train`: it writes the files of a run in a moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lora.errors import RunError, StoppedError
from lora.files import locked
from lora.finetune.compare import (
    MORE_RATES,
    Compared,
    OnDisk,
    _missing,
    _rate_of,
    _search,
    report_missing,
)
from lora.finetune.comparison import schedule
from lora.finetune.comparison.analysis import _search_of, _warnings, rate_search
from lora.finetune.comparison.grid import TRIED, parse_compare
from lora.finetune.comparison.runs import Run, Try
from lora.finetune.comparison.schedule import (
    LOCKS,
    Outcome,
    Scheduler,
    share_of_cores,
    title,
    train_command,
)
from lora.finetune.comparison.standing import standing

PROGRAM = """
import json, os, pathlib, signal, sys, time, tomllib
import tomli_w
arguments = sys.argv[1:]
behaviour = os.environ.get("BEHAVIOUR", "")
if arguments[0] == "--resume":
    run = pathlib.Path(arguments[1])
    table = tomllib.loads((run / "config.toml").read_text())
else:
    table = tomllib.loads(pathlib.Path(arguments[1]).read_text())
    run = pathlib.Path(arguments[3])
    run.mkdir(parents=True)
    resolved = {"task": "classification", "labels": ["0", "1"], "max_length": 8, "dtype": "float32"}
    if "learning_rate" not in table:
        resolved["learning_rate"] = 0.1
    asked = {key: table.get(key) for key in resolved}
    environment = {"data": "", "tokens": "", "note": "", "asked": asked}
    (run / "environment.json").write_text(json.dumps(environment))
    table |= resolved
    (run / "config.toml").write_text(tomli_w.dumps(table))
with open(os.environ["STARTED"], "a") as file:
    file.write(f"{run.name} {os.environ.get('OMP_NUM_THREADS', '')}\\n")
if f"{run.name}:diverges" in behaviour.split():
    (run / "diverged.json").write_text("{}")
if run.name in behaviour.replace(":diverges", "").split():
    sys.exit(2)
if behaviour == f"{run.name}:after:lora-0":
    end = time.monotonic() + 60
    while not (run.parent / "lora-0" / "summary.json").is_file():
        time.sleep(0.05)
        if time.monotonic() > end:
            sys.exit(2)
if "wait" in behaviour:
    signal.signal(signal.SIGTERM, lambda *ignored: sys.exit(143))
    time.sleep(60)
copied = {key: table[key] for key in ("method", "seed", "learning_rate")}
summary = json.loads(os.environ["SUMMARY"]) | copied
summary["metrics"] = {"accuracy": 0.5 - table["learning_rate"] / 10}
(run / "summary.json").write_text(json.dumps(summary))
if "linger" in behaviour:
    time.sleep(60)
"""
SUMMARY = {
    "task": "classification", "base": "b", "data": "d", "note": "", "trainable": 1,
    "adapter_parameters": 1, "parameters": 2, "learning_rate": 0.1, "step": 1, "split": "test",
    "rows": 4, "loss": 1.0, "metrics": {"accuracy": 0.5}, "train_seconds": 1.0, "seconds": 1.0,
    "peak_bytes": 1, "evaluations": [
        {"step": 1, "epoch": 1.0, "loss": 1.0, "seconds": 1.0, "padding": 0.0, "dev_loss": 1.0,
         "dev": {"accuracy": 0.5}},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the file in which each start of the stand-in leaves a line."""
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, str(path)))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("SUMMARY", json.dumps(SUMMARY))
    return tmp_path / "started"


def runs_of(folder: Path, *flags: str) -> list[Any]:
    flags = ("--run-dir", str(folder), *(flags or ("--methods", "lora", "full", "--seeds", "2")))
    grid = parse_compare(flags)[1]
    return [run for name in grid.methods for run in grid.finals(name)]


def searched_by_lora(folder: Path) -> tuple[Any, dict[str, Any], Outcome]:
    """Returns a grid of one method whose rates are searched, and what the search comes to."""
    flags = ("--run-dir", str(folder), "--methods", "lora", "--rates", "auto")
    grid = parse_compare(flags)[1]
    return grid, *_search(grid, Scheduler(folder))


def starts(started: Path) -> list[str]:
    return [line.split()[0] for line in started.read_text().splitlines()]


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_run_is_made_once(jobs: int, program: Path, tmp_path: Path) -> None:
    runs, lines = runs_of(tmp_path / "c"), list[str]()
    outcome = Scheduler(tmp_path / "c", jobs, say=lines.append).train(runs)
    assert sorted(starts(program)) == ["full-0", "full-1", "lora-0", "lora-1"]
    assert [run.run_dir.name for run in outcome.complete if run in runs]
    assert len(outcome.complete) == 4
    again = Scheduler(tmp_path / "c", jobs, say=lines.append).train(runs)
    assert len(starts(program)) == 4
    assert len(again.complete) == 4
    assert sum("already complete" in line for line in lines) == 4


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "lora-1")
    runs, lines = runs_of(tmp_path / "c"), list[str]()
    outcome = Scheduler(tmp_path / "c", 2, say=lines.append).train(runs)
    assert [run.run_dir.name for run in outcome.failed] == ["lora-1"]
    assert len(outcome.complete) == 3
    assert any("lora, seed 1 failed with exit code 2. See " in line for line in lines)
    monkeypatch.setenv("BEHAVIOUR", "")
    outcome = Scheduler(tmp_path / "c", say=lines.append).train(runs)  # resumed
    assert not outcome.failed
    assert starts(program).count("lora-1") == 2
    assert "[2/4] lora, seed 1: interrupted, resuming" in lines


def test_another_folder_is_named_before_anything_is_started(program: Path, tmp_path: Path) -> None:
    Scheduler(tmp_path / "c").train(runs_of(tmp_path / "c", "--methods", "full"))
    changed = runs_of(tmp_path / "c", "--methods", "lora", "full", "--epochs", "9")
    with pytest.raises(RunError, match="full-0 holds a run with other settings"):
        Scheduler(tmp_path / "c").train(changed)
    assert starts(program) == ["full-0"]


def test_a_run_that_another_process_makes_is_waited_for(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its lock outlives a comparison that is killed: the run's process inherits it."""
    monkeypatch.setattr(schedule, "POLL", 0.01)
    (tmp_path / "c" / LOCKS).mkdir(parents=True)
    with locked(tmp_path / "c" / LOCKS / "lora-0") as lock:
        assert lock is not None
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting for 1 of"):
            threading.Timer(1.2, child.kill).start()

    outcome = Scheduler(tmp_path / "c", say=say).train(runs_of(tmp_path / "c"))
    child.wait()
    assert len(outcome.complete) == 4
    assert starts(program)[-1] == "lora-0"
    assert sum(line.startswith("waiting for") for line in lines) == 1


def test_a_run_with_a_damaged_summary_is_made_again(program: Path, tmp_path: Path) -> None:
    runs = runs_of(tmp_path / "c", "--methods", "lora")
    Scheduler(tmp_path / "c").train(runs)
    path = runs[0].run_dir / "summary.json"
    whole = path.read_text()
    path.write_text(whole[:20])
    assert standing(runs[0]) == "interrupted"
    assert path.is_file()  # who asks removes nothing: another process may be writing it
    assert Scheduler(tmp_path / "c").train(runs).complete == runs
    assert path.read_text() == whole
    assert len(starts(program)) == 2


def test_a_run_is_taken_over_while_another_trains(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that made it was killed: no slot stays idle until the other run ends."""
    monkeypatch.setattr(schedule, "POLL", 0.01)
    monkeypatch.setenv("BEHAVIOUR", "lora-1:after:lora-0")
    (tmp_path / "c" / LOCKS).mkdir(parents=True)
    with locked(tmp_path / "c" / LOCKS / "lora-0") as lock:
        assert lock is not None
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])

    def say(line: str) -> None:
        if line.startswith("[2/2]"):
            child.kill()
            child.wait()

    runs = runs_of(tmp_path / "c", "--methods", "lora", "--seeds", "2")
    outcome = Scheduler(tmp_path / "c", 2, say=say).train(runs)
    assert not outcome.failed
    assert sorted(starts(program)) == ["lora-0", "lora-1"]


def test_runs_that_would_end_too_late_are_left(program: Path, tmp_path: Path) -> None:
    seconds = {"lora-0": 5.0, "lora-1": 1000.0, "full-0": 5.0, "full-1": 1000.0}
    schedule_ = Scheduler(
        tmp_path / "c", 1, time.monotonic() + 100, lambda run: seconds[run.run_dir.name]
    )
    outcome = schedule_.train(runs_of(tmp_path / "c"))
    assert [run.run_dir.name for run in outcome.left] == ["lora-1", "full-1"]
    assert starts(program) == ["lora-0", "full-0"]


def test_a_run_is_stopped_at_the_deadline(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "wait")
    outcome = Scheduler(tmp_path / "c", 2, time.monotonic() + 1.0).train(runs_of(tmp_path / "c"))
    assert len(outcome.left) == 4
    assert not outcome.failed


def test_a_run_that_the_deadline_meets_as_it_exits_is_complete(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "linger")
    runs = runs_of(tmp_path / "c", "--methods", "lora")
    schedule_, outcomes = Scheduler(tmp_path / "c"), list[Any]()
    thread = threading.Thread(target=lambda: outcomes.append(schedule_.train(runs)))
    thread.start()
    while not (runs[0].run_dir / "summary.json").is_file():
        time.sleep(0.02)
    schedule_.deadline = time.monotonic()
    thread.join()
    assert [outcome.complete for outcome in outcomes] == [runs]


@pytest.mark.parametrize(("time_for", "tried"), [(3, 3), (TRIED, TRIED), (100, TRIED + MORE_RATES)])
def test_a_search_ends_with_the_rates_for_which_there_was_time(
    time_for: int, tried: int, program: Path, tmp_path: Path
) -> None:
    """The stand-in scores the lowest rate best, so that the grid would be widened."""
    flags = ("--run-dir", str(tmp_path / "c"), "--methods", "lora", "--rates", "auto")
    lines: list[str] = []
    begun, now = time.monotonic(), 1000.0
    schedule_ = Scheduler(
        tmp_path / "c", 1, begun + 10_000, lambda run: now, lines.append,
        begun + now * time_for + now / 2,
    )  # fmt: skip

    def clock() -> float:  # the runs take as long as is planned
        done = (tmp_path / "c" / "search").glob("*/summary.json")
        return begun + now * len(list(done))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.finetune.comparison.schedule.time.monotonic", clock)
        searches, outcome = _search(parse_compare(flags)[1], schedule_)
    assert len(searches["lora"].tried) == tried
    assert len(outcome.left) == max(0, TRIED - time_for)
    assert not outcome.failed


def test_a_rate_without_time_is_a_note_and_a_seed_without_time_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = runs_of(tmp_path)
    missing = _missing(Outcome(left=[first]), Outcome())
    assert missing == []
    assert f"note: {title(first)} was not tried for lack of time." in capsys.readouterr().err
    missing = _missing(Outcome(failed=[first]), Outcome(left=[second]))
    assert missing == [f"{title(first)} failed", f"{title(second)} was left for lack of time"]
    analysis: Any = None
    report_missing(Compared(analysis, (), ()))
    for count, says in ((1, "1 run is missing"), (2, "2 runs are missing")):
        with pytest.raises(RunError, match=says):
            report_missing(Compared(analysis, (), tuple(missing[:count])))


def test_a_signal_stops_the_comparison_after_its_runs(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "wait")
    stopped: list[Any] = []
    begin = Scheduler._begin

    def begin_then_stop(self: Scheduler, *arguments: Any) -> Any:
        active = begin(self, *arguments)
        while not program.exists():
            time.sleep(0.01)
        time.sleep(0.2)  # until it handles signals
        active.process.terminate()
        stopped.append(active)
        return active

    monkeypatch.setattr(Scheduler, "_begin", begin_then_stop)
    with pytest.raises(StoppedError, match="run the same command again to continue"):
        Scheduler(tmp_path / "c").train(runs_of(tmp_path / "c"))
    assert len(stopped) == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_the_cores_are_divided_among_the_runs(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule.psutil.Process, "cpu_affinity", lambda self: [1, 3, 4, 6, 7])
    assert [share_of_cores(slot, 2) for slot in range(2)] == [[1, 3], [4, 6]]
    assert [share_of_cores(slot, 8) for slot in range(6)] == [[1], [3], [4], [6], [7], [1]]
    monkeypatch.setattr(schedule, "_pin", lambda process, cores: None)
    Scheduler(tmp_path / "c", 2).train(runs_of(tmp_path / "c"))
    assert {line.split()[1] for line in program.read_text().splitlines()} == {"2"}


def test_a_dry_run_finds_the_search_at_its_end_and_resumes_what_was_interrupted(
    program: Path, tmp_path: Path
) -> None:
    """The search that it finds on disk is the one that was made, with the rates that were added."""
    flags = ("--run-dir", str(tmp_path / "c"), "--methods", "lora", "--rates", "auto")
    grid = parse_compare(flags)[1]
    searches, outcome = _search(grid, OnDisk())
    assert (searches, len(outcome.left)) == ({}, TRIED)
    searches, _ = _search(grid, Scheduler(tmp_path / "c"))
    added, *others = searches["lora"].tried
    assert len(others) == TRIED + MORE_RATES - 1
    found, outcome = _search(grid, OnDisk())
    assert (found, outcome.left) == (searches, [])
    (added.runs[0] / "summary.json").unlink()
    found, outcome = _search(grid, OnDisk())
    (left,) = outcome.left
    assert (list(found["lora"].tried), left.run_dir) == (others, added.runs[0])
    resume = train_command(left, standing(left)).split()
    assert resume == ["lora", "train", "--resume", str(left.run_dir)]


def test_a_comparison_of_fewer_methods_keeps_the_rates_that_another_added(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a new method gets as many as the others have."""
    flags = ("--run-dir", str(tmp_path / "c"), "--rates", "auto", "--methods")
    both = parse_compare([*flags, "lora", "full"])[1]
    searches, _ = _search(both, Scheduler(tmp_path / "c"))  # both are widened
    program.unlink()
    for methods in (["full"], ["full", "lora", "bitfit"]):
        grid = parse_compare([*flags, *methods])[1]
        again, outcome = _search(grid, Scheduler(tmp_path / "c"))
        assert again["full"] == searches["full"]
        assert not outcome.left
    assert {len(search.tried) for search in again.values()} == {TRIED + MORE_RATES}
    assert len(starts(program)) == TRIED + MORE_RATES
    assert all(start.startswith("bitfit-") for start in starts(program))


def test_reported_runs_keep_their_rate(tmp_path: Path) -> None:
    """Another method may widen the search later: rows that are there stay, and say so."""
    flags = ("--run-dir", str(tmp_path), "--methods", "lora", "--rates", "auto")
    grid = parse_compare(flags)[1]
    scores = {0.001: 0.7, 0.002: 0.8, 0.005: 0.9, 0.01: 0.6}
    tried = [Try(tmp_path, rate, 1000, score, "accuracy") for rate, score in scores.items()]
    search = rate_search(tried)
    assert _rate_of(grid, "lora", search) == search.chosen == 0.005
    (tmp_path / "lora-0").mkdir()
    for rate, kept in ((0.002, 0.002), (0.3, 0.005)):  # one of another comparison is refused later
        (tmp_path / "lora-0" / "config.toml").write_text(f"learning_rate = {rate}")
        assert _rate_of(grid, "lora", search) == kept
    summary: Any = {"learning_rate": 0.002, "metrics": {"accuracy": 0.5}, "split": "test"}
    run = Run(tmp_path, summary)
    shown = _search_of([run], tried)
    assert (shown.chosen, shown.best.rate, shown.bracketed) == (0.002, 0.005, True)
    (warning,) = _warnings([run], shown)
    assert "the rate 0.005 is better on dev than 0.002, the rate of these runs" in warning


def test_a_rate_that_diverged_is_not_tried_again(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in scores the lowest rate best, so that the grid is widened."""
    monkeypatch.setenv("BEHAVIOUR", "lora-0.0046:diverges")
    grid, searches, outcome = searched_by_lora(tmp_path / "c")
    assert len(starts(program)) == len(set(starts(program))) == TRIED + MORE_RATES
    assert [run.run_dir.name for run in outcome.failed] == ["lora-0.0046"]
    assert [t.rate for t in searches["lora"].tried if t.score is None] == [0.0046]
    assert not searches["lora"].bracketed
    for schedule_ in (Scheduler(tmp_path / "c"), OnDisk()):  # neither trains it again
        found, again = _search(grid, schedule_)
        assert (found, again.left, again.failed) == (searches, [], outcome.failed)
    assert len(starts(program)) == TRIED + MORE_RATES
    (missing,) = _missing(outcome, Outcome())
    folder = tmp_path / "c" / "search" / "lora-0.0046"
    assert missing == f"lora, rate 0.0046 diverged; to train it again, remove {folder}"


def test_a_method_that_diverges_at_every_rate_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two seeds diverges at each rate, so that no rate has a score."""
    flags = ("--run-dir", str(tmp_path / "c"), "--methods", "lora", "bitfit", "--rates", "auto")
    grid = parse_compare([*flags, "--search-seeds", "2"])[1]
    rates = [run.run_dir.name for run in grid.searches("lora")[:TRIED]]
    monkeypatch.setenv("BEHAVIOUR", " ".join(f"{name}:diverges" for name in rates))
    searches, _ = _search(grid, Scheduler(tmp_path / "c"))
    assert list(searches) == ["bitfit"]


def test_a_rate_whose_run_broke_says_nothing_of_the_rate(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "lora-0.0046")
    grid, searches, outcome = searched_by_lora(tmp_path / "c")
    assert [run.run_dir.name for run in outcome.failed] == ["lora-0.0046"]
    assert 0.0046 not in [each.rate for each in searches["lora"].tried]
    monkeypatch.setenv("BEHAVIOUR", "")
    searches, _ = _search(grid, Scheduler(tmp_path / "c"))
    assert 0.0046 in [each.rate for each in searches["lora"].tried]


def test_after_the_deadline_no_other_process_is_waited_for(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "POLL", 0.01)
    folder = tmp_path / "c"
    runs = runs_of(folder)
    (folder / LOCKS).mkdir(parents=True)
    with locked(folder / LOCKS / "lora-0"):
        outcome = Scheduler(folder, deadline=time.monotonic() + 5).train(runs)
    assert outcome.left == runs[:1]
    assert len(outcome.complete) == 3
