"""`lora runs` and `lora show`: the runs of a folder, and what one of them is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import LoraError, RunError, command
from lora.files import read_json
from lora.finetune.comparison.tables import markdown
from lora.finetune.config import read_toml, to_table
from lora.finetune.estimate import duration
from lora.finetune.methods import label
from lora.finetune.metrics import signed
from lora.finetune.record import DIVERGED, Forgetting, Summary, metrics_of, summary_of
from lora.finetune.run_folder import config_of, is_locked
from lora.finetune.verbs import RunsConfig

DEEPEST = 4
"""Folders below the given ones in which runs are looked for."""


@dataclass(frozen=True)
class RunRow:
    """A run as `lora runs` shows it. Score and seconds are None before the run is complete."""

    run: Path
    name: str  # what tables call the method
    method: str
    data: str
    base: str
    seed: int
    learning_rate: float | None
    state: str  # "complete", "training: step 4 of 9", "diverged after step 4 of 9", "damaged: ..."
    changed: float  # seconds since 1970, of the newest file
    metric: str = ""
    score: float | None = None
    train_seconds: float | None = None

    @property
    def better(self) -> float:
        """The score with its sign, so that larger is better; less than any if there is none."""
        return signed(self.metric, self.score)


def run_folders(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Yields the run directories in a folder, itself among them, in alphabetical order."""
    children: list[Path] = []
    with suppress(OSError):  # a folder that cannot be read holds no run of the user's
        if (folder / "config.toml").is_file():
            yield folder
            return
        # A hidden folder is a run that is being made.
        children = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    for child in sorted(children) if depth else ():
        yield from run_folders(child, depth - 1)


def run_row(run: Path) -> RunRow:
    """Returns a run's row. A damaged run has a row too; its state begins with "damaged"."""
    changed = 0.0
    for path in run.iterdir():
        with suppress(FileNotFoundError):  # a temporary file of a run that is being trained
            changed = max(changed, path.stat().st_mtime)
    try:
        table = read_toml(run / "config.toml")
        data = table.get("data", "?")
        row: dict[str, Any] = {
            "name": table.get("name") or label(table["method"]),
            "method": label(table["method"]),
            "data": data if isinstance(data, str) else " ".join(data),
            "base": str(table.get("base", "?")),
            "seed": int(table.get("seed", 0)),
            "learning_rate": table.get("learning_rate"),
        }
        summary = _result_of(run)
        state = "complete" if summary else _steps_done(run)
        if summary:
            row["metric"], row["score"] = next(iter(summary["metrics"].items()))
            row["train_seconds"] = summary["train_seconds"]
    except (LoraError, KeyError, TypeError, ValueError) as error:
        state = f"damaged: {error}"
        return RunRow(run, "?", "?", "?", "?", 0, None, state=state, changed=changed)
    return RunRow(run, **row, state=state, changed=changed)


def _result_of(run: Path) -> Summary | None:
    """Returns the summary of a run, None if the run is not complete."""
    return summary_of(run) if (run / "summary.json").is_file() else None


def _steps_done(run: Path) -> str:
    """Returns the state of a run that is not complete."""
    rows = metrics_of(run) if (run / "metrics.jsonl").is_file() else []
    steps = [row for row in rows if row["kind"] == "step"]
    done = f"step {steps[-1]['step']} of {steps[-1]['steps']}" if steps else "not begun"
    if (run / DIVERGED).is_file():
        return f"diverged after {done}"
    return f"training: {done}" if is_locked(run) else done


def next_command(run: Path, state: str, learning_rate: float | None) -> str:
    """Returns the command for a run that is not complete; "" if it is damaged."""
    if state.startswith("damaged"):
        return ""
    if state.startswith("training"):
        return command("lora", "watch", run)
    if state.startswith("diverged") and learning_rate is not None:
        # A resumed run takes the same steps, and diverges again.
        lower = ("--learning-rate", f"{learning_rate / 2:g}")
        return command("lora", "train", "--config", run / "config.toml", *lower)
    return command("lora", "train", "--resume", run)


SORTS = {
    "date": lambda row: -row.changed,
    "score": lambda row: (row.score is None, row.metric, -row.better),
    "method": lambda row: (row.name, row.learning_rate or 0.0, row.seed),
    "seconds": lambda row: float("inf") if row.train_seconds is None else row.train_seconds,
}
"""What `--sort` can be, and the key of each: the newest, the best, the fastest first."""


