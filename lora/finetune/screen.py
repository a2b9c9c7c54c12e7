"""Shows a run's progress: a bar on a terminal, otherwise lines on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lora.finetune import distributed
from lora.finetune.record import Step


def progress_bar() -> Progress:
    """Returns a bar for a terminal; without a terminal it shows only the printed lines, on stderr.
    Only rank 0 shows anything."""
    first = distributed.rank() == 0
    console = rich.get_console() if sys.stderr.isatty() else rich.console.Console(file=sys.stderr)
    console = console if first else rich.console.Console(quiet=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty() or not first,
    )


@contextmanager
def reading(progress: Progress) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar without a total while data and base are loaded.

    Yields a function to call with (layers quantized, all layers) while the base is quantized.
    """
    task = progress.add_task("loading data and base", total=None)
    description = "quantizing the base, layer by layer"
    yield lambda done, layers: progress.update(
        task, total=layers, completed=done, description=description
    )
    progress.remove_task(task)


def say(progress: Progress, text: str) -> None:
    """Print a line above the bar unchanged: by default rich would wrap it and color numbers."""
    progress.console.print(text, soft_wrap=True, markup=False, highlight=False)


def evaluation_line(row: Mapping[str, Any], epochs: int) -> str:
    """Returns a line on an evaluation: its losses, its scores and, if there are several tasks, each
    one's first metric. epochs: those of the whole run."""
    scores = "  ".join(
        f"{name} {value:.4f}" for name, value in row["dev"].items() if "/" not in name
    )
    metric = next(iter(row["dev"]))
    tasks = [
        f"{name.removeprefix(f'{metric}/')} {value:.4f}"
        for name, value in row["dev"].items()
        if name.startswith(f"{metric}/")
    ]
    scores += f"  ({metric} of {', '.join(tasks)})" if tasks else ""
    return (
        f"epoch {row['epoch']:.3g}/{epochs}  loss {row['loss']:.4f}"
        f"  dev loss {row['dev_loss']:.4f}  {scores}  {row['seconds']:.1f} s"
    )


class TrainingScreen:
    """Shows the progress of training: a bar on a terminal, otherwise a line every 30 seconds; and
    a line for each evaluation."""

    EVERY = 30.0  # seconds

    def __init__(self, progress: Progress, epochs: int, total: int, done: int) -> None:
        self.progress, self.epochs = progress, epochs
        self.bar = progress.add_task("training", total=total, completed=done)
        self.recent: deque[Step] = deque(maxlen=20)
        self.printed = time.monotonic()

    def step(self, step: Step) -> None:
        """Show a step's loss and learning rate, and the speed over the last 20 steps."""
        self.recent.append(step)
        seconds = sum(s.seconds for s in self.recent)
        tokens = sum(s.tokens for s in self.recent)
        positions = sum(s.tokens / (1 - s.padding) for s in self.recent)
        text = (
            f"epoch {step.epoch}/{self.epochs} loss {step.loss:.3f} lr {step.learning_rate:.1e}"
            f" {tokens / seconds:,.0f} tokens/s padding {1 - tokens / positions:.0%}"
        )
        self.progress.update(self.bar, completed=step.step, description=text)
        now = time.monotonic()
        if self.progress.disable and now - self.printed >= self.EVERY:
            self.printed = now
            left = (step.steps - step.step) * seconds / len(self.recent)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            say(self.progress, f"step {step.step}/{step.steps} {text} left {clock}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Print an evaluation."""
        say(self.progress, evaluation_line(row, self.epochs))

    def done(self) -> None:
        """Remove the bar."""
        self.progress.remove_task(self.bar)
