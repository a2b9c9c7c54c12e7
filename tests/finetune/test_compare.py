"""The table of a comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora.finetune.compare import _same, by_task, markdown, rows
from lora.finetune.config import parse_run, to_table


def summary(method: str, seed: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "split": "test", "metrics": metrics, "trainable": 10,
        "parameters": 100, "learning_rate": 1e-3, "evaluations": [{"loss": 2.0}, {"loss": 1.0}],
        "train_seconds": 3.0, "peak_bytes": 2**20, **more,
    }  # fmt: skip


def test_tasks_have_a_column_each_and_the_base_comes_first() -> None:
    scores = {"exact_match": 0.5, "bleu": 1.0, "exact_match/a": 0.25, "exact_match/b": 0.75}
    none = dict.fromkeys(scores, 0.0)
    found = rows(
        [
            summary("lora", 0, scores, baseline=none),
            summary("lora", 1, {name: value + 0.1 for name, value in scores.items()}),
            summary("full", 0, scores),
        ]
    )
    assert found[0][5:8] == ("test exact_match", "a", "b")
    assert found[1][0] == "(the base)"
    assert found[1][5:8] == ("0.00 %", "0.00 %", "0.00 %")
    assert found[2][5:8] == ("55.00 ± 7.07 %", "30.00 ± 7.07 %", "80.00 ± 7.07 %")
    assert found[3][5:8] == ("50.00 %", "25.00 %", "75.00 %")
    assert len({len(row) for row in found}) == 1
    assert markdown(found).count("\n") == 5


def test_other_metrics_are_no_share() -> None:
    found = rows([summary("lora", 0, {"pearson": 0.51239})])
    assert found[1][5] == "0.5124"


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
    asked = parse_run(["--modules-to-save", "norm"])
    assert not _same(to_table(asked), to_table(parse_run(["--modules-to-save", "classifier"])))
    found = replace(asked, settings=replace(asked.settings, trainable_token_indices=(5,)))
    assert not _same(to_table(asked), to_table(found))
