"""Sends metrics to experiment trackers, by name, through accelerate.tracking.

tensorboard   the folder tensorboard/ of the run directory
wandb         Weights & Biases: project $WANDB_PROJECT, else lora; its files under wandb/ there
mlflow        experiment $MLFLOW_EXPERIMENT_NAME, else lora, wherever $MLFLOW_TRACKING_URI points
trackio       project lora

Each tracker gives the run an id, and trackers.json in the run directory stores it, so that a
resumed run is logged to the same place. The steps since the last checkpoint are then logged again:
W&B ignores them, the others store the same values twice.

accelerate's trackers need its PartialState. Without a launcher it changes nothing. With one it
initializes torch.distributed unless that is already done: in a distributed run initialize it
first, and track from rank 0 only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora.declared import is_number
from lora.errors import ConfigError, RunError
from lora.files import writable, write_whole
from lora.interop import documents

CALLED = {"mlflow": "info.run_id", "tensorboard": "log_dir", "trackio": "name", "wandb": "id"}
"""Each tracker -> the attribute that holds its id of the run."""
RUNS = TypeAdapter(dict[str, str])
"""trackers.json: each tracker's id of the run."""
PROJECT = "lora"
Log = Callable[[Mapping[str, Any]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker is unknown or not installed. Does not import it."""
    for name in names:
        if name not in CALLED:
            raise ConfigError(f"--trackers {name} is unknown. Trackers: {', '.join(CALLED)}.")
        missing = [package for package in ("accelerate", name) if not _installed(package)]
        if missing:
            raise ConfigError(
                f"--trackers {name} needs {' and '.join(missing)}, which"
                f" {'are' if len(missing) > 1 else 'is'} not installed. Run pip install"
                f" {' '.join(missing)}."
            )


def _installed(package: str) -> bool:
    # A folder such as ./wandb, which trackers write, looks like a package without a file.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@contextmanager
def tracking(names: Sequence[str], directory: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Yields a function that logs a line of metrics.jsonl to every named tracker.

    `settings` are shown beside the run. Raises ConfigError if a tracker is unknown, not installed,
    or cannot start a new run. A tracker that fails later, or cannot resume a run, is dropped with
    a note, since losing the training would be worse.
    """
    names = tuple(dict.fromkeys(names))
    check_trackers(names)
    begun: dict[str, Any] = {}
    try:
        if names:
            _begin_each(begun, names, directory, settings)

        def log(row: Mapping[str, Any]) -> None:
            for name in tuple(begun):
                with _dropped_if_it_fails(begun, name):
                    begun[name].log(flat(row), step=row["step"])

        yield log
    finally:
        for name in tuple(begun):
            with _dropped_if_it_fails(begun, name):
                begun[name].finish()


@contextmanager
def _dropped_if_it_fails(begun: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, disk, service: trackers raise anything
        begun.pop(name, None)
        print(f"note: {_failed(name, error)} The run continues without it.", file=sys.stderr)


def _failed(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return f"--trackers {name} failed: {reason}."


def _begin_each(
    begun: dict[str, Any], names: Sequence[str], directory: Path, settings: Mapping[str, Any]
) -> None:
    """Start the trackers, add each to `begun`, and write their ids of the run to trackers.json."""
    from accelerate import PartialState

    PartialState()  # their logger raises without it
    path = directory / "trackers.json"
    advice = "Remove it to track the run as a new one."
    runs = documents.read_document(path, RUNS, RunError, advice) if path.exists() else {}
    shown = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }
    for name in names:
        if name in runs:
            with _dropped_if_it_fails(begun, name):
                begun[name] = _tracker(name, directory, runs[name], shown)
                begun[name].start()
            continue
        try:
            begun[name] = _tracker(name, directory, None, shown)
            begun[name].start()
            begun[name].store_init_configuration(shown)
            runs[name] = attrgetter(CALLED[name])(begun[name].tracker)
        except Exception as error:
            raise ConfigError(
                f"{_failed(name, error)} Set it up as its manual says, or remove it from"
                " --trackers."
            ) from error
    with writable(path, RunError):
        write_whole(path, json.dumps(runs, indent=2).encode())


def _tracker(name: str, directory: Path, run: str | None, settings: Mapping[str, Any]) -> Any:
    """Returns the tracker, not yet started, of a new run or of the one with the id `run`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return kind("tensorboard", directory)
    if name == "mlflow":
        return kind(PROJECT, run_id=run, run_name=directory.name)
    if name == "trackio":  # identifies a run by its name
        run = run or f"{directory.name}-{secrets.token_hex(3)}"
        return kind(PROJECT, name=run, resume="allow", config=dict(settings))
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return kind(project, id=run, name=directory.name, resume="allow", dir=str(directory))


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of metrics.jsonl under names that trackers group by prefix.

    {"kind": "step", "loss": 1} -> train/loss; {"kind": "evaluation", "loss": 1, "dev_loss": 2,
    "dev": {"accuracy": 3}} -> evaluation/loss, dev/loss, dev/accuracy.
    """
    group = {"step": "train"}.get(row["kind"], row["kind"])
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{inner}": number for inner, number in value.items()}
        elif key not in ("step", "steps"):  # step is the x axis, steps is constant
            split, _, rest = key.partition("_")
            numbers[f"dev/{rest}" if split == "dev" else f"{group}/{key}"] = value
    return {key: value for key, value in numbers.items() if is_number(value)}
