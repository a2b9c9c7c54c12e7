"""Every document that is read back has a schema: what passes works, what fails is named."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError, RunError
from lora.finetune import state
from lora.finetune.comparison.analysis import analysis_of
from lora.finetune.comparison.runs import Run
from lora.finetune.comparison.tables import markdown, rows
from lora.finetune.plots import draw_curves
from lora.finetune.record import answers_of, environment_of, metrics_at, metrics_of, summary_of
from lora.interop import documents

EVALUATED: dict[str, Any] = {
    "step": 2, "epoch": 1.0, "loss": 0.7, "first_loss": 0.8, "seconds": 1.5, "padding": 0.1,
    "dev_loss": 0.6, "dev": {"accuracy": 0.5, "macro_f1": 0.4},
}  # fmt: skip
STEP: dict[str, Any] = {
    "kind": "step", "step": 1, "steps": 2, "epoch": 1, "loss": 0.8, "learning_rate": 1e-3,
    "gradient_norm": 2.0, "examples": 4, "targets": 4, "tokens": 30, "padding": 0.1,
    "seconds": 0.5, "epoch_ends": False,
}  # fmt: skip
METRICS = [
    STEP,
    {**STEP, "step": 2, "loss": 0.6, "epoch_ends": True},
    {"kind": "evaluation", **EVALUATED},
]
SUMMARY: dict[str, Any] = {
    "method": "lora", "task": "classification", "base": "demo", "data": "demo", "seed": 0,
    "note": "", "trainable": 10, "adapter_parameters": 8, "parameters": 100,
    "learning_rate": 1e-3, "evaluations": [EVALUATED], "step": 2, "split": "test", "rows": 5,
    "loss": 0.5, "metrics": {"accuracy": 0.5, "macro_f1": 0.4}, "train_seconds": 1.5,
    "seconds": 2.5, "peak_bytes": 1000,
}  # fmt: skip
ENVIRONMENT = {"data": "d", "tokens": "t", "note": "", "python": "3.13", "cores": 2}
ODD = (None, True, -1, 0, 7, 0.5, 1e308, 3e8, 10**30, "", "x", [], [1], {}, {"a": "b"}, [[]])


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """What reading gives, and the error's text, "" without one."""
    try:
        return read(), ""
    except (RunError, CheckpointError) as error:
        return None, str(error)


def lines(table: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in table)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (tmp_path / "metrics.jsonl").write_bytes(lines(METRICS))
    return tmp_path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in inner:
        yield (*path, key)
        if isinstance(below, dict | list):
            yield from places(below, (*path, key))


def harmed(document: Any, seed: int) -> Any:
    """The document with one value of it replaced, or gone."""
    rng = random.Random(seed)
    found = copy.deepcopy(document)
    *path, last = rng.choice(list(places(found)))
    inside = found
    for key in path:
        inside = inside[key]
    if rng.random() < 0.2:
        del inside[last]
    else:
        inside[last] = rng.choice(ODD)
    return found


def test_what_a_run_wrote_reads_back(run: Path) -> None:
    assert summary_of(run) == SUMMARY
    assert environment_of(run) == ENVIRONMENT
    assert metrics_of(run) == METRICS


@pytest.mark.parametrize("key", SUMMARY)
def test_a_key_that_is_missing_or_of_another_kind_is_named(key: str, run: Path) -> None:
    path = run / "summary.json"
    path.write_text(json.dumps({k: v for k, v in SUMMARY.items() if k != key}))
    with pytest.raises(RunError, match=rf"summary.json is damaged: {key} is missing\. Remove "):
        summary_of(run)
    path.write_text(json.dumps(SUMMARY | {key: None}))
    with pytest.raises(RunError, match=rf"{key} must be .*, found None\. Remove {run}, and run"):
        summary_of(run)


def test_a_summary_that_passes_makes_a_table(run: Path) -> None:
    refused = 0
    for seed in range(2000):
        (run / "summary.json").write_text(json.dumps(harmed(SUMMARY, seed)))
        found, wrong = outcome(lambda: summary_of(run))
        refused += bool(wrong)
        if wrong:
            assert "summary.json is damaged: " in wrong
            assert wrong.endswith(", and run it again.")
        else:
            table = markdown(rows(analysis_of([Run(run, found)])))
            assert table.count("\n") == 3 + ("| (" in table)
    assert 1000 < refused < 2000


