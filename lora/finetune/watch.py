"""`lora watch`: the curves of a run in the terminal, while it trains.

On a terminal the curves are drawn again whenever the run has recorded more. Elsewhere, such as in a
pipe, there is a line for each evaluation. Both end when the run is complete, or when it has
stopped: no process trains it, and nothing has been recorded for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotille
import rich.console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora.errors import RunError
from lora.finetune.config import read_toml
from lora.finetune.listing import next_command, run_row
from lora.finetune.record import EvaluationRow, StepRow, metrics_of, smoothed_losses, summary_of
from lora.finetune.run_folder import is_locked
from lora.finetune.screen import evaluation_line

LOOK_EVERY = 1.0  # seconds between two looks at the run's files
STOPPED_AFTER = 60.0  # seconds without a row and without a lock: a machine may share no locks
AXIS_COLUMNS = 14  # columns that plotille needs beside a curve, for its axis
AXIS_LINES = 4  # lines that it needs above and below
SMALLEST_CURVE = (20, 3)  # columns and lines of a curve


@dataclass(frozen=True)
class Recorded:
    """What a run has recorded so far."""

    run: Path
    steps: Sequence[StepRow]
    evaluations: Sequence[EvaluationRow]
    complete: bool
    changed: float  # when the last row was written, in seconds since 1970

    @property
    def metric(self) -> str:
        """The task's first metric, "" before the first evaluation."""
        return next(iter(self.evaluations[0]["dev"])) if self.evaluations else ""

    def title(self) -> str:
        """Returns a line on the state of the run."""
        if not self.steps:
            return f"{self.run}: not begun"
        last = self.steps[-1]
        parts = [f"{self.run}: step {last['step']} of {last['steps']}, epoch {last['epoch']}"]
        if self.evaluations:
            score = self.evaluations[-1]["dev"][self.metric]
            parts.append(f"dev {self.metric} {score:.4f}")
        when = time.strftime("%H:%M:%S", time.localtime(self.changed))
        parts.append("complete" if self.complete else f"last step at {when}")
        return ", ".join(parts)


def watch(run: Path) -> None:
    """Show the curves of a run until it is complete. Raises RunError if the folder is not a run, or
    if the run has stopped."""
    if not (run / "config.toml").is_file():
        raise RunError(
            f"{run} is not a run directory: it has no config.toml. Pass the folder that lora train"
            " names, or see lora runs."
        )
    console = rich.console.Console()
    if console.is_terminal:
        _draw_until_complete(run, console)
    else:
        _print_until_complete(run)


def _draw_until_complete(run: Path, console: rich.console.Console) -> None:
    recorded = None
    # On the terminal's other screen, so that a window of another size leaves no rest behind.
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for recorded in _changes(run):
                live.update(curves_of(recorded, console.width, console.height), refresh=True)
    finally:
        if recorded is not None:
            console.print(curves_of(recorded, console.width, min(console.height, 30)))
    _print_result(run)


def _print_until_complete(run: Path) -> None:
    epochs = int(read_toml(run / "config.toml").get("epochs", 0))
    printed = 0
    for recorded in _changes(run):
        for row in recorded.evaluations[printed:]:
            print(evaluation_line(row, epochs), flush=True)
        printed = len(recorded.evaluations)
    _print_result(run)


def _print_result(run: Path) -> None:
    summary = summary_of(run)
    scores = "".join(
        f"  {name} {value:.4f}" for name, value in summary["metrics"].items() if "/" not in name
    )
    print(f"{summary['split']} ({summary['rows']:,} rows)  loss {summary['loss']:.4f}{scores}")


