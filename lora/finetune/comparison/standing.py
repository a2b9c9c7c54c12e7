"""Checks whether a folder holds the run that a comparison needs, and whether it is complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lora.errors import RunError
from lora.finetune.config import RunConfig, to_table
from lora.finetune.data.included import recorded_source
from lora.finetune.methods import digest_of, is_outside
from lora.finetune.record import environment_of, is_complete
from lora.finetune.run_folder import config_of
from lora.layers import inside

Standing = Literal["new", "interrupted", "complete"]
SUFFIX: dict[Standing, str] = {
    "new": "",
    "interrupted": ": interrupted, resuming",
    "complete": ": already complete",
}
"""What is printed after a run's name."""


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
    if not _same(to_table(replace(run, run_dir=None)), recorded):
        raise RunError(
            f"{run.run_dir} holds a run with other settings. Remove it, or pass another --run-dir."
        )
    return "complete" if is_complete(run.run_dir) else "interrupted"


def _same(requested: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """True if a recorded configuration is the requested one with its defaults resolved."""
    for key in requested.keys() | recorded.keys():
        wanted, value = requested.get(key), recorded.get(key)
        if key == "modules_to_save":  # the run adds the new head
            if not all(any(inside(name, saved) for saved in value or ()) for name in wanted or ()):
                return False
        elif key == "trainable_token_indices" and "add_tokens" in requested:  # adds the new tokens
            if wanted not in (None, value):
                return False
        elif key == "data":
            if [recorded_source(source) for source in wanted or ()] != value and wanted != value:
                return False
        elif key in ("base", "adapter", "template") and value is not None:
            auto = key == "template" and wanted in (None, "auto")
            if not auto and wanted != value and str(Path(str(wanted)).resolve()) != value:
                return False
        elif key in (
            "task",
            "labels",
            "learning_rate",
            "text_column",
            "pair_column",
            "label_column",
            "dtype",
            "max_length",
        ):
            if wanted not in (None, "auto", value):
                return False
        elif wanted != value:
            return False
    return True