def test_metrics_that_pass_are_drawn(run: Path, tmp_path: Path) -> None:
    drawn = 0
    for seed in range(400):
        (run / "metrics.jsonl").write_bytes(lines(harmed(METRICS, seed)))
        found, wrong = outcome(lambda: metrics_of(run))
        assert not wrong or "metrics.jsonl, line " in wrong
        if drawn < 10 and not wrong and found != METRICS:
            drawn += 1
            pictures, wrong = outcome(lambda: draw_curves([run], tmp_path / "pictures"))
            assert pictures or "lines are missing" in wrong or "no finished epoch" in wrong
    assert drawn == 10


def test_an_epoch_beyond_reason_is_named_and_draws_no_tick_each(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(lines([*METRICS[:2], {**METRICS[2], "epoch": 3e8}]))
    with pytest.raises(
        RunError, match="line 3, is damaged: evaluation.epoch must be at most 1,000,000.0"
    ):
        metrics_of(run)


@pytest.mark.parametrize(
    ("payload", "wrong"),
    [
        (b"[]", "the document must be an object, found \\[\\]"),
        (b"{", "Invalid JSON: EOF"),
        (b"\xff{}", "Invalid JSON: expected value"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "Invalid JSON: number out of range"),
        (b"", "Invalid JSON: EOF"),
    ],
)
def test_what_is_no_json_is_named(payload: bytes, wrong: str, run: Path) -> None:
    (run / "summary.json").write_bytes(payload)
    with pytest.raises(RunError, match=wrong):
        summary_of(run)


def test_a_document_that_cannot_be_opened_is_named(run: Path) -> None:
    (run / "environment.json").unlink()
    (run / "environment.json").mkdir()
    with pytest.raises(RunError, match="environment.json cannot be read: Is a directory"):
        environment_of(run)


def test_a_note_that_is_a_number_is_named(run: Path) -> None:
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT | {"note": 5}))
    with pytest.raises(RunError, match="note must be a text, found 5. Restore it"):
        environment_of(run)


def test_answers_are_cut_at_line_feeds_alone(tmp_path: Path) -> None:
    table = [{"text": "a\u2028b\u2029c\u0085d\re"}, {"text": "f", "pair": "g"}, {"text": "h"}]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
    assert answers_of(tmp_path, "classification", 2) == table[:2]
    path.write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(RunError, match="line 2, is damaged: text must be a text, found 5"):
        answers_of(tmp_path, "classification", 8)
    path.write_text('{"messages": [{"role": "user", "content": null}]}\n')
    with pytest.raises(RunError, match="line 1, is damaged: messages.0.content must be a"):
        answers_of(tmp_path, "text", 8)


def test_metrics_at_a_checkpoint_end_with_its_step(run: Path) -> None:
    payload = lines(METRICS[:2])
    mark = len(payload), hashlib.sha256(payload).hexdigest()
    assert metrics_at(run, mark, 2) == (METRICS[:2], payload)
    assert metrics_at(run, mark, 0) == ([], b"")
    with pytest.raises(RunError, match="its checkpoint is of step 3"):
        metrics_at(run, mark, 3)
    with pytest.raises(RunError, match="is not as it was at its checkpoint"):
        metrics_at(run, (mark[0] - 1, mark[1]), 2)


def training_state() -> dict[str, Any]:
    found = state.random_state()
    return {
        "step": 3, "random": [found], "methods": {}, "base": {"w": "a"},
        "recorded": [0, "b"],
    }  # fmt: skip


def test_a_state_that_passes_can_be_set(tmp_path: Path) -> None:
    """numpy sets a position past its keys without a look, and would read other memory."""
    import numpy  # noqa: F401  (its state is part of the document)

    path, good = tmp_path / "training.json", json.loads(json.dumps(training_state()))
    refused = 0
    before = state.random_state()
    for seed in range(300):
        broken = copy.deepcopy(good)
        broken["random"][0] = harmed(good["random"][0], seed)
        if seed % 3 == 0:
            numpy_state = [*good["random"][0]["numpy"]]
            numpy_state[2] = random.Random(seed).choice((-5, 700, "x", 2**40))
            broken["random"][0] = good["random"][0] | {"numpy": numpy_state}
        path.write_text(json.dumps(broken))
        read = functools.partial(
            documents.read_document, path, state.STATES, CheckpointError, "Again."
        )
        found, wrong = outcome(read)
        refused += bool(wrong)
        if wrong:
            assert "training.json is damaged: random.0" in wrong
        else:
            state.set_random_state(found["random"][0])
    state.set_random_state(before)
    assert refused >= 100


@pytest.mark.parametrize("key", ["step", "random", "methods", "base", "recorded"])
def test_a_key_of_training_json_is_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps(training_state() | {key: 0.5}))
    with pytest.raises(CheckpointError, match=rf"training.json is damaged: {key} must be .* 0.5"):
        documents.read_document(path, state.STATES, CheckpointError, "Again.")