def _changes(run: Path) -> Iterator[Recorded]:
    """Yields what a run has recorded, now and whenever it has changed; ends with a complete run.
    Raises RunError if the run has stopped."""
    path, before = run / "metrics.jsonl", None
    while True:
        # In this order: a run that completes meanwhile is read once more.
        complete = (run / "summary.json").is_file()
        started = time.monotonic()
        now = (path.stat().st_size, path.stat().st_mtime) if path.is_file() else (0, 0.0)
        if now != before or complete:
            rows = metrics_of(run) if now[0] else []
            yield Recorded(
                run,
                [row for row in rows if row["kind"] == "step"],
                [row for row in rows if row["kind"] == "evaluation"],
                complete,
                now[1],
            )
        if complete:
            return
        changed = now[1] or (run / "config.toml").stat().st_mtime
        if time.time() - changed > STOPPED_AFTER and not is_locked(run):
            row = run_row(run)
            raise RunError(
                f"{run} has stopped: no process trains it, and nothing has been recorded since"
                f" {time.strftime('%Y-%m-%d %H:%M', time.localtime(changed))}. Next:"
                f" {next_command(run, row.state, row.learning_rate)}."
            )
        before = now
        # A long run's rows take a while to read: leave the processor to the training.
        time.sleep(max(LOOK_EVERY, 10 * (time.monotonic() - started)))


def curves_of(recorded: Recorded, width: int, height: int) -> Table:
    """Returns the loss above, and the dev score and the learning rate below it, on so many columns
    and lines of a terminal."""
    picture = Table.grid()
    picture.add_row(Text(recorded.title(), "bold", no_wrap=True, overflow="ellipsis"))
    if not recorded.steps:
        return picture
    upper = (height - 1) // 2
    lower = height - 1 - upper
    steps = [float(row["step"]) for row in recorded.steps]
    evaluated = [float(row["step"]) for row in recorded.evaluations]
    train = Curve(steps, smoothed_losses(recorded.steps, 1 + len(steps) // 50), "blue")
    dev = Curve(evaluated, [row["dev_loss"] for row in recorded.evaluations], "red", marker="o")
    rate = Curve(steps, [row["learning_rate"] for row in recorded.steps], "green")
    last = recorded.steps[-1]["steps"]
    picture.add_row(_figure("loss: train, and dev as o", [train, dev], last, width, upper))
    below = Table.grid()
    scores = [row["dev"][recorded.metric] for row in recorded.evaluations]
    score = Curve(evaluated, scores, "red", marker="o")
    below.add_row(
        _figure(f"dev {recorded.metric}", [score], last, width // 2, lower),
        _figure("learning rate", [rate], last, width - width // 2, lower),
    )
    picture.add_row(below)
    return picture


@dataclass(frozen=True)
class Curve:
    """A line of a figure."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str | None = None


def _figure(title: str, lines: Sequence[Curve], last: int, width: int, height: int) -> Text:
    """Returns the curves over the steps 0 to `last`, with their axes: width x height characters."""
    lines = [line for line in lines if line.x]
    if not lines:
        return Text(f"{title}: after the first evaluation")
    figure = plotille.Figure()
    figure.color_mode, figure.origin = "names", False
    figure.width = max(SMALLEST_CURVE[0], width - AXIS_COLUMNS)
    figure.height = max(SMALLEST_CURVE[1], height - AXIS_LINES)
    figure.set_x_limits(0, 1.02 * last)  # plotille leaves out a point on the edge
    lowest, highest = (f(f(line.y) for line in lines) for f in (min, max))
    margin = (highest - lowest) * 0.05 or abs(highest) * 0.05 or 1.0  # of a constant curve too
    figure.set_y_limits(lowest - margin, highest + margin)
    figure.x_label, figure.y_label = "step", ""
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{value:.3g}"
    for line in lines:
        figure.plot(line.x, line.y, lc=line.colour, marker=line.marker)
    drawn = figure.show().split("\n")
    rows = [Text(f"{'':<12}{title}"), *map(Text.from_ansi, drawn[1:])]
    for row in rows:
        row.truncate(width)  # the arrow of an axis is longer than the axis
    return Text("\n").join(rows)