def runs(config: RunsConfig) -> str:
    """Returns what `lora runs` prints. Raises RunError if a folder does not exist or holds no
    run."""
    for folder in config.folders:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder. Pass one that holds runs: lora runs FOLDER.")
    rows = [run_row(run) for folder in config.folders for run in run_folders(folder)]
    if not rows:
        where = ", ".join(map(str, config.folders))
        raise RunError(f"{where}: no run in there. Run lora train, or pass another folder.")
    chosen = [row for row in rows if _matches(row, config)]
    chosen.sort(key=SORTS[config.sort])
    chosen = chosen[: config.limit]
    if config.json:
        return json.dumps([{**vars(row), "run": str(row.run)} for row in chosen], indent=2)
    head = ("run", "method", "rate", "seed", "data", "state", "score", "train", "changed")
    table = [head, *(_run_cells(row) for row in chosen)]
    return f"{markdown(table)}\nruns: {len(chosen)} of {len(rows)}"


def _matches(row: RunRow, config: RunsConfig) -> bool:
    return (
        (not config.method or bool({row.name, row.method} & {*config.method}))
        and (config.data is None or config.data in row.data)
        and (config.state == "all" or (row.state == "complete") == (config.state == "complete"))
    )


def _run_cells(row: RunRow) -> tuple[str, ...]:
    score = "" if row.score is None else f"{row.metric} {row.score:.4g}"
    taken = "" if row.train_seconds is None else duration(row.train_seconds)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.changed))
    data = row.data if len(row.data) <= 40 else f"{row.data[:39]}…"
    rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
    return (str(row.run), row.name, rate, str(row.seed), data, row.state, score, taken, when)


def run_description(run: Path) -> str:
    """Returns what `lora show` prints: settings, machine, evaluations, result, what to do next.
    Raises RunError if the folder is not a run."""
    config = config_of(run)
    settings = {
        key: value for key, value in to_table(config).items() if value not in ("", [], {}, False)
    }
    summary = _result_of(run)
    state = "complete" if summary else _steps_done(run)
    lines = [f"{run}: {state}", "", "settings"]
    lines += [
        f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()
    ]
    lines += ["", "machine", *(f"  {key}: {value}" for key, value in _machine(run).items())]
    evaluations = [row for row in metrics_of(run) if row["kind"] == "evaluation"]
    if evaluations:
        head = ("step", "epoch", "train loss", "dev loss", *evaluations[0]["dev"])
        table = [head]
        for row in evaluations:
            numbers = (row["loss"], row["dev_loss"], *row["dev"].values())
            cells = (f"{number:.4f}" for number in numbers)
            table.append((str(row["step"]), f"{row['epoch']:g}", *cells))
        lines += ["", "evaluations", markdown(table).rstrip()]
    lines += ["", *(_result_lines(summary) if summary else [])]
    if not summary:
        lines.append(f"next: {next_command(run, state, config.learning_rate)}")
        return "\n".join(lines)
    anew = ("--config", run / "config.toml", "--run-dir", f"{run}-again")
    lines.append(f"to repeat it: {command('lora', 'train', *anew)}")
    use = ("generate", run) if config.task == "text" else ("predict", run, "--text", "...")
    lines.append(f"next: {command('lora', *use)}")
    return "\n".join(lines)


def _machine(run: Path) -> dict[str, Any]:
    """Returns what environment.json says of versions and hardware."""
    table = read_json(run / "environment.json", RunError, "Restore it.")
    keys = ("time", "processor", "device", "threads", "torch", "transformers")
    return {key: table[key] for key in keys if key in table}


def _result_lines(summary: Summary) -> list[str]:
    scores = "  ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
    share = summary["trainable"] / summary["parameters"]
    costs = [f"trained in {duration(summary['train_seconds'])}"]
    if "tokens_per_second" in summary:  # older runs lack it, and the next
        costs.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    if "adapter_bytes" in summary:
        costs.append(f"{summary['adapter_bytes'] / 2**20:,.2f} MiB saved")
    return [
        f"result on {summary['split']} ({summary['rows']:,} rows)",
        f"  loss {summary['loss']:.4f}  {scores}",
        *([f"  {forgetting_line(summary['forgetting'])}"] if "forgetting" in summary else []),
        f"  {summary['trainable']:,} trainable parameters ({share:.2%}), {', '.join(costs)}",
        "",
    ]


def forgetting_line(forgetting: Forgetting) -> str:
    """Returns what a run says of the text of --unrelated-text."""
    return (
        f"perplexity of {forgetting['source']} ({forgetting['tokens']:,} tokens)"
        f"  before training {forgetting['before']:.4f}  after {forgetting['after']:.4f}"
    )
