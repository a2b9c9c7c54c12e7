"""The folder of a run: where it may be made, its configuration, and whether it can be resumed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora.card import FORMER_NAMES
from lora.errors import ConfigError, RunError, command
from lora.files import locked, readable, writable, write_together
from lora.finetune import state
from lora.finetune.config import RunConfig, from_table, read_toml, to_table, to_toml
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.included import TINY, absolute_source
from lora.finetune.environment import environment
from lora.finetune.methods import digest_of, label, reopened
from lora.finetune.record import environment_of, is_complete

CHECKPOINTS = "checkpoints"
WHERE_RUNS_ARE = "lora runs lists the runs in ./runs, lora runs FOLDER those of another folder."
SAME = ("python", "torch", "transformers", "processor", "threads", "device", "ranks")
"""Keys of environment.json on which the last bits of a result may depend."""


def default_directory(config: RunConfig[Any]) -> Path:
    """runs/TIME-METHOD-XXXX, a name that no other run has, even if both begin in one second."""
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{now}-{label(config.method)}-{secrets.token_hex(2)}"


def check_free(directory: Path, flag: str = "--run-dir", what: str = "run") -> None:
    """Raise RunError if a folder exists already or could not be made. Makes nothing."""
    with writable(directory, RunError, f"Pass another {flag}."):
        exists = False
        with suppress(FileNotFoundError, NotADirectoryError):
            exists = bool(directory.lstat())
        parents = (path for path in directory.absolute().parents if path.exists())
        parent = next(parents, directory)  # a root has no parents
    if exists:
        raise RunError(
            f"{flag} {directory} exists: no {what} is overwritten. Pass another, or remove it."
        )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "not writable" if parent.is_dir() else "not a folder"
        raise RunError(f"{flag} {directory} cannot be made: {parent} is {why}. Pass another.")


def create(
    directory: Path,
    config: RunConfig[Any],
    given: RunConfig[Any],
    corpus: Corpus,
    tokens: str,
    device: torch.device,
) -> None:
    """Make the folder with config.toml and environment.json in it, or make nothing.

    config: the settings as resolved. given: as the user gave them.
    """
    resolved, asked = to_table(config), to_table(given)
    start: dict[str, Any] = environment(device)
    start |= {"data": corpus.digest(), "tokens": tokens, "note": "; ".join(corpus.notes)}
    start["asked"] = {
        key: asked.get(key)
        for key in sorted(asked.keys() | resolved.keys())
        if asked.get(key) != resolved.get(key)
    }
    if digest := digest_of(config.method):
        start["method"] = digest
    files = {
        "config.toml": to_toml(config).encode(),
        "environment.json": json.dumps(start, indent=2).encode(),
    }
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    with writable(directory, RunError, "Pass another --run-dir."):
        temporary.mkdir(parents=True)
        try:
            write_together(temporary, files)
            temporary.rename(directory)
        except BaseException:
            shutil.rmtree(temporary)
            raise


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Inside, no other process can work on this run. Raises RunError if one already does."""
    with ExitStack() as stack:
        with writable(directory, RunError, "Pass the folder of a run."):
            descriptor = stack.enter_context(locked(directory))
            if descriptor is None:  # perhaps by is_locked() of another process, for an instant
                time.sleep(0.2)
                descriptor = stack.enter_context(locked(directory))
        if descriptor is None:
            raise RunError(f"{directory}: another process is at work on this run. Wait.")
        yield


def is_locked(directory: Path) -> bool:
    """True if a process works on this run. Cannot see one on a machine that shares no locks."""
    with suppress(OSError), locked(directory) as descriptor:
        return descriptor is None
    return False


