"""The table of a comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from lora.errors import RunError
from lora.finetune.comparison.analysis import Analysis, analyse, analysis_of
from lora.finetune.comparison.runs import Run, Try, still_falling
from lora.finetune.comparison.tables import (
    all_tables,
    by_task,
    markdown,
    notes,
    rate_rows,
    rows,
    task_rows,
)
from lora.finetune.record import write_lines


def summary(method: str, seed: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "split": "test", "metrics": metrics, "trainable": 10,
        "parameters": 100, "learning_rate": 1e-3, "evaluations": [{"loss": 2.0}, {"loss": 1.0}],
        "train_seconds": 3.0, "peak_bytes": 2**20, "base": "b", "data": "a", "rows": 4, **more,
    }  # fmt: skip


WHOLE: dict[str, Any] = {
    "task": "text", "note": "", "adapter_parameters": 10, "step": 2, "loss": 1.0, "seconds": 4.0,
    "evaluations": [
        {"step": 2, "epoch": 1.0, "loss": 1.0, "first_loss": 2.0, "seconds": 1.0, "padding": 0.0,
         "dev_loss": 1.0, "dev": {"perplexity": 2.7}}
    ],
}  # fmt: skip
"""What a summary on disk has besides."""


def analysed(*summaries: Any, right: dict[str, tuple[bool, ...]] | None = None) -> Analysis:
    runs = [
        Run(Path(f"{s['method']}-{s['seed']}"), s, {}, (right or {}).get(s["method"]))
        for s in summaries
    ]
    return analysis_of(runs)


def test_tasks_have_a_row_each_and_the_base_comes_first() -> None:
    scores = {"exact_match": 0.5, "bleu": 1.0, "exact_match/a": 0.25, "exact_match/b": 0.75}
    scores |= {"bleu/a": 1.0, "bleu/b": 1.0, "letters/b": 0.9}
    none = dict.fromkeys(scores, 0.0)
    runs = [
        summary("lora", 0, scores, baseline=none),
        summary("lora", 1, {name: value + 0.1 for name, value in scores.items()}),
        summary("full", 0, scores),
    ]
    table = rows(analysed(*runs))
    assert table[0][5:7] == ("test exact_match", "train s")
    assert [row[0] for row in table] == ["method", "(the base)", "lora", "full"]
    assert [row[5] for row in table[1:]] == ["0.00 %", "55.00 ± 7.07 %", "50.00 %"]
    assert len({len(row) for row in table}) == 1
    assert task_rows(analysed(*runs)) == [
        ("task", "metric", "(the base)", "lora", "full"),
        ("a", "exact_match", "0.00 %", "30.00 ± 7.07 %", "25.00 %"),
        ("b", "exact_match", "0.00 %", "80.00 ± 7.07 %", "75.00 %"),
        ("b", "letters", "0.00 %", "95.00 ± 7.07 %", "90.00 %"),
    ]
    assert task_rows(analysed(*runs[2:]))[0] == ("task", "metric", "full")
    assert task_rows(analysed(summary("lora", 0, {"accuracy": 0.5}))) == []
    assert markdown(task_rows(analysed(*runs))) in all_tables(analysed(*runs))


def test_what_is_saved_and_what_is_forgotten_have_columns() -> None:
    text = {"source": "plays.txt", "tokens": 9, "before": 20.0}
    runs = [
        summary(method, seed, {"accuracy": 0.5}, adapter_bytes=3 * 2**18,
                **({"forgetting": {**text, "after": after}} if after else {}))
        for method, seed, after in (("lora", 0, 20.5), ("lora", 1, 21.5), ("head", 0, None))
    ]  # fmt: skip
    table = rows(analysed(*runs))
    cells = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    assert [each["unrelated text"] for each in cells] == ["20.00 to 21.00", ""]
    assert [each["saved MiB"] for each in cells] == ["0.8", "0.8"]
    assert "unrelated text: its perplexity before and after training" in notes(analysed(*runs))
    head = rows(analysed(summary("lora", 0, {"accuracy": 0.5}, adapter_bytes=2), summary(
        "head", 0, {"accuracy": 0.5})))[0]  # fmt: skip
    assert not {"unrelated text", "saved MiB"} & {*head}


def test_the_memory_is_that_of_training_if_all_runs_measured_it() -> None:
    old = [summary(method, 0, {"accuracy": 0.5}) for method in ("lora", "full")]
    new = [{**run, "training_bytes": 3 * 2**19} for run in old]
    for runs, head, cell in (
        (old, "peak MiB of the run", "1.0"),
        ([old[0], new[1]], "peak MiB of the run", "1.0"),
        (new, "peak MiB", "1.5"),
    ):
        table = rows(analysed(*runs))
        assert (table[0][-1], table[1][-1]) == (head, cell)
        assert f"{head} is " in notes(analysed(*runs))


def test_other_metrics_are_no_share() -> None:
    assert rows(analysed(summary("lora", 0, {"pearson": 0.51239})))[1][5] == "0.5124"


def test_an_accuracy_has_its_interval_and_a_test_against_full() -> None:
    more = {"rows": 200, "data": "opinions/films", "majority": {"dev": 0.6, "test": 0.55}}
    runs = [
        summary("lora", 0, {"accuracy": 0.8}, **more),
        summary("full", 0, {"accuracy": 0.9}, **more),
    ]
    right = {"lora": (True,) * 160 + (False,) * 40, "full": (True,) * 180 + (False,) * 20}
    analysis = analysed(*runs, right=right)
    table = rows(analysis)
    assert table[0][5:8] == ("test accuracy", "95 % interval", "against full")
    assert table[1][0] == "(most frequent class)"
    assert table[1][5:8] == ("55.00 %", "", "")
    assert table[2][5:7] == ("80.00 %", "73.9 to 85.0 %")
    assert table[2][7].startswith("full is better by 10.0 points (5.8 to 14.2), p < 0.001")
    assert table[3][7] == ""
    assert len({len(row) for row in table}) == 1
    words = notes(analysis)
    assert "200 test rows of opinions/films" in words
    assert "covers the choice of the test rows, not that of the seed" in words
    assert "McNemar" in words
    several = analysed(*runs, summary("lora", 1, {"accuracy": 0.8}, **more), right=right)
    assert "McNemar" not in notes(several)
    assert "covers the choice of the test rows and of the seeds" in notes(several)
    assert "Trained once, so that this holds for the rows only: full." in notes(several)
    both = analysed(*runs, *({**run, "seed": 1} for run in runs), right=right)
    assert "rows only" not in notes(both)


def test_of_one_row_there_is_no_interval() -> None:
    summaries = [summary(method, 0, {"accuracy": 1.0}) for method in ("lora", "full")]
    analysis = analysed(*summaries, right=dict.fromkeys(("lora", "full"), (True,)))
    assert [method.interval for method in analysis.methods] == [None, None]
    assert "The differences were not tested." in analysis.verdict


def test_a_rouge_has_an_interval_from_the_score_of_each_row(tmp_path: Path) -> None:
    """As predictions.jsonl has them; one run each is tested by pairs of rows, not by McNemar's."""
    folders = []
    for method, gain in (("lora", 0.1), ("full", 0.0)):
        scores = [0.3 + 0.002 * row + gain * (row % 3) for row in range(100)]
        folder = tmp_path / method
        folder.mkdir()
        (folder / "config.toml").write_text(f'method = "{method}"\ndata = ["texts"]\n')
        (folder / "environment.json").write_text('{"data": "", "tokens": "", "note": ""}')
        write_lines(folder / "metrics.jsonl", [])
        write_lines(folder / "predictions.jsonl", [
            {"prompt": "p", "prediction": "x", "references": ["a b"], "rougeL": score}
            for score in scores
        ])  # fmt: skip
        mean = sum(scores) / 100
        given = summary(method, 0, {"rougeL": mean, "bleu": 1.0}, rows=100, **WHOLE)
        (folder / "summary.json").write_text(json.dumps(given))
        folders.append(folder)
    analysis = analyse(folders)
    first, second = analysis.methods
    assert first.low < first.mean < first.high
    assert rows(analysis)[1][5] == "49.80 %"
    (versus,) = first.versus
    assert versus.value == pytest.approx(first.mean - second.mean) == pytest.approx(0.099)
    assert versus.test == "bootstrap"
    assert versus.words.startswith("lora is better by 9.9 points")
    assert "McNemar" not in notes(analysis)
    path = folders[0] / "predictions.jsonl"
    path.write_text(path.read_text().replace('"rougeL": ', '"other": ', 1))
    assert analyse(folders).methods[0].interval is None


