"""The table of a comparison."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.errors import RunError
from lora.finetune.compare import _against_full, _same
from lora.finetune.config import parse_run, to_table
from lora.finetune.tables import both_tables, by_task, markdown, notes, rows, task_rows


def summary(method: str, seed: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "split": "test", "metrics": metrics, "trainable": 10,
        "parameters": 100, "learning_rate": 1e-3, "evaluations": [{"loss": 2.0}, {"loss": 1.0}],
        "train_seconds": 3.0, "peak_bytes": 2**20, **more,
    }  # fmt: skip


def test_tasks_have_a_row_each_and_the_base_comes_first() -> None:
    scores = {"exact_match": 0.5, "bleu": 1.0, "exact_match/a": 0.25, "exact_match/b": 0.75}
    scores |= {"bleu/a": 1.0, "bleu/b": 1.0, "letters/b": 0.9}
    none = dict.fromkeys(scores, 0.0)
    runs = [
        summary("lora", 0, scores, baseline=none, rows=4, data="a b"),
        summary("lora", 1, {name: value + 0.1 for name, value in scores.items()}),
        summary("full", 0, scores),
    ]
    found = rows(runs)
    assert found[0][5:7] == ("test exact_match", "train s")
    assert [row[0] for row in found] == ["method", "(the base)", "lora", "full"]
    assert [row[5] for row in found[1:]] == ["0.00 %", "55.00 ± 7.07 %", "50.00 %"]
    assert len({len(row) for row in found}) == 1
    assert task_rows(runs) == [
        ("task", "metric", "(the base)", "lora", "full"),
        ("a", "exact_match", "0.00 %", "30.00 ± 7.07 %", "25.00 %"),
        ("b", "exact_match", "0.00 %", "80.00 ± 7.07 %", "75.00 %"),
        ("b", "letters", "0.00 %", "95.00 ± 7.07 %", "90.00 %"),
    ]
    assert task_rows(runs[2:])[0] == ("task", "metric", "full")
    assert task_rows([summary("lora", 0, {"accuracy": 0.5})]) == []
    assert markdown(task_rows(runs)) in both_tables(runs)


def test_the_memory_is_that_of_training_if_all_runs_measured_it() -> None:
    old = [summary(method, 0, {"accuracy": 0.5}, rows=9, data="a") for method in ("lora", "full")]
    new = [{**run, "training_bytes": 3 * 2**19} for run in old]
    for runs, head, cell in (
        (old, "peak MiB of the run", "1.0"),
        ([old[0], new[1]], "peak MiB of the run", "1.0"),
        (new, "peak MiB", "1.5"),
    ):
        table = rows(runs)
        assert (table[0][-1], table[1][-1]) == (head, cell)
        assert f"{head} is " in notes(runs)


def test_other_metrics_are_no_share() -> None:
    found = rows([summary("lora", 0, {"pearson": 0.51239})])
    assert found[1][5] == "0.5124"


def test_an_accuracy_has_its_interval_and_a_test_against_full() -> None:
    """Of one seed. With several, the table shows their spread."""
    more = {"rows": 200, "data": "opinions/films", "majority": {"dev": 0.6, "test": 0.55}}
    against = {"points": -2.5, "p": 0.0123}
    runs: Any = [
        summary("lora", 0, {"accuracy": 0.8}, against_full=against, **more),
        summary("full", 0, {"accuracy": 0.825}, **more),
    ]
    table = rows(runs)
    assert table[0][5:8] == ("test accuracy", "95 % interval", "against full")
    assert table[1][0] == "(most frequent class)"
    assert table[1][5:8] == ("55.00 %", "", "")
    assert table[2][5:8] == (
        "80.00 %", "73.9 to 85.0 %", "full is better by 2.5 points, p = 0.012",
    )  # fmt: skip
    assert table[3][5:8] == ("82.50 %", "76.6 to 87.1 %", "")
    assert len({len(row) for row in table}) == 1
    words = notes(runs)
    assert "200 test rows of opinions/films" in words
    assert "does not cover the seed" in words
    assert "McNemar" in words
    several = rows([*runs, summary("lora", 1, {"accuracy": 0.7}, **more)])
    assert several[0][6] == "train s"
    assert "interval" not in notes([*runs, runs[0]])


def test_runs_are_tested_against_full_with_the_same_seed(tmp_path: Path) -> None:
    """Row by row, on their predictions."""

    def run(method: str, right: int, seed: int = 0) -> Any:
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir(parents=True)
        lines = [{"prediction": "a" if n < right else "b", "label": "a"} for n in range(20)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "predictions.jsonl").write_text(text)
        return summary(method, seed, {"accuracy": right / 20}, task="classification")

    runs = [run("lora", 12), run("full", 18), run("lora", 15, seed=1)]
    folders = [tmp_path / name for name in ("lora-0", "full-0", "lora-1")]
    lora, full, other_seed = _against_full(runs, folders)
    assert lora["against_full"]["points"] == pytest.approx(-30)
    assert lora["against_full"]["p"] == pytest.approx(2 * 0.5**6)
    assert "against_full" not in full
    assert "against_full" not in other_seed
    (tmp_path / "lora-0" / "predictions.jsonl").write_text('{"prediction": "a", "label": "a"}\n')
    with pytest.raises(RunError, match="has 1 rows, that of full fine-tuning 20"):
        _against_full(runs, folders)


def test_scores_by_task() -> None:
    found = by_task({"bleu": 1.0, "bleu/a": 2.0, "perplexity": 3.0, "perplexity/b": 4.0})
    assert found == [
        ("task", "bleu", "perplexity"),
        ("all", "1.0000", "3.0000"),
        ("a", "2.0000", ""),
        ("b", "", "4.0000"),
    ]


def test_a_run_that_resolved_what_was_asked_is_the_same_run() -> None:
    for flags, settings in (
        (
            ["--base", "demo-lm-tiny", "--add-tokens", "<x>"],
            {"trainable_token_indices": {"e": [5]}},
        ),
        (["--modules-to-save", "classifier.out"], {"modules_to_save": ("classifier",)}),
    ):
        asked = parse_run(flags)
        found = replace(asked, settings=replace(asked.settings, **settings))
        assert _same(to_table(asked), to_table(found)), flags
    weighted = [parse_run(["--class-weights", "0", weight]) for weight in ("2", "3")]
    smooth = [*weighted, *(parse_run(["--label-smoothing", share]) for share in ("0.1", "0"))]
    for mine, other in itertools.permutations(map(to_table, smooth), 2):
        assert _same(mine, mine)
        assert not _same(mine, other)
    asked = parse_run(["--modules-to-save", "norm"])
    assert not _same(to_table(asked), to_table(parse_run(["--modules-to-save", "classifier"])))
    found = replace(asked, settings=replace(asked.settings, trainable_token_indices=(5,)))
    assert not _same(to_table(asked), to_table(found))
