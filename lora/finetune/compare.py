"""Methods x seeds on one base and one data set: one process per run, one table.

Each run has its own process, so that its peak memory can be measured and no state leaks from the
run before. Runs that are complete, with the same configuration, are reused. Interrupted runs are
resumed, so the same command continues an interrupted comparison.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from lora.errors import ConfigError, RunError, StoppedError
from lora.files import locked, writable, write_together
from lora.finetune.comparison.statistics import mcnemar
from lora.finetune.config import (
    RunConfig,
    config_of_method,
    parse,
    parse_run,
    read_toml,
    stated_in,
    to_table,
)
from lora.finetune.data.corpus import read_predictions
from lora.finetune.data.included import recorded_source, resolved, resolved_with_note
from lora.finetune.methods import digest_of, is_outside, label, method_named, recordable
from lora.finetune.record import Summary, environment_of, summary_of
from lora.finetune.run_folder import config_of
from lora.finetune.tables import both_tables
from lora.layers import inside
from lora.settings import check


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train several methods with several seeds on one data set, and print one table. All other
    flags are those of `lora train`. A setting that only some of the methods have is passed to
    those; a [methods.NAME] table of --config sets values for one method."""

    methods: tuple[str, ...] = ()
    """Methods to compare. Default: the [methods.NAME] tables of --config, or lora and full."""
    seeds: tuple[int, ...] = ()
    """Random seeds; each method is trained once with each. Default: those of --config, or 0."""
    run_dir: Path | None = None
    """Folder for the runs, the table and the curves. Default: that of --config, or runs/compare."""
    dry_run: bool = False
    """Print the runs that would be made, and stop."""
    config: Path | None = None
    """TOML file of flags, as in lora train."""


def parse_compare(arguments: Sequence[str]) -> tuple[CompareConfig, list[RunConfig[Any]]]:
    """Returns the comparison and the configurations of all of its runs. Raises ConfigError."""
    config, rest = parse(CompareConfig, arguments, "lora compare", return_unknown_args=True)
    path = config.config
    table = read_toml(path) if path else {}
    for flag in ("--method", "--seed"):
        if any(argument == flag or argument.startswith(flag + "=") for argument in rest):
            raise ConfigError(f"{flag} applies to a single run. With lora compare, set {flag}s.")
    with stated_in(path):
        seeds, by_method = config.seeds or table.get("seeds", [0]), table.get("methods", {})
        whole = isinstance(seeds, list | tuple) and all(type(seed) is int for seed in seeds)
        check("seeds", seeds, "a list of at least one whole number", whole and bool(seeds))
        check("methods", by_method, "tables: [methods.lora], [methods.full], ...",
              type(by_method) is dict)  # fmt: skip
        folder = table.get("run_dir", "runs/compare")
        check("run_dir", folder, "a text", isinstance(folder, str))
    methods = config.methods or tuple(by_method) or ("lora", "full")
    folder = config.run_dir or Path(folder)
    config = replace(
        config,
        methods=tuple(dict.fromkeys(map(_known, methods))),
        seeds=tuple(dict.fromkeys(seeds)),
        run_dir=folder,
    )
    runs = []
    for method in config.methods:
        for seed in config.seeds:
            flags = ["--config", str(path)] if path else []
            flags += _for_method(rest, method, config.methods)
            flags += ["--method", method, "--seed", str(seed)]
            run = parse_run(flags, "lora compare")
            runs.append(replace(run, run_dir=folder / f"{label(method)}-{seed}"))
    return config, runs


def _known(method: str) -> str:
    """Returns one of --methods as its run records it. Raises ConfigError if there is none."""
    try:
        method_named(method)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--method ", "--methods ", 1)) from None
    return recordable(method)


def _for_method(rest: Sequence[str], method: str, methods: Sequence[str]) -> list[str]:
    """Returns the flags without those that only other compared methods have."""
    names = {
        m: {field.name for field in fields(config_of_method(m))} - config_of_method(m).written
        for m in methods
    }
    others = set().union(*names.values()) - names[method]
    flags: list[str] = []
    keep = True
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            keep = name not in others and name.removeprefix("no_") not in others
        if keep:
            flags.append(argument)
    return flags


def compare(config: CompareConfig, runs: Sequence[RunConfig[Any]]) -> list[Summary]:
    """Run what is not complete. Returns the summaries in the order of the runs, and writes the
    table to the comparison's folder."""
    summaries: list[Summary] = []
    assert config.run_dir is not None
    stand_ins = [note for run in runs for each in run.data for note in resolved_with_note(each)[1]]
    for note in dict.fromkeys(stand_ins):
        print(f"note: {note}.", file=sys.stderr)
    # All runs train on the same data, even if `demo` gets another meaning meanwhile.
    runs = [replace(run, data=tuple(map(resolved, run.data))) for run in runs]
    with _alone(config.run_dir) as lock:
        for number, run in enumerate(runs, 1):
            assert run.run_dir is not None
            state = standing(run)
            head = f"[{number}/{len(runs)}] {label(run.method)}, seed {run.seed}{SUFFIX[state]}"
            print(head, file=sys.stderr, flush=True)
            if state != "complete":
                _spawn(run, lock, state == "interrupted")
            summaries.append(_comparable(summaries, run.run_dir))
        summaries = _against_full(summaries, [run.run_dir for run in runs if run.run_dir])
        table = both_tables(summaries)
        files = {
            "comparison.json": json.dumps(summaries, indent=2).encode(),
            "comparison.md": table.encode(),
        }
        write_together(config.run_dir, files)
    return summaries


