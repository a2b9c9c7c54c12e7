"""Draws curves from the metrics that runs recorded."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora.errors import RunError
from lora.files import writable, write_together
from lora.finetune.colours import COLOURS
from lora.finetune.metrics import is_share
from lora.finetune.record import (
    Evaluated,
    StepRow,
    Summary,
    metrics_of,
    shown_name,
    smoothed_losses,
    summary_of,
)

NARROWEST = 0.3  # the least that the axis of a share covers


def read_metrics(directory: Path) -> tuple[list[StepRow], list[Evaluated]]:
    """Returns the recorded steps and evaluations of a run. Raises RunError."""
    rows = metrics_of(directory)
    steps: list[StepRow] = [row for row in rows if row["kind"] == "step"]
    epochs: list[Evaluated] = [row for row in rows if row["kind"] == "evaluation"]
    path = directory / "metrics.jsonl"
    if not epochs:
        raise RunError(f"{path} has no evaluation, so there is no curve to draw. Finish the run.")
    alike = all(row["dev"].keys() == epochs[0]["dev"].keys() for row in epochs)
    if not steps or steps[0]["epoch"] != 1 or not alike:
        raise RunError(f"{path} is damaged: lines are missing. Run lora train again.")
    return steps, epochs


def draw_curves(directories: Sequence[Path], folder: Path) -> list[Path]:
    """Draws loss.png and a picture of the first metric over the epochs, with a colour per method.
    Returns their paths. Raises RunError."""
    runs = [(directory, *read_metrics(directory)) for directory in directories]
    if not runs:
        raise RunError("there is no run to draw. Pass run directories: lora plot --runs RUN.")
    metric = next(iter(runs[0][2][0]["dev"]))
    for directory, _, epochs in runs:
        if metric not in epochs[0]["dev"]:
            raise RunError(
                f"{directory} has no {metric}, unlike {directories[0]}. Draw runs of different"
                " tasks separately."
            )
    methods = [_method(directory) for directory in directories]
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(methods))}
    pictures: dict[str, bytes] = {}
    subject, constant = _title(directories), _majority_on_dev(directories, metric)
    for name in ("loss", metric):
        # Not by pyplot, which keeps a figure for ever if an error comes before it is closed.
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(subject, fontsize="medium", parse_math=False)
        shown: set[str] = set()
        for (_, steps, epochs), method in zip(runs, methods, strict=True):
            label = method if method not in shown else None
            shown.add(method)
            if name == "loss":
                _loss(axes, steps, epochs, colour[method], label)
            else:
                _points(axes, epochs, [e["dev"][metric] for e in epochs], colour[method], label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss" if name == "loss" else f"dev {metric}", parse_math=False)
        axes.set_xlim(left=0)
        if name != "loss":
            _readable_axis(axes, metric, constant)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(axes)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
        pictures[re.sub(r"[^\w.-]+", "-", name)[:100] + ".png"] = drawn.getvalue()
    with writable(folder, RunError, "Pass another --output."):
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, pictures)
    return [folder / name for name in pictures]


def _method(directory: Path) -> str:
    try:
        return shown_name(summary_of(directory))
    except RunError:  # the run was interrupted
        return directory.name


def _summaries(directories: Sequence[Path]) -> list[Summary]:
    """Returns the summaries of the runs that are complete."""
    summaries = []
    for directory in directories:
        with suppress(RunError):
            summaries.append(summary_of(directory))
    return summaries


def _title(directories: Sequence[Path]) -> str:
    """Returns what the runs have in common: their data and their base."""
    summaries = _summaries(directories)
    pairs = {(s["data"], s["base"]) for s in summaries}
    if len(pairs) != 1:
        return f"{len(directories)} runs"
    data, base = pairs.pop()
    if len(data) > 60:  # as of several data sets: it would not fit the picture
        data = f"{data[:59]}…"
    folder, current = Path(base), Path.cwd()
    if folder.is_absolute():  # a run records the absolute path of a base in a folder
        inside = folder.is_relative_to(current)
        base = folder.relative_to(current).as_posix() if inside else folder.name
    return f"{data}, base {base}"


def _majority_on_dev(directories: Sequence[Path], metric: str) -> float | None:
    """Returns the accuracy of the most frequent class, if all runs have the same."""
    values = {s.get("majority", {}).get("dev") for s in _summaries(directories)}
    return values.pop() if metric == "accuracy" and len(values) == 1 else None


def _readable_axis(axes: Axes, metric: str, constant: float | None) -> None:
    """Draws the most frequent class as a line, and widens the axis: on one that covers only the
    curves, a difference of 0.01 would look like a cliff."""
    if constant is not None:
        axes.axhline(constant, color="grey", lw=1, ls=":", gid="most frequent class")
    low, high = axes.get_ylim()
    if is_share(metric) and high - low < NARROWEST:
        middle = (low + high) / 2
        low = min(max(0.0, middle - NARROWEST / 2), 1 - NARROWEST)
        axes.set_ylim(low, low + NARROWEST)


def _loss(
    axes: Axes, steps: list[StepRow], epochs: list[Evaluated], colour: str, label: str | None
) -> None:  # fmt: skip
    """Draws the loss of every step, smoothed over a tenth of an epoch, and the dev losses."""
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    width = max(1, round(per_epoch) // 10)
    smooth = smoothed_losses(steps, width)
    axes.plot([s["step"] / per_epoch for s in steps], smooth, color=colour, lw=1, alpha=0.75,
              gid=label and f"{label}, train")  # fmt: skip
    _points(axes, epochs, [e["dev_loss"] for e in epochs], colour, label and f"{label}, dev")


def _points(
    axes: Axes, epochs: list[Evaluated], values: list[float], colour: str, label: str | None
) -> None:
    axes.plot([e["epoch"] for e in epochs], values, "o--", color=colour, lw=1.2, gid=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes) -> None:
    """Adds a legend that shows names literally: matplotlib would parse $ as mathematics and hide
    names that begin with _."""
    lines = [line for line in axes.get_lines() if line.get_gid()]
    legend = axes.legend(lines, [str(number) for number in range(len(lines))], frameon=False)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_text(line.get_gid())
        text.set_parse_math(False)
