"""Metrics to where people watch their runs, by name, through accelerate.tracking.

tensorboard   the folder tensorboard/ of the run directory
wandb         Weights & Biases: project $WANDB_PROJECT, else lora; its files under wandb/ there
mlflow        experiment $MLFLOW_EXPERIMENT_NAME, else lora, wherever $MLFLOW_TRACKING_URI points
trackio       project lora

A tracker names the run itself, and trackers.json in the run directory keeps that name: a resumed
run goes on in the same place. It logs again the steps since its last checkpoint, which is no harm:
W&B leaves them out, the others hold the same values twice.

accelerate's trackers need its PartialState. Outside of a launcher that touches nothing; under one
it reads torch.distributed where that is set up, and sets it up where it is not: in a distributed
run set it up first, and track from the first rank alone.
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
"""The trackers, and where each keeps what it calls a run."""
RUNS = TypeAdapter(dict[str, str])
"""trackers.json: what each tracker calls the run."""
PROJECT = "lora"
Log = Callable[[Mapping[str, Any]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError where a tracker is unknown or not installed; imports none of them."""
    for name in names:
        if name not in CALLED:
            raise ConfigError(f"--trackers {name} is unknown. Found: {', '.join(CALLED)}.")
        missing = [package for package in ("accelerate", name) if not _installed(package)]
        if missing:
            raise ConfigError(
                f"--trackers {name} needs {' and '.join(missing)}, not installed here. Run pip"
                f" install {' '.join(missing)}."
            )


def _installed(package: str) -> bool:
    # What trackers leave behind, ./wandb for one, is found too: as a package without a file.
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


@contextmanager
def tracking(names: Sequence[str], directory: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Yields what takes a line of metrics.jsonl to every named tracker.

    `settings` are shown beside the run. Raises ConfigError where a tracker is unknown, not
    installed, or does not begin a new run; one that fails later is left alone, with a note, and so
    is one that does not go on with a resumed run: the training is worth more.
    """
    names = tuple(dict.fromkeys(names))
    check_trackers(names)
    begun: dict[str, Any] = {}
    try:
        if names:
            _begin_each(begun, names, directory, settings)

        def log(row: Mapping[str, Any]) -> None:
            for name in tuple(begun):
                with _left_alone_if_it_fails(begun, name):
                    begun[name].log(flat(row), step=row["step"])

        yield log
    finally:
        for name in tuple(begun):
            with _left_alone_if_it_fails(begun, name):
                begun[name].finish()


@contextmanager
def _left_alone_if_it_fails(begun: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a network's, a disk's, a service's: whatever it is made of
        begun.pop(name, None)
        print(f"note: {_failed(name, error)} The run goes on without it.", file=sys.stderr)


def _failed(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return f"--trackers {name} failed: {reason}."


def _begin_each(
    begun: dict[str, Any], names: Sequence[str], directory: Path, settings: Mapping[str, Any]
) -> None:
    """Begin the trackers, each into `begun` by its name; what they call the run is written down."""
    from accelerate import PartialState

    PartialState()  # their logger raises without it
    path = directory / "trackers.json"
    then = "Remove it to track the run anew."
    runs = documents.read_document(path, RUNS, RunError, then) if path.exists() else {}
    shown = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }
    for name in names:
        if name in runs:
            with _left_alone_if_it_fails(begun, name):
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
                f"{_failed(name, error)} Set it up as its own manual says, or leave it out."
            ) from error
    with writable(path, RunError):
        write_whole(path, json.dumps(runs, indent=2).encode())


def _tracker(name: str, directory: Path, run: str | None, settings: Mapping[str, Any]) -> Any:
    """The tracker of a new run, or of the one that it calls `run`; not yet begun."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return kind("tensorboard", directory)
    if name == "mlflow":
        return kind(PROJECT, run_id=run, run_name=directory.name)
    if name == "trackio":  # knows a run by its name alone
        run = run or f"{directory.name}-{secrets.token_hex(3)}"
        return kind(PROJECT, name=run, resume="allow", config=dict(settings))
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return kind(project, id=run, name=directory.name, resume="allow", dir=str(directory))


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under the names that trackers group by.

    {"kind": "step", "loss": 1} -> train/loss; {"kind": "evaluation", "loss": 1, "dev_loss": 2,
    "dev": {"accuracy": 3}} -> evaluation/loss, dev/loss, dev/accuracy.
    """
    group = {"step": "train"}.get(row["kind"], row["kind"])
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in value.items()}
        elif key not in ("step", "steps"):  # the axis, what never changes
            split, _, rest = key.partition("_")
            found[f"dev/{rest}" if split == "dev" else f"{group}/{key}"] = value
    return {key: value for key, value in found.items() if is_number(value)}
