"""Metrics reach the trackers that are asked for, and no tracker ends a training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora.errors import ConfigError, RunError
from lora.finetune.trackers import check_trackers, flat, tracking

SETTINGS = {"method": "lora", "r": 8, "learning_rate": 1e-3, "labels": ["no", "yes"]}
FAKE = """
runs = []

class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)

config = Config()

class Run:
    def __init__(self, given):
        self.given, self.rows, self.finished = given, [], False
        self.id = given["id"] or f"run{len(runs)}"

    def log(self, values, step):
        if step == 3:
            raise ConnectionError("no route to host.\\nmore of it")
        self.rows.append((step, values))

    def finish(self):
        self.finished = True

def init(**given):
    if given["project"] == "closed" or given["project"] == "gone" and given["id"]:
        raise PermissionError("log in")
    runs.append(Run(given))
    return runs[-1]
"""


def step(number: int) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "steps": 9, "epoch": 1, "loss": 1 / number,
        "learning_rate": 0.1, "epoch_ends": False,
    }  # fmt: skip


EPOCH = {
    "kind": "evaluation", "step": 2, "epoch": 1, "loss": 0.5, "dev_loss": 0.4,
    "dev": {"accuracy": 0.75, "f1": 0.5},
}  # fmt: skip


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of that name, whose runs fail at step 3."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads from a folder."""
    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_reads_what_was_logged_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    with tracking(["tensorboard"], tmp_path, SETTINGS) as log:
        log(step(1))
        log(step(2))
        log(EPOCH)
    folder = tmp_path / "tensorboard"
    found = scalars(folder)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert [step for step, _ in found["dev/accuracy"]] == [2]
    assert set(found) == {
        "train/loss", "train/learning_rate", "train/epoch", "evaluation/loss", "evaluation/epoch",
        "dev/loss",
        "dev/accuracy", "dev/f1",
    }  # fmt: skip
    said = [path.read_text() for path in folder.glob("*/hparams.yml")]
    assert len(said) == 1
    assert "learning_rate: 0.001" in said[0]
    with tracking(["tensorboard"], tmp_path, SETTINGS) as log:
        log(step(2))  # the run was cut off after its last checkpoint
        log(step(4))
    assert scalars(folder)["train/loss"] == [(1, 1.0), (2, 0.5), (2, 0.5), (4, 0.25)]
    assert len(list(folder.glob("*/hparams.yml"))) == 1


def test_a_resumed_run_goes_on_in_its_run_of_the_tracker(tmp_path: Path, wandb: Any) -> None:
    for directory in (tmp_path / "one", tmp_path / "two"):
        directory.mkdir()
        for _ in range(2):
            with tracking(["wandb", "wandb"], directory, SETTINGS) as log:
                log(step(1))
    assert [run.given["id"] for run in wandb.runs] == [None, "run0", None, "run2"]
    assert all(run.given["resume"] == "allow" and run.finished for run in wandb.runs)
    assert wandb.runs[0].given["name"] == "one"
    assert wandb.runs[0].rows == [(1, flat(step(1)))]
    assert wandb.config["learning_rate"] == 1e-3
    assert json.loads((tmp_path / "two" / "trackers.json").read_text()) == {"wandb": "run2"}


def test_one_that_fails_is_dropped(
    tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking(["wandb", "tensorboard"], tmp_path, SETTINGS) as log:
        for number in range(1, 6):
            log(step(number))
    said = capsys.readouterr().err
    assert said == (
        "note: --trackers wandb failed: no route to host. The run continues without it.\n"
    )
    assert [number for number, _ in wandb.runs[0].rows] == [1, 2]
    assert [number for number, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_one_that_does_not_begin_is_refused_and_of_a_resumed_run_dropped(
    tmp_path: Path,
    wandb: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "closed")
    with (
        pytest.raises(ConfigError, match="--trackers wandb failed: log in. Set it up"),
        tracking(["wandb"], tmp_path, SETTINGS),
    ):
        pytest.fail("began")
    assert not (tmp_path / "trackers.json").exists()
    monkeypatch.delenv("WANDB_PROJECT")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", None)
    with (
        pytest.raises(ConfigError, match="tensorboard failed"),
        tracking(["wandb", "tensorboard"], tmp_path, SETTINGS),
    ):
        pytest.fail("began")
    assert wandb.runs.pop().finished
    monkeypatch.setenv("WANDB_PROJECT", "gone")
    with tracking(["wandb"], tmp_path, SETTINGS) as log:
        log(step(1))
    with tracking(["wandb"], tmp_path, SETTINGS) as log:
        log(step(2))
    assert len(wandb.runs) == 1
    assert "note: --trackers wandb failed: log in. The run continues" in capsys.readouterr().err


def test_trackers_end_with_the_training_and_leave_its_error(tmp_path: Path, wandb: Any) -> None:
    with pytest.raises(KeyboardInterrupt), tracking(["wandb"], tmp_path, {}):
        raise KeyboardInterrupt
    assert wandb.runs[0].finished


def test_unknown_and_absent_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--trackers wandbb is unknown. Trackers: mlflow, "):
        check_trackers(["wandbb"])
    for absent, asked in (("trackio", "trackio"), ("accelerate", "tensorboard")):
        monkeypatch.setitem(sys.modules, absent, None)
        with pytest.raises(ConfigError, match=f"{absent}, which .* Run pip install {absent}."):
            check_trackers([asked])


def test_what_a_tracker_leaves_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="Run pip install mlflow"):
        check_trackers(["mlflow"])


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("{")
    with (
        pytest.raises(RunError, match="trackers.json is damaged"),
        tracking(["tensorboard"], tmp_path, {}),
    ):
        pytest.fail("began")


def test_without_trackers_accelerate_is_not_imported() -> None:
    code = """
import sys
from pathlib import Path
from lora.finetune.trackers import check_trackers, tracking
check_trackers(["tensorboard"])
with tracking([], Path("nowhere"), {}) as log:
    log({"kind": "step", "step": 1})
assert not {"accelerate", "tensorboard"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