def test_a_rate_is_shown_by_the_metric_that_it_was_tried_by(tmp_path: Path) -> None:
    """Dev may have texts without prompts, which have a perplexity only."""
    tried = [Try(tmp_path, rate, 1000, score, "perplexity") for rate, score in ((0.1, 9.0), (1, 4))]
    run = Run(tmp_path, summary("lora", 0, {"rougeL": 0.5}))
    analysis = analysis_of([run], tried)
    assert rate_rows(analysis)[1] == ("lora", "1", "0.1: 9.0000, 1: 4.0000")
    assert analysis.searched_by == "perplexity"


def test_a_task_without_answers_makes_bleu_no_share() -> None:
    """Of two data sets one has no prompts: BLEU is of the other only, and from 0 to 100."""
    scores = {"perplexity": 4.0, "perplexity/plain": 5.0, "perplexity/qa": 3.0}
    scores |= {"exact_match/qa": 0.5, "bleu/qa": 69.14, "rougeL/qa": 0.6}
    assert task_rows(analysed(summary("lora", 0, scores))) == [
        ("task", "metric", "lora"),
        ("plain", "perplexity", "5.0000"),
        ("qa", "perplexity", "3.0000"),
    ]
    scores = {"bleu": 69.14, "bleu/a": 69.14, "bleu/b": 60.0, "exact_match/a": 0.5}
    assert task_rows(analysed(summary("lora", 0, scores)))[1] == ("a", "bleu", "69.1400")