def run_around(folder: Path) -> Path | None:
    """The run whose folder, or whose adapter folder, this is; None if it is neither.

    Resolves the path first: inside RUN/adapter, `.` is the run's adapter too.
    """
    path = folder.resolve()
    runs = [folder, *([path.parent] if path.name == "adapter" else [])]
    return next((run for run in runs if (run / "config.toml").is_file()), None)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Inside, a ConfigError raises RunError: a run wrote the file, so it was right once."""
    try:
        yield
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error} Restore it, or start a new run.") from None


def config_of(directory: Path, method: str | None = None, exact: bool = False) -> RunConfig[Any]:
    """The configuration of a run, as resolved. Raises RunError if the folder is not a run.

    `method` is where the file of the run's method is now; with `exact` it may not have changed.
    """
    path = directory / "config.toml"
    with readable(directory, RunError, "Pass the folder of a run."):
        exists = path.is_file()
    if not exists:
        raise RunError(
            f"{directory} is not a run directory: it has no config.toml. {WHERE_RUNS_ARE}"
        )
    with _damaged(path):
        table = read_toml(path)
        if "method" not in table:
            raise ConfigError("method is missing.")
        if isinstance(base := table.get("base"), str):
            table["base"] = FORMER_NAMES.get(base, base)
        # A run records what `demo` means. One that records `demo` is older: it meant the stand-in.
        if table.get("data") in ("demo", ["demo"]):
            table["data"] = [TINY]
    table["method"] = reopened(directory, table["method"], method, exact)
    with _damaged(path):
        config = from_table(table, table["method"])
    missing = [key for key in ("learning_rate", "max_length") if getattr(config, key) is None]
    missing += ["dtype"] * (config.dtype == "auto")
    if missing:
        raise RunError(
            f"{path} is damaged: {missing[0]} is missing. Restore it, or start a new run."
        )
    if config.task == "auto" or (config.task == "classification") != bool(config.labels):
        raise RunError(
            f"{path} is damaged: it names no task with its labels. Restore it, or start a new run."
        )
    return config


def at_base(config: RunConfig[Any], base: str | None, directory: Path) -> RunConfig[Any]:
    """The configuration with its base where it is now: at `base`, or where it was when the run in
    `directory` started. Raises RunError if it does not exist any more."""
    if base is not None:
        return replace(config, base=absolute_source(base))
    if os.path.isabs(config.base) and not os.path.exists(config.base):
        raise RunError(
            f"{directory}: its base {config.base} does not exist any more. Pass its new path:"
            " --base FOLDER."
        )
    return replace(config, base=absolute_source(config.base))


def resumable(
    directory: Path,
    base: str | None = None,
    method: str | None = None,
    device: str | None = None,
) -> RunConfig[Any]:
    """The configuration of a run that is not complete, on `device` if that is given. Raises
    RunError."""
    config = config_of(directory, method, exact=True)
    config = replace(config, device=device or config.device)
    _check_incomplete(directory)
    if base is not None and state.find(directory / CHECKPOINTS)[0] is None:
        anew = command("lora", "train", "--config", directory / "config.toml", "--base", base)
        raise RunError(
            f"--base {base}: {directory} has no checkpoint yet, so it cannot be checked that this"
            f" is the same base. Start a new run: {anew}."
        )
    return at_base(config, base, directory)


def checkpoint_to_resume(
    directory: Path, corpus: Corpus, tokens: str, device: torch.device, say: Callable[[str], None]
) -> tuple[Path | None, str]:
    """The newest whole checkpoint of a run, None if it has none; and the note on its data.

    `tokens` is the digest of the training split. Raises RunError if the run is complete, or if its
    data, tokens or config.toml have changed since it started.
    """
    _check_incomplete(directory)  # again: another process may have completed it meanwhile
    anew = command("lora", "train", "--config", directory / "config.toml")
    start, now = environment_of(directory), environment(device)
    if start["data"] != corpus.digest():
        raise RunError(
            f"{directory}: {corpus.source} has changed since the run began. Restore it, or"
            f" start a new run: {anew}."
        )
    if start["tokens"] != tokens:
        raise RunError(
            f"{directory}: the same data gives other tokens than when the run began. The tokenizer"
            " changed, or the chat template writes today's date. Restore the tokenizer, or"
            f" start a new run with a --template FILE that writes no date: {anew}."
        )
    for key in SAME:
        if start.get(key) != now[key]:
            say(f"note: {key} was {start.get(key)}, is {now[key]}: last bits may differ.")
    path, notes = state.find(directory / CHECKPOINTS)
    for note in notes:
        say(f"note: {note}")
    with readable(directory, RunError, "Restore its files, or start a new run."):
        if (
            path
            and (path / state.CONFIG_FILE).read_bytes() != (directory / "config.toml").read_bytes()
        ):
            raise RunError(
                f"{directory / 'config.toml'} is not the one of {path}. Restore it, or start a new"
                " run."
            )
    return path, start["note"]


def _check_incomplete(directory: Path) -> None:
    if is_complete(directory):
        score = command("lora", "eval", directory)
        raise RunError(f"{directory} is complete. Run {score}, or start a new run.")
