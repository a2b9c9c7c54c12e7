"""`lora runs` and `lora show`: complete, interrupted and damaged runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)

from lora.finetune.listing import SORTS, RunRow, run_folders
from lora.finetune.run_folder import alone

RATES = {"good": "0.01", "slow": "0.00001"}


@pytest.fixture(scope="module")
def folder(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two complete runs, one that was cut off, one not begun, and a damaged one."""
    folder = tmp_path_factory.mktemp("runs")
    source = data(tmp_path_factory.mktemp("data") / "data")
    for name, rate in RATES.items():
        flags = ("--base", base, "--data", source, "--r", 2, "--epochs", 2, "--learning-rate", rate)
        assert lora("train", *flags, "--run-dir", folder / "more" / name) == 0
    for name, lines in {"cut": 1, "begun": 0}.items():
        run = folder / name
        run.mkdir()
        for file in ("config.toml", "environment.json", "metrics.jsonl"):
            payload = (folder / "more" / "good" / file).read_bytes()
            if file == "metrics.jsonl":
                payload = b"".join(payload.splitlines(keepends=True)[:lines])
            (run / file).write_bytes(payload)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.toml").write_text("r = [")
    for age, name in enumerate(("begun", "cut", "more/slow", "more/good")):
        for file in (folder / name).iterdir():
            os.utime(file, (1e9 - 1000 * age,) * 2)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *flags: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert lora("runs", *flags, "--json") == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_every_run_has_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {Path(row["run"]).name: row for row in listed(capsys, folder)}
    assert rows.keys() == {"good", "slow", "cut", "begun", "broken"}
    assert rows["good"]["state"] == "complete"
    summary = json.loads((folder / "more" / "good" / "summary.json").read_text())
    assert rows["good"]["score"] == summary["metrics"]["accuracy"]
    assert rows["good"]["learning_rate"] == 0.01
    assert rows["cut"]["state"] == "step 1 of 4"
    assert rows["cut"]["score"] is None
    assert rows["begun"]["state"] == "not begun"
    assert rows["broken"]["state"].startswith("damaged: ")


def test_filters_and_orders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*flags: object) -> list[str]:
        return [Path(row["run"]).name for row in listed(capsys, folder, *flags)]

    assert names()[1:] == ["begun", "cut", "slow", "good"]  # the broken one was made last
    assert names("--sort", "score")[:2] == ["good", "slow"]
    assert names("--sort", "method", "--state", "complete") == ["slow", "good"]
    assert names("--state", "incomplete", "--method", "lora") == ["begun", "cut"]
    assert names("--limit", 1, "--sort", "score") == ["good"]
    assert names("--data", "no such") == []
    assert names("--method", "full") == []
    config = folder / "begun" / "config.toml"
    text = config.read_text()
    config.write_text(f'name = "mine"\n{text}')
    assert names("--method", "mine") == ["begun"]
    assert set(names("--method", "lora")) == {"begun", "cut", "slow", "good"}
    config.write_text(text)
    os.utime(config, (1e9,) * 2)


def test_a_run_that_a_process_trains_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(folder / "cut"):
        rows = {Path(row["run"]).name: row for row in listed(capsys, folder)}
    assert rows["cut"]["state"] == "training: step 1 of 4"
    assert rows["begun"]["state"] == "not begun"


def test_the_best_of_each_metric_come_first(tmp_path: Path) -> None:
    """A perplexity of 3 and an accuracy of 0.9 are not compared."""

    def row(metric: str, score: float | None) -> RunRow:
        return RunRow(tmp_path, "", "", "", "", 0, None, "", 0.0, metric, score)

    best = [
        row("accuracy", 0.9),
        row("accuracy", 0.8),
        row("perplexity", 3.0),
        row("perplexity", 4.0),
    ]
    assert sorted([row("", None), *reversed(best)], key=SORTS["score"]) == [*best, row("", None)]


def test_the_table_counts_what_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("runs", folder, "--state", "complete") == 0
    shown = capsys.readouterr().out
    assert "| accuracy 1 " in shown or "accuracy 0." in shown
    assert "runs: 2 of 5" in shown
    assert lora("runs", folder / "none") == 2
    assert "is not a folder. Pass one that holds runs" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert lora("runs", folder / "empty") == 2
    assert "no run in there. Run lora train" in capsys.readouterr().err
    assert lora("runs", folder, "--limit", 0) == 2
    (folder / "empty").rmdir()


def test_show_says_what_a_run_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("show", folder / "more" / "good") == 0
    shown = capsys.readouterr().out
    for part in ("complete", "learning_rate = 0.01", "torch: ", "| 4 ", "trainable parameters"):
        assert part in shown
    assert re.search(r"trained in .*, [\d,]+ tokens/s, 0\.\d\d MiB saved$", shown, re.MULTILINE)
    good = folder / "more" / "good"
    assert f"next: lora predict {good} --text ..." in shown
    assert f"lora train --config {good}/config.toml --run-dir {good}-again" in shown
    assert lora("show", folder / "cut") == 0
    shown = capsys.readouterr().out
    assert "step 1 of 4" in shown
    assert f"next: lora train --resume {folder / 'cut'}" in shown
    assert lora("show", folder) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_a_diverged_run_is_trained_anew_at_a_lower_rate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed, it would take the same steps, and diverge again."""
    run = tmp_path / "run"
    shutil.copytree(folder / "cut", run)
    (run / "diverged.json").write_text("{}")
    for command in (("show", run), ("report", run)):
        assert lora(*command) == (2 if command[0] == "report" else 0)
        said = "".join(capsys.readouterr())
        assert f"lora train --config {run}/config.toml --learning-rate 0.005" in said
        assert "--resume" not in said


def test_a_run_that_is_being_made_is_none(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "begun", tmp_path / ".run.1f")
    shutil.copytree(folder / "begun", tmp_path / "run")
    assert list(run_folders(tmp_path)) == [tmp_path / "run"]


def test_a_folder_that_cannot_be_read_hides_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / "begun", tmp_path / name)
    is_file = Path.is_file

    def forbidden(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert list(run_folders(tmp_path)) == [tmp_path / "b"]


def test_a_summary_holds_what_a_run_costs(folder: Path) -> None:
    run = folder / "more" / "good"
    summary = json.loads((run / "summary.json").read_text())
    file = run / "adapter" / "adapter_model.safetensors"
    assert summary["adapter_bytes"] == file.stat().st_size
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(row["tokens"] for row in rows if row["kind"] == "step")
    assert summary["tokens_per_second"] == pytest.approx(tokens / summary["train_seconds"])


def test_show_reads_a_run_from_before_its_costs_were_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "more" / "good", tmp_path / "old")
    summary = json.loads((tmp_path / "old" / "summary.json").read_text())
    del summary["adapter_bytes"], summary["tokens_per_second"]
    (tmp_path / "old" / "summary.json").write_text(json.dumps(summary))
    assert lora("show", tmp_path / "old") == 0
    shown = capsys.readouterr().out
    assert "trainable parameters" in shown
    assert "tokens/s" not in shown
