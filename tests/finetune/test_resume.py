"""`lora train` killed, interrupted, out of disk: it goes on, to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)
from test_files import a_full_disk

from lora.finetune import state
from lora.finetune.run_folder import is_locked

FLAGS = ("--epochs", 3, "--batch-size", 8, "--r", 2, "--lora-dropout", 0.1, "--save-steps", 2,
         "--learning-rate", 0.01, "--micro-batch-size", 5, "--class-weights", 0, 3,
         "--label-smoothing", 0.1)  # fmt: skip


def sigterm_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Lets this process get SIGTERM once a run has recorded the step."""
    import lora.finetune.run as room

    real = room.Record.step

    def record(self: Any, done: Any) -> None:
        real(self, done)
        if done.step == step:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(room.Record, "step", record)


TIMES = {
    "seconds", "train_seconds", "tokens_per_second", "peak_bytes", "training_bytes",
    "process_bytes", "time", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:  # noqa: F811
    folder = data(tmp_path_factory.mktemp("resumed") / "data")
    return ("--base", base, "--data", folder, *FLAGS)


@pytest.fixture(scope="module")
def whole(flags: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert lora("train", *flags, "--run-dir", run) == 0
    return run


def untimed(value: Any) -> Any:
    """Without what a clock or a gauge told."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def result(run: Path) -> dict[str, Any]:
    """Everything that a run leaves."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {
        "metrics": [untimed(json.loads(line)) for line in lines],
        "summary": untimed(json.loads((run / "summary.json").read_text())),
        "predictions": (run / "predictions.jsonl").read_bytes(),
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "checkpoints": state.steps(run / "checkpoints"),
        "names": sorted(path.name for path in run.iterdir()),
    }


def cut(whole: Path, run: Path, step: int) -> Path:
    """A run as it is where it was killed after the step's checkpoint: more was recorded."""
    shutil.copytree(whole, run)
    for name in ("summary.json", "predictions.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    return run


class StoppedError(Exception):
    """What stands for a process's end."""


def test_a_run_continues_to_the_same_bytes(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off five times, each in the middle of a step, with all that was recorded until then."""
    import lora.finetune.run as room

    real, cuts = room.Record.step, [1, 2, 3, 5, 9]

    def stop(self: Any, step: Any) -> None:
        real(self, step)
        if cuts and step.step == cuts[0]:
            del cuts[0]
            raise StoppedError

    run = tmp_path / "run"
    monkeypatch.setattr(room.Record, "step", stop)
    while cuts:
        with pytest.raises(StoppedError):
            lora("train", *(("--resume", run) if run.exists() else (*flags, "--run-dir", run)))
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_a_resumed_run_is_locked_before_its_base_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading may take minutes, in which lora watch must not take the run for a dead one."""
    import lora.finetune.run as room

    run, locked = cut(whole, tmp_path / "run", 4), list[bool]()
    prepare = room.prepare

    def watched(*arguments: Any) -> Any:
        locked.append(is_locked(run))
        return prepare(*arguments)

    monkeypatch.setattr(room, "prepare", watched)
    assert lora("train", "--resume", run) == 0
    assert locked == [True]
    assert not is_locked(run)


def test_a_run_cut_off_in_its_evaluation_owes_it(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora.finetune.run as room

    run = tmp_path / "run"
    real = room.evaluate
    for number in (1, 2, 4):  # of dev after two epochs, and of the held-out split
        calls = iter(range(1, 99))

        def stop(*args: Any, calls: Any = calls, number: int = number, **more: Any) -> Any:
            if next(calls) == number:
                raise StoppedError
            return real(*args, **more)

        monkeypatch.setattr(room, "evaluate", stop)
        arguments = ("--resume", run) if run.exists() else (*flags, "--run-dir", run)
        if number == 4:
            break
        with pytest.raises(StoppedError):
            lora("train", *arguments)
    monkeypatch.setattr(room, "evaluate", real)
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_resume_says_what_it_cannot(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("train", "--resume", whole) == 2
    assert "is complete" in capsys.readouterr().err
    assert lora("train", "--resume", tmp_path) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert lora("train", "--resume", whole, "--epochs", 5) == 2
    assert "--resume takes the settings from the run" in capsys.readouterr().err
    run = cut(whole, tmp_path / "run", 6)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("epochs = 3", "epochs = 4"))
    assert lora("train", "--resume", run) == 2
    assert "config.toml is not the one of" in capsys.readouterr().err
    (run / "config.toml").write_text(text)
    metrics = (run / "metrics.jsonl").read_bytes()
    for written in (metrics[:100], metrics.replace(b"0", b"1", 1)):
        (run / "metrics.jsonl").write_bytes(written)
        assert lora("train", "--resume", run) == 2
        assert "is damaged: it is not as it was at its checkpoint" in capsys.readouterr().err
    (run / "metrics.jsonl").write_bytes(metrics)
    around = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(around | {"data": "other"}))
    assert lora("train", "--resume", run) == 2
    assert "has changed since the run began" in capsys.readouterr().err
    (run / "environment.json").write_text(json.dumps(around | {"torch": "1.0"}))
    for path in (run / "checkpoints").iterdir():
        (path / "training.safetensors").write_bytes(b"")
    assert lora("train", "--resume", run) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "torch was 1.0, is" in err
    assert "is damaged, skipped: training.safetensors was changed" in err
    assert "resuming" in err
    assert "anew." in err
    assert result(run) == result(whole)


@pytest.mark.parametrize("more", [("--eval-steps", 2), ("--eval-steps", 4, "--keep-best", 2)])
def test_evaluations_and_what_stays(
    more: tuple[Any, ...], flags: tuple[Any, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert lora("train", *flags, *more, "--run-dir", run) == 0
    summary = json.loads((run / "summary.json").read_text())
    rows, total = summary["evaluations"], summary["step"]
    every = more[1]
    assert [row["step"] for row in rows] == sorted({*range(every, total + 1, every), total})
    best = sorted(rows, key=lambda row: (-row["dev"]["accuracy"], row["dev_loss"]))
    stay = {total, *(row["step"] for row in best[: 2 if "--keep-best" in more else 1])}
    assert set(state.steps(run / "checkpoints")) == stay


def test_the_best_is_handed_on_and_patience_ends_a_training(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("--eval-steps", 1, "--early-stopping", 2, "--final", "best", "--keep-last", 0,
            "--keep-best", 0, "--learning-rate", 0.3)  # fmt: skip
    assert lora("train", *flags, *more, "--run-dir", run) == 0
    summary = json.loads((run / "summary.json").read_text())
    rows = summary["evaluations"]
    ranks = [(row["dev"]["accuracy"], -row["dev_loss"]) for row in rows]
    first = ranks.index(max(ranks))
    assert len(rows) == first + 3 < 9
    (kept,) = state.steps(run / "checkpoints")
    assert kept == rows[first]["step"] == summary["step"]
    adapters = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (run, state.checkpoint_folder(run / "checkpoints", kept))
    ]
    assert adapters[0] == adapters[1]
    assert "no better for 2 evaluations" in " ".join(capsys.readouterr().err.split())


def start(flags: tuple[Any, ...], cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora", "train", *map(str, flags)], text=True, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps_recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.is_file() else 0


def until(true: Any, process: subprocess.Popen[str]) -> None:
    while not true() and process.poll() is None:
        time.sleep(0.002)


def check_stopped(run: Path, number: signal.Signals, err: str) -> None:
    """The step was finished and saved, and the message says how to resume."""
    assert f"{number.name}: finishing the step and saving" in err
    assert f"lora train --resume {run}" in err
    newest, notes = state.find(run / "checkpoints")
    assert newest is not None
    assert not notes
    assert int(newest.name[5:]) == steps_recorded(run)


def test_ctrl_c_ends_the_step_saves_and_says_how_to_resume(
    flags: tuple[Any, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start((*flags, "--epochs", 3000, "--run-dir", run))
    until(lambda: steps_recorded(run) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    check_stopped(run, signal.SIGINT, err)


def test_sigterm_ends_the_step_saves_and_says_how_to_resume(
    flags: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sigterm_after(3, monkeypatch)
    run = tmp_path / "run"
    assert lora("train", *flags, "--epochs", 3000, "--run-dir", run) == 143
    check_stopped(run, signal.SIGTERM, capfd.readouterr().err)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_a_kill_is_survived(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path
) -> None:
    """In the middle of a save, which takes for ever here."""
    run = tmp_path / "run"
    code = (
        "import os, sys, time; import lora.finetune.state as s; real = s.sync\n"
        "def sync(path):\n"
        "    if 'step-00000004' in str(path): print('saving', flush=True); time.sleep(600)\n"
        "    real(path)\n"
        "s.sync = sync; from lora.finetune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", *map(str, flags), "--run-dir", str(run)]
    for signals in ([signal.SIGINT, signal.SIGINT], [signal.SIGKILL]):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "saving\n"
            for number in signals:
                process.send_signal(number)
                time.sleep(0.3)
            assert process.wait(timeout=30) == -signals[-1]
        newest, said = state.find(run / "checkpoints")
        assert newest == run / "checkpoints" / "step-00000003"  # of the first epoch's end
        assert "was being written" in said[0]
        command[3:] = ["train", "--resume", str(run)]
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """While step 4 is saved, no file may grow as large as a checkpoint's tensors."""
    run, real = tmp_path / "run", state.save_training

    def save(training: Any, *rest: Any) -> Path:
        with a_full_disk(9000) if training.step == 4 else nullcontext():
            return real(training, *rest)

    monkeypatch.setattr(state, "save_training", save)
    assert lora("train", *flags, "--run-dir", run) == 2
    monkeypatch.setattr(state, "save_training", real)
    err = capsys.readouterr().err
    assert "cannot be written" in err
    assert "Traceback" not in err
    assert state.find(run / "checkpoints") == (run / "checkpoints" / "step-00000003", [])
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_short_memory_says_what_to_lower(
    flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import lora.finetune.train as room

    real, calls = room.batch_loss, iter(range(99))

    def short(*args: Any) -> Any:
        if next(calls) == 8:  # of the fifth step: two parts each
            torch.empty(2**55, dtype=torch.uint8)
        return real(*args)

    monkeypatch.setattr(room, "batch_loss", short)
    run = tmp_path / "run"
    assert lora("train", *flags, "--run-dir", run) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "TrainingError: step 5: out of memory" in err
    assert "--micro-batch-size 2" in err
    assert f"Last good checkpoint: {run}/checkpoints/step-00000004." in err


def test_one_process_at_a_time(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora.finetune.run as room

    run = tmp_path / "run"
    assert lora("train", *flags, "--run-dir", run) == 0
    (run / "summary.json").unlink()
    with room.alone(run):
        assert lora("train", "--resume", run) == 2
    assert "another process is at work" in capsys.readouterr().err


def test_training_goes_on_from_an_adapter(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its own run's data at rate 0, near enough: the answers stay."""
    run = tmp_path / "run"
    arguments = (*flags[:4], "--epochs", 1, "--learning-rate", 1e-12, "--run-dir")
    shutil.copytree(whole / "adapter", tmp_path / "adapter")
    assert lora("train", *arguments, run, "--adapter", tmp_path / "adapter") == 0
    scores = [
        [row["prediction"] for row in map(json.loads, path.read_text().splitlines())]
        for path in (whole / "predictions.jsonl", run / "predictions.jsonl")
    ]
    assert scores[0] == scores[1]
    assert "r = 2" in (run / "config.toml").read_text()
    shutil.rmtree(tmp_path / "adapter")
    assert lora("eval", run) == 0
    for more, words in {
        ("--r", 3): "was trained with 2. Remove the flag",
        ("--method", "dora"): "was trained with lora. Remove --method",
        ("--labels", "1", "0"): "was trained on the labels 0, 1, found 1, 0",
    }.items():
        again = (*arguments, tmp_path / "other", "--adapter", whole / "adapter", *more)
        assert lora("train", *again) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL, within a save too, and on again from there each time: the same bytes in the end."""
    from benchmarks.kills import survive

    found = survive([*map(str, flags)], tmp_path / "run", kills=20, seed=random.randrange(2**32))
    assert found["kills"] == 20
    assert result(tmp_path / "run") == result(whole)