def test_a_repeated_run_is_no_further_seed() -> None:
    once = [summary("lora", seed, {"accuracy": 0.5 + seed / 10}) for seed in range(3)]
    runs = [Run(Path(f"lora-{s['seed']}{more}"), s) for more in ("", "-again") for s in once]
    (again,), (first,) = (analysis_of(each).methods for each in (runs, runs[:3]))
    assert again.seeds == first.seeds == (0, 1, 2)
    assert again.deviation == first.deviation
    assert again.folders == first.folders
    (warning,) = set(again.warnings) - set(first.warnings)
    names = "lora-0-again, lora-1-again, lora-2-again"
    assert warning == f"left out, since other runs have the same seeds: {names}"


def test_runs_that_read_other_rows_are_not_compared() -> None:
    """Even if the labels of test are the same. With another --limit they may be others."""
    first, second = (summary(name, 0, {"accuracy": 0.5}) for name in ("lora", "full"))
    runs = [Run(Path("lora"), first, {}, content="a"), Run(Path("full"), second, {}, content="b")]
    with pytest.raises(RunError, match="full read other rows of a than lora: the files changed"):
        analysis_of(runs)
    analysis_of([replace(runs[0], settings={"limit": 5}), runs[1]])


def test_a_search_on_other_data_is_not_the_methods(tmp_path: Path) -> None:
    run = Run(tmp_path, summary("lora", 0, {"accuracy": 0.5}), {"method": "lora", "data": ["a"]})
    tried = [
        Try(tmp_path, rate, 1000, 0.5 + rate, "accuracy", {"method": "lora", "data": [data]})
        for data in ("a", "b")
        for rate in (0.001, 0.002, 0.003)
        if data == "b" or rate < 0.003
    ]
    (result,) = analysis_of([run], tried).methods
    assert result.search is not None
    assert [each.rate for each in result.search.tried] == [0.001, 0.002]
    (result,) = analysis_of([run], tried[2:]).methods
    assert result.search is None


def test_equal_methods_are_ordered_by_their_size() -> None:
    runs = [
        summary("lora", 0, {"accuracy": 0.5}),
        summary("head", 0, {"accuracy": 0.5}, trainable=5),
    ]
    assert [each.name for each in analysed(*runs).ranked] == ["head", "lora"]


