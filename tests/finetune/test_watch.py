"""`lora watch` follows a run, draws it within the terminal, and leaves cleanly at Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
from conftest import ROOT
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)

import lora.finetune.watch as room
from lora.finetune.run_folder import alone
from lora.finetune.watch import curves_of


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A complete run of 6 steps and 3 evaluations."""
    folder = tmp_path_factory.mktemp("watched")
    flags = ("--base", base, "--data", data(folder / "data"), "--r", 2, "--epochs", 3)
    assert lora("train", *flags, "--run-dir", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def growing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as it began. Each time that lora watch waits, one more row is recorded, and the
    summary after the last."""
    folder = tmp_path / "growing"
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()
    rows = iter((run / "metrics.jsonl").read_text().splitlines(keepends=True))

    def wait(seconds: float) -> None:
        row = next(rows, None)
        if row is None:
            shutil.copy(run / "summary.json", folder)
            return
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(row[:20])  # a reader may come in the middle of a line
            file.flush()
            room.metrics_of(folder)
            file.write(row[20:])

    monkeypatch.setattr(room.time, "sleep", wait)
    return folder


def test_a_run_is_followed_to_its_end(growing: Path) -> None:
    seen = list(room._changes(growing))
    assert [len(recorded.steps) for recorded in seen] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 6]
    assert [len(recorded.evaluations) for recorded in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [recorded.complete for recorded in seen] == [False] * 10 + [True]
    assert "not begun" in seen[0].title()
    assert "step 4 of 6, epoch 2, dev accuracy 0." in seen[6].title()
    assert "last step at " in seen[6].title()
    assert seen[-1].title().endswith(", complete")


def test_a_pipe_gets_a_line_for_each_evaluation(
    growing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("watch", growing) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "epoch 1/3", "epoch 2/3", "epoch 3/3", "test (24 rows)"
    ]  # fmt: skip
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (60, 16)])
def test_the_curves_fit_into_the_terminal(growing: Path, width: int, height: int) -> None:
    """At every moment: before the first step, the first evaluation, and the end."""
    console = rich.console.Console(width=width, height=height, color_system=None)
    for recorded in room._changes(growing):
        with console.capture() as capture:
            console.print(curves_of(recorded, width, height))
        lines = capture.get().splitlines()
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        if recorded.evaluations:
            assert sum("o" in line.partition("| ")[2] for line in lines) >= 2  # loss and score
    assert "loss: train, and dev as o" in lines[1]
    assert any("dev accuracy" in line and "learning rate" in line for line in lines)


def test_a_constant_curve_has_room(growing: Path) -> None:
    """As of a loss of 0, or of a rate that stays."""
    recorded = list(room._changes(growing))[-1]
    steps: Any = [{**row, "loss": 0.0, "learning_rate": 1e-3} for row in recorded.steps]
    still = room.Recorded(recorded.run, steps, [], False, 0.0)
    console = rich.console.Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(curves_of(still, 80, 24))
    assert "after the first evaluation" in capture.get()


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("watch", tmp_path) == 2
    assert "is not a run directory: it has no config.toml" in capsys.readouterr().err


def test_a_run_that_has_stopped_is_not_watched_for_ever(
    growing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_ago = 1e9
    os.utime(growing / "config.toml", (long_ago, long_ago))
    with alone(growing):  # a process is at work, however long it takes
        changes = room._changes(growing)
        assert [next(changes).steps for _ in range(2)]
    (growing / "metrics.jsonl").unlink()
    assert lora("watch", growing) == 2
    shown = capsys.readouterr().err
    assert "has stopped: no process trains it, and nothing has been recorded since 2001-" in shown
    assert f"lora train --resume {growing}" in shown
    (growing / "diverged.json").write_text("{}")  # resumed, it would diverge again
    assert lora("watch", growing) == 2
    assert f"Next: lora train --config {growing}/config.toml --learning-rate" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_ctrl_c_restores_the_terminal(run: Path, tmp_path: Path) -> None:
    import pty

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()  # it would be watched for ever
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "lora", "watch", str(folder)]
    around = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    with subprocess.Popen(command, stdout=its, stderr=its, stdin=its, env=around) as process:
        os.close(its)
        screen = b""
        while b"learning rate" not in screen:
            screen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while process.poll() is None or b"interrupted" not in screen:
            try:
                screen += os.read(ours, 4096)
            except OSError:  # Linux: the other side has closed it
                break
        assert process.wait() == 130
    os.close(ours)
    assert b"Traceback" not in screen
    assert screen.rindex(b"\x1b[?1049l") > screen.rindex(b"\x1b[?1049h")  # the main screen again
    assert screen.rindex(b"\x1b[?25h") > screen.rindex(b"\x1b[?25l")  # with its cursor
