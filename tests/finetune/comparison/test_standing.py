"""Whether a folder holds the run that is asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.finetune.comparison.standing import _same
from lora.finetune.config import parse_run, to_table


def test_a_run_that_decided_what_was_left_open_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.tsv").touch()
    given = parse_run(["--data", "rows.tsv", "--modules-to-save", "classifier.out"])
    found = replace(
        given,
        data=(str(tmp_path / "rows.tsv"),),
        dtype="float32",
        learning_rate=0.001,
        settings=replace(given.settings, modules_to_save=("classifier",)),
    )
    requested, recorded = to_table(given), to_table(found)
    asked = {key: requested.get(key) for key in ("data", "dtype", "learning_rate")}
    asked["modules_to_save"] = ["classifier.out"]
    assert _same(requested, recorded, asked)
    for changed in ({"dtype": "float32"}, {"learning_rate": 0.001}):  # what it decided
        assert _same(requested | changed, recorded, asked)
    others: tuple[dict[str, Any], ...] = (
        {"dtype": "bfloat16"}, {"learning_rate": 0.01}, {"modules_to_save": ["other"]},
        {"data": ["other.tsv"]},
    )  # fmt: skip
    for changed in others:
        assert not _same(requested | changed, recorded, asked), changed
    explicit = {key: value for key, value in asked.items() if key not in ("dtype", "learning_rate")}
    assert not _same(requested, recorded, explicit)  # it was told both
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert not _same(requested, recorded, asked)  # rows.tsv is another file here
    assert _same(requested | {"data": ["../rows.tsv"]}, recorded, asked)


def test_a_run_with_other_weights_of_the_loss_is_another_run() -> None:
    flags = [
        *(["--class-weights", "0", weight] for weight in ("2", "3")),
        *(["--label-smoothing", share] for share in ("0.1", "0")),
    ]
    runs = [to_table(parse_run(["--data", "opinions/films", *more])) for more in flags]
    for mine, other in itertools.permutations(runs, 2):
        assert _same(mine, mine, {})
        assert not _same(mine, other, {})
