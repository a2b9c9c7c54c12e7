"""`lora train --nproc 2` is `lora train`: losses, files, signals, ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, save_distilbert
from test_cli import data, lora

from lora.finetune import state

pytestmark = pytest.mark.slow

FLAGS = ("--epochs", 10, "--batch-size", 5, "--r", 4, "--learning-rate", 1e-3, "--save-steps", 10,
         "--keep-last", 99, "--class-weights", 0, 3, "--label-smoothing", 0.1,
         "--dtype", "float32")  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A base without dropout, whose masks depend on the ranks; 26 rows: every sixth batch is of
    one, and a rank has none."""
    folder = tmp_path_factory.mktemp("nproc")
    base = save_distilbert(
        folder / "base", dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    return ("--base", base, "--data", data(folder / "data", 26), *FLAGS)


@pytest.fixture(scope="module")
def runs(flags: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: by one process, two, and two with the base in pieces. The other pairs are in
    test_distributed."""
    folder = tmp_path_factory.mktemp("runs")
    two = ("--nproc", 2)
    for name, more in {
        "one none": (),
        "two none": two,
        "one nf4": ("--quantize", "nf4"),
        "sharded nf4": (*two, "--quantize", "nf4", "--shard", "--activation-checkpointing"),
    }.items():
        assert lora("train", *flags, *more, "--run-dir", folder / name) == 0
    return {path.name: path for path in folder.iterdir()}


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "step"]


@pytest.mark.parametrize(("name", "quantize"), [("two", "none"), ("sharded", "nf4")])
def test_two_ranks_train_as_one_process(
    name: str, quantize: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = runs[f"one {quantize}"], runs[f"{name} {quantize}"]
    assert len(losses(other)) == 60
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    results = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"])
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    rows = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, other)]
    padding = [[json.loads(row)["padding"] for row in some] for some in rows]
    assert all(0 <= share < 1 for share in padding[1])
    assert lora("eval", other) == 0
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [("two none", 1), ("one none", 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    before: str, after: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[before], run)
    for name in ("summary.json", "predictions.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    state.prune(run / "checkpoints", [20])
    more = ("--nproc", after) if after > 1 else ()
    assert lora("train", "--resume", run, *more) == 0
    assert losses(run) == pytest.approx(losses(runs[before]), rel=1e-5)


def start(flags: tuple[Any, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora", "train", *map(str, flags)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip


def until_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    path = run / "metrics.jsonl"
    while process.poll() is None and not (
        path.is_file() and path.read_bytes().count(b'"kind": "step"') >= steps
    ):
        time.sleep(0.01)


def test_a_signal_to_the_launcher_saves(flags: tuple[Any, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start((*flags, "--epochs", 5000, "--nproc", 2, "--run-dir", run))
    until_steps(run, 12, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.count(f"lora train --resume {run}") == 1
    newest, said = state.find(run / "checkpoints")
    assert newest is not None
    assert not said
    rows = (run / "metrics.jsonl").read_bytes().count(b'"kind": "step"')
    assert int(newest.name[5:]) == rows


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(
    flags: tuple[Any, ...], runs: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start((*flags, "--nproc", 2, "--run-dir", run))
    until_steps(run, 12, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [
        child for child in children
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]  # fmt: skip
    assert len(ranks) == 1
    os.kill(int(ranks[0]), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 2
    assert "rank 1 of 2" in err
    assert "was ended by SIGKILL" in err
    assert f"lora train --resume {run}" in err
    assert lora("train", "--resume", run, "--nproc", 2) == 0
    assert losses(run) == losses(runs["two none"])
    adapters = [
        (one / "adapter" / "adapter_model.safetensors").read_bytes()
        for one in (run, runs["two none"])
    ]
    assert adapters[0] == adapters[1]


def test_what_all_ranks_find_is_said_once(
    flags: tuple[Any, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--learning-rate", 1e30, "--max-grad-norm", 1e30)
    assert lora("train", *flags, "--nproc", 2, "--run-dir", tmp_path / "run", *more) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert err.count("Last good checkpoint") == 1
    assert "Traceback" not in err