def _comparable(others: Sequence[Summary], directory: Path) -> Summary:
    """Returns a run's summary. Raises RunError if it lacks a score that the others have, or the
    other way round."""
    summary = summary_of(directory)
    expected = (others[0] if others else summary)["metrics"].keys()
    for scores in (summary["metrics"], summary.get("baseline", summary["metrics"])):
        if odd := sorted(scores.keys() ^ expected):
            raise RunError(
                f"{directory / 'summary.json'} is damaged: its scores are {', '.join(scores)}, and"
                f" {odd[0]} is not in both runs. Remove {directory}, and run it again."
            )
    return summary


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Locks the folder against other comparisons. Raises RunError if another one has locked it.

    Yields the lock's file descriptor. A run's process inherits it, so that the folder stays locked
    until the run ends, even if the comparison is killed.
    """
    with ExitStack() as stack:
        with writable(folder, RunError, "Pass another --run-dir."):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(locked(folder / ".lock"))
        if descriptor is None:
            raise RunError(
                f"--run-dir {folder}: another comparison is writing there. Wait until it ends, or"
                " pass another folder."
            )
        yield descriptor


Standing = Literal["new", "interrupted", "complete"]
SUFFIX: dict[Standing, str] = {
    "new": "",
    "interrupted": ": interrupted, resuming",
    "complete": ": already complete",
}
"""What is printed after a run's name."""


def standing(run: RunConfig[Any]) -> Standing:
    """Returns the state of a run by its directory, and removes a damaged summary.json.

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
    with suppress(RunError):
        summary_of(run.run_dir)
        return "complete"
    (run.run_dir / "summary.json").unlink(missing_ok=True)
    return "interrupted"


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


def _spawn(run: RunConfig[Any], lock: int, resumed: bool) -> None:
    """Run `lora train` in a process of its own, which prints to this one's terminal.

    A Ctrl-C reaches the process too. It then saves a checkpoint, which this function waits for.
    Raises StoppedError, or RunError if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(tomli_w.dumps(to_table(replace(run, run_dir=None))), encoding="utf-8")
        command = [sys.executable, "-m", "lora", "train"]
        if resumed:
            command += ["--resume", str(run.run_dir)]
        else:
            command += ["--config", str(file), "--run-dir", str(run.run_dir)]
        # On Windows processes inherit no descriptors: only the run's own lock protects its folder.
        inherited: dict[str, Any] = {} if sys.platform == "win32" else {"pass_fds": [lock]}
        with subprocess.Popen(command, **inherited) as process:
            while process.returncode is None:
                with suppress(KeyboardInterrupt):
                    process.wait()
        code = process.returncode
    if code in (130, 143):
        raise StoppedError("run the same command again to continue.", code - 128)
    if code:
        title = f"{label(run.method)}, seed {run.seed}"
        raise RunError(f"{title} failed with exit code {code}. Its error is printed above.")


def _against_full(summaries: Sequence[Summary], folders: Sequence[Path]) -> list[Summary]:
    """Returns the summaries, with the result of a test of each classifier against the run of full
    fine-tuning with the same seed, if there is one. Raises RunError or DataError."""
    right = {
        (s["method"], s["seed"]): _right(folder)
        for s, folder in zip(summaries, folders, strict=True)
        if s["task"] == "classification"
    }
    tested: list[Summary] = []
    for summary, folder in zip(summaries, folders, strict=True):
        ours, full = (right.get((name, summary["seed"])) for name in (summary["method"], "full"))
        if ours is None or full is None or summary["method"] == "full":
            tested.append(summary)
            continue
        if len(ours) != len(full):
            raise RunError(
                f"{folder / 'predictions.jsonl'} has {len(ours):,} rows, that of full fine-tuning"
                f" {len(full):,}. Remove {folder}, and run it again."
            )
        points = 100 * (sum(ours) - sum(full)) / len(ours)
        tested.append({**summary, "against_full": {"points": points, "p": mcnemar(ours, full)}})
    return tested


def _right(folder: Path) -> list[bool]:
    """Returns whether each prediction of a run is right."""
    predictions, references = read_predictions(folder / "predictions.jsonl")
    return [text in texts for text, texts in zip(predictions, references, strict=True)]
