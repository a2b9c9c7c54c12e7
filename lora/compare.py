"""Methods x seeds on one base and one data set: each run a process of its own, one table.

A process each, so that peak memory is the run's own and no run inherits another's state. A run
that is complete already, under the same configuration, is taken as it is: an interrupted
comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w
import tyro
from rich.table import Table

from lora.adapter import METHODS
from lora.checkpoint import write_whole
from lora.config import RunConfig, parse_run, read_toml, split_config, to_table
from lora.errors import ConfigError, RunError
from lora.run import summary_of


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared. Every other flag goes to the runs, as in `lora train`; a flag that only
    one method has goes to that method, and [methods.NAME] tables of --config likewise."""

    methods: tuple[str, ...] = ()
    """Methods to compare. Default: the tables of --config, or lora and full."""
    seeds: tuple[int, ...] = ()
    """Seeds of each. Default: those of --config, or 0."""
    run_dir: Path = Path("runs/compare")
    """Where the runs, the table and the curves go."""
    dry_run: bool = False
    """Print what would run, and stop."""


def parse_compare(arguments: Sequence[str]) -> tuple[CompareConfig, list[RunConfig[Any]]]:
    """The comparison and all of its runs, every one checked before the first begins."""
    path, own = split_config(arguments)
    table = read_toml(path) if path else {}
    config, rest = tyro.cli(
        CompareConfig, args=own, prog="lora compare", return_unknown_args=True,
        description=CompareConfig.__doc__,
    )  # fmt: skip
    methods = config.methods or tuple(table.get("methods", ())) or ("lora", "full")
    seeds = config.seeds or tuple(table.get("seeds", ())) or (0,)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]} is unknown. Found: {', '.join(METHODS)}.")
    runs = []
    for method in methods:
        for seed in seeds:
            where = config.run_dir / f"{method}-{seed}"
            flags = ["--config", str(path)] if path else []
            flags += _for_method(rest, method, methods)
            flags += ["--method", method, "--seed", str(seed), "--run-dir", str(where)]
            runs.append(parse_run(flags, "lora compare"))
    return replace(config, methods=methods, seeds=seeds), runs


def _for_method(rest: Sequence[str], method: str, methods: Sequence[str]) -> list[str]:
    """The flags less those that only other compared methods have."""
    names = {m: {field.name for field in fields(METHODS[m].Config)} for m in methods}
    others = set().union(*names.values()) - names[method]
    kept: list[str] = []
    keep = True
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            keep = name not in others
        if keep:
            kept.append(argument)
    return kept


def compare(config: CompareConfig, runs: Sequence[RunConfig[Any]]) -> list[dict[str, Any]]:
    """Run what is not complete; returns the summaries in the order of the runs."""
    summaries = []
    for number, run in enumerate(runs, 1):
        assert run.run_dir is not None
        done = complete(run)
        head = f"[{number}/{len(runs)}] {run.method}, seed {run.seed}"
        print(f"{head}{': complete, taken as it is' if done else ''}", file=sys.stderr, flush=True)
        if not done:
            _spawn(run)
        summaries.append(summary_of(run.run_dir))
    write_whole(config.run_dir / "comparison.json", json.dumps(summaries, indent=2).encode())
    write_whole(config.run_dir / "comparison.md", markdown(rows(summaries)).encode())
    return summaries


def complete(run: RunConfig[Any]) -> bool:
    """Whether the run's directory holds its result. Raises RunError where it holds another's."""
    assert run.run_dir is not None
    if not run.run_dir.exists():
        return False
    asked = tomli_w.dumps(to_table(replace(run, run_dir=None)))
    path = run.run_dir / "asked.toml"
    same = path.is_file() and path.read_text() == asked
    if same and (run.run_dir / "summary.json").is_file():
        return True
    raise RunError(
        f"{run.run_dir} holds {'an unfinished run' if same else 'a run of other settings'}."
        " Remove it, or pass another --run-dir."
    )


def _spawn(run: RunConfig[Any]) -> None:
    """`lora train` in a process of its own, its messages passed on."""
    assert run.run_dir is not None
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    asked = run.run_dir.parent / f".{run.run_dir.name}.toml"
    write_whole(asked, tomli_w.dumps(to_table(replace(run, run_dir=None))).encode())
    command = [sys.executable, "-m", "lora", "train", "--config", str(asked)]
    code = subprocess.run([*command, "--run-dir", str(run.run_dir)], check=False).returncode
    if code:
        raise RunError(f"{run.method}, seed {run.seed} failed with exit code {code}: see above.")
    asked.replace(run.run_dir / "asked.toml")


def rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table: a head, then a row per method, means (± standard deviation) over its seeds."""
    if not summaries:
        return []
    metric = next(iter(summaries[0]["metrics"]))
    split = f"{summaries[0]['split']} {metric}"
    head = ("method", "trainable", "share", "rate", "loss per epoch", split, "train s", "peak MiB")
    found: list[tuple[str, ...]] = [head]
    for method in dict.fromkeys(s["method"] for s in summaries):
        own = [s for s in summaries if s["method"] == method]
        losses = zip(*([e["loss"] for e in s["epochs"]] for s in own), strict=True)
        scale = 100 if metric == "accuracy" else 1
        scores = [scale * s["metrics"][metric] for s in own]
        spread = (
            f" ± {statistics.stdev(scores):.{2 if scale == 100 else 4}f}" if len(own) > 1 else ""
        )
        found.append(
            (
                method,
                f"{own[0]['trainable']:,}",
                f"{own[0]['trainable'] / own[0]['parameters']:.2%}",
                f"{own[0]['learning_rate']:g}",
                " ".join(f"{statistics.mean(epoch):.3f}" for epoch in losses),
                f"{statistics.mean(scores):.{2 if scale == 100 else 4}f}{spread}"
                + (" %" if scale == 100 else ""),
                f"{statistics.median(s['train_seconds'] for s in own):.1f}",
                f"{statistics.median(s['peak_bytes'] for s in own) / 2**20:,.0f}",
            )
        )
    return found


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table as GitHub shows it."""
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def printed(table: Sequence[Sequence[str]]) -> Table:
    """The table for a terminal."""
    head, *body = table
    found = Table(*head)
    for cells in body:
        found.add_row(*cells)
    return found
