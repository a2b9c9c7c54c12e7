"""Curves of runs whose names, metrics and numbers are whatever a file says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lora.errors import RunError
from lora.finetune.plots import draw_curves

SUMMARY = {
    "method": "lora", "task": "classification", "base": "demo", "data": "opinions/films",
    "seed": 0, "note": "", "trainable": 1, "adapter_parameters": 1, "parameters": 2,
    "learning_rate": 1e-3, "step": 2, "split": "test", "rows": 10, "loss": 0.5,
    "metrics": {"accuracy": 0.7}, "train_seconds": 1.0, "seconds": 1.0, "peak_bytes": 1,
    "majority": {"dev": 0.52, "test": 0.51},
    "evaluations": [
        {"step": 1, "epoch": 1.0, "loss": 1.0, "first_loss": 1.0, "seconds": 1.0,
         "padding": 0.0, "dev_loss": 1.0, "dev": {"accuracy": 0.7}},
    ],
}  # fmt: skip


def a_run(directory: Path, epoch: float = 2.0, metric: str = "accuracy") -> Path:
    """A run that recorded two steps and two evaluations."""
    directory.mkdir(parents=True)
    step = {
        "steps": 2, "micro_batches": 1, "examples": 4, "targets": 4, "tokens": 8, "padding": 0.0,
        "learning_rate": 1e-3, "gradient_norm": 1.0, "seconds": 0.1, "epoch_ends": True,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for number in (1, 2):
        rows.append({"kind": "step", "step": number, "epoch": number, "loss": 1 / number, **step})
        rows.append(
            {
                "kind": "evaluation", "step": number, "epoch": 1.0 if number == 1 else epoch,
                "loss": 0.5, "first_loss": 1.0, "seconds": 0.1, "padding": 0.0, "dev_loss": 0.6,
                "dev": {metric: 0.7},
            }
        )  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines)
    return directory


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, as it is saved."""
    seen: list[Figure] = []
    real = Figure.savefig

    def savefig(figure: Figure, *args: Any, **more: Any) -> None:
        seen.append(figure)
        real(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.mark.parametrize("name", ["$x^$", "_hidden", "a_b$", r"\frac", "${x", "run's #1"])
def test_a_runs_name_is_drawn_as_it_is(name: str, tmp_path: Path, figures: list[Figure]) -> None:
    run = a_run(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = draw_curves([run], tmp_path / "out")
    assert [picture.name for picture in pictures] == ["loss.png", "accuracy.png"]
    legends = [axes.get_legend() for figure in figures for axes in figure.axes]
    texts = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend]
    assert texts == [[f"{name}, train", f"{name}, dev"], [name]]


def test_a_late_epoch_is_a_few_ticks_and_no_list_of_all(
    tmp_path: Path, figures: list[Figure]
) -> None:
    """3e8 ticks were 13 GiB: more epochs than a run can have are damage, and many are few ticks."""
    with pytest.raises(RunError, match=r"line 4, is damaged: evaluation.epoch must be"):
        draw_curves([a_run(tmp_path / "damaged", epoch=3e8)], tmp_path / "out")
    draw_curves([a_run(tmp_path / "run", epoch=1e6)], tmp_path / "out")
    assert len(figures) == 2
    assert all(len(axes.get_xticks()) < 20 for figure in figures for axes in figure.axes)


def test_a_metrics_name_is_no_path(tmp_path: Path) -> None:
    pictures = draw_curves([a_run(tmp_path / "run", metric="../../$f_1$")], tmp_path / "out")
    assert [picture.name for picture in pictures] == ["loss.png", "..-..-f_1-.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


@pytest.mark.parametrize("output", ["file", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        draw_curves([a_run(tmp_path / "run")], tmp_path / output)


def test_the_axis_shows_the_most_frequent_class_and_no_cliffs(
    tmp_path: Path, figures: list[Figure]
) -> None:
    """A difference of 0.01 is a small part of the axis."""
    draw_curves([a_run(tmp_path / "alone")], tmp_path / "out")
    low, high = figures[-1].axes[0].get_ylim()
    assert high - low == pytest.approx(0.3)
    assert low < 0.7 < high <= 1
    run = a_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    draw_curves([run], tmp_path / "out")
    axes = figures[-1].axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_gid() == "most frequent class"]
    assert line.get_ydata()[0] == 0.52


@pytest.mark.parametrize(
    ("stated", "title"),
    [
        ({}, "opinions/films, base demo"),
        ({"data": "opinions/films " * 8}, f"{'opinions/films ' * 3}opinions/films…, base demo"),
        ({"base": "bases/small"}, "opinions/films, base bases/small"),
        ({"base": "HERE/bases/small"}, "opinions/films, base bases/small"),
        ({"base": "HERE/../small"}, "opinions/films, base small"),
    ],
    ids=["built in", "long", "relative", "below the current folder", "elsewhere"],
)
def test_the_title_names_data_and_base(
    stated: dict[str, str],
    title: str,
    tmp_path: Path,
    figures: list[Figure],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run records the absolute path of a base in a folder, which would not fit the picture."""
    here = tmp_path / "here"
    run = a_run(here / "run")
    monkeypatch.chdir(here)
    text = json.dumps(SUMMARY | stated).replace("HERE/..", tmp_path.as_posix())
    (run / "summary.json").write_text(text.replace("HERE", here.as_posix()))
    draw_curves([run], here / "out")
    assert figures[-1].axes[0].get_title() == title


def test_two_settings_of_one_method_are_two_curves(tmp_path: Path, figures: list[Figure]) -> None:
    runs = []
    for name in ("small", "large"):
        runs.append(a_run(tmp_path / name))
        (runs[-1] / "summary.json").write_text(json.dumps(SUMMARY | {"name": name}))
    draw_curves(runs, tmp_path / "plots")
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    names = {text.get_text().partition(",")[0] for text in legend.get_texts()}
    assert names == {"small", "large"}
