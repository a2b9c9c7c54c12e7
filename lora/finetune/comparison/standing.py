"""Checks whether a folder holds the run that a comparison needs, and whether it is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lora.errors import RunError
from lora.finetune.config import RunConfig, to_table
from lora.finetune.data.included import absolute_source, recorded_source
from lora.finetune.data.templates import TEMPLATES
from lora.finetune.methods import digest_of, is_outside
from lora.finetune.record import DIVERGED, environment_of, is_complete
from lora.finetune.run_folder import config_of

Standing = Literal["new", "interrupted", "complete", "diverged"]
SUFFIX: dict[Standing, str] = {
    "new": "",
    "interrupted": ": interrupted, resuming",
    "complete": ": already complete",
    "diverged": ": diverged before",
}
"""What is printed after a run's name."""
PATHS: dict[str, Callable[[Any], Any]] = {
    "base": absolute_source,
    "template": lambda name: name if name in TEMPLATES else absolute_source(name),
    "adapter": lambda path: str(Path(path).resolve()),
    "data": lambda sources: list(map(recorded_source, sources)),
    "unrelated_text": recorded_source,
}
"""Settings that a run records as absolute paths, and how."""


def standing(run: RunConfig[Any]) -> Standing:
    """Returns the state of a run by its directory. One with a damaged summary.json is interrupted.

    Raises RunError if the directory holds anything else than this run.
    """
    assert run.run_dir is not None
    if not run.run_dir.exists():
        return "new"
    path = run.run_dir / "config.toml"
    if not path.is_file():
        raise RunError(
            f"{run.run_dir} exists and is not a run: it has no config.toml. Remove it, or pass"
            " another --run-dir."
        )
    outside = run.method if is_outside(run.method) else None
    if outside and environment_of(run.run_dir).get("method") != digest_of(outside):
        raise RunError(
            f"{run.run_dir} holds a run with another method, or with {outside} before that file"
            " changed. Remove it, or pass another --run-dir."
        )
    recorded = to_table(config_of(run.run_dir, outside))
    asked = environment_of(run.run_dir).get("asked", {})
    if not _same(to_table(replace(run, run_dir=None)), recorded, asked):
        raise RunError(
            f"{run.run_dir} holds a run with other settings. Remove it, or pass another --run-dir."
        )
    if is_complete(run.run_dir):
        return "complete"
    return "diverged" if (run.run_dir / DIVERGED).is_file() else "interrupted"


def _same(requested: dict[str, Any], recorded: dict[str, Any], asked: dict[str, Any]) -> bool:
    """True if a run with the requested settings is the recorded one.

    recorded: the run's settings as resolved. asked: those that the run decided, as they were given.
    """
    for key in requested.keys() | recorded.keys():
        wanted, value = requested.get(key), recorded.get(key)
        decided = key in asked and wanted == asked[key]
        if key in PATHS and wanted not in (None, "auto"):  # may be relative to another folder
            wanted, decided = PATHS[key](wanted), False
        if wanted != value and not decided:
            return False
    return True