def test_the_noise_floor_is_known_beside_another_comparison() -> None:
    """Of two ranks: the names of the groups have the rank in them."""
    runs = [
        Run(Path(f"{name}-{r}"), summary("lora", 0, {"accuracy": 0.5}, **more), {"r": r, **more})
        for name, more in (("lora", {}), ("lora-again", {"name": "lora-again"}))
        for r in (2, 4)
    ]
    again = {result.name: result.again for result in analysis_of(runs).methods}
    assert again == {
        "lora r=2": "", "lora r=4": "", "lora-again r=2": "lora r=2", "lora-again r=4": "lora r=4"
    }  # fmt: skip


def test_runs_that_are_scored_by_different_metrics_are_not_compared() -> None:
    scores = {"accuracy": 0.5, "macro_f1": 0.4}
    runs = [summary("lora", 0, scores), summary("full", 0, dict(reversed(scores.items())))]
    with pytest.raises(
        RunError, match=r"scored by macro_f1, and lora-0 by accuracy.* same --metric"
    ):
        analysed(*runs)


def test_the_noise_floor_is_no_contender() -> None:
    """The first method, trained again: it is neither the best nor on the frontier."""
    floor = summary("lora", 10_000, {"accuracy": 0.9}, name="lora-again")
    runs = [
        summary("lora", 0, {"accuracy": 0.5}),
        summary("head", 0, {"accuracy": 0.4}, trainable=5),
    ]
    analysis = analysed(*runs, floor)
    assert analysis.verdict[0] == "lora has the best test accuracy: 50.0 %."
    tie = analysed(*(summary(name, 0, {"accuracy": 0.5}) for name in ("lora", "full", "head")))
    assert tie.verdict[0] == "lora, full, head all have the best test accuracy: 50.0 %."
    assert "lora-again" not in " ".join(analysis.verdict)
    assert [result.name for result in analysis.ranked] == ["lora-again", "lora", "head"]
    assert {result.name: result.again for result in analysis.methods} == {
        "lora": "", "head": "", "lora-again": "lora"
    }  # fmt: skip
    assert "lora-again is lora trained again with other seeds" in notes(analysis)
    assert "On the frontier: lora, head." in notes(analysis)


@pytest.mark.parametrize(
    ("losses", "falling"),
    [
        ([1.0] * 40, False),
        ([1.0 - 0.02 * step for step in range(40)], True),
        ([1.0 - 0.02 * step for step in range(19)], False),  # too short to say
        ([1.0 - 0.002 * step for step in range(200)], True),
        ([1.0 + 0.5 * (-1) ** step for step in range(40)], False),  # noise
        ([2.0 - 0.1 * min(step, 15) for step in range(200)], False),  # fell long ago
    ],
)
def test_a_loss_that_still_falls(losses: list[float], falling: bool, tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [
        {"kind": "step", "step": step + 1, "steps": len(losses), "epoch": 1, "loss": loss,
         "learning_rate": 1e-3, "gradient_norm": 1.0, "examples": 8, "targets": 8, "tokens": 80,
         "padding": 0.0, "seconds": 1.0, "epoch_ends": step + 1 == len(losses)}
        for step, loss in enumerate(losses)
    ])  # fmt: skip
    assert still_falling(tmp_path) is falling


def test_scores_by_task() -> None:
    found = by_task({"bleu": 1.0, "bleu/a": 2.0, "perplexity": 3.0, "perplexity/b": 4.0})
    assert found == [
        ("task", "bleu", "perplexity"),
        ("all", "1.0000", "3.0000"),
        ("a", "2.0000", ""),
        ("b", "", "4.0000"),
    ]


def test_runs_on_other_rows_are_not_compared() -> None:
    runs = [
        Run(Path(name), cast("Any", summary(name, 0, {"accuracy": 0.5})), references=[[label]])
        for name, label in (("lora", "0"), ("full", "1"))
    ]
    with pytest.raises(RunError, match=r"full/predictions.jsonl has other rows than that of lora"):
        analysis_of(runs)
