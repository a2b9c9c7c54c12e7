"""The perplexity of a text that the task does not touch, before and after training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_language import lora, saved
from test_resume import sigterm_after

from lora.errors import DataError
from lora.finetune.config import RunConfig
from lora.finetune.forgetting import TOKENS_USED, perplexity, read_unrelated
from lora.finetune.models import Base, load_base
from lora.methods.lora import LoRAConfig

FLAGS = ("--base", "demo-lm-tiny", "--data", "tasks/shout", "--limit", 16, "--answered", 0,
         "--max-length", 64, "--batch-size", 4, "--epochs", 1, "--dtype", "float32")  # fmt: skip
TEXT = "Whoever reads this sentence learns nothing about the task. " * 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tiny() -> Base:
    return load_base("demo-lm-tiny", 1, "text", 0)


def forgetting(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "summary.json").read_text())["forgetting"]
    return result


def of(source: object, max_length: int = 64) -> RunConfig[LoRAConfig]:
    return RunConfig(unrelated_text=str(source), max_length=max_length, settings=LoRAConfig())


def rolling_windows(ids: list[int], first: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of each piece."""
    starts = range(0, len(ids), length)
    pieces = [ids[start : start + length] for start in starts]
    before = [first, *(piece[-1] for piece in pieces)]
    return [([token, *piece[:-1]], piece) for token, piece in zip(before, pieces, strict=False)]


@pytest.mark.parametrize("length", [1, 64, 1024])
def test_every_token_counts_once(tiny: Base, text: Path, length: int) -> None:
    """The perplexity is the one that transformers' own logits give, piece by piece."""
    unrelated = read_unrelated(of(text, length), tiny)
    assert unrelated is not None
    ids = tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert unrelated.tokens == len(ids)
    total = 0.0
    for context, piece in rolling_windows(ids, tiny.tokenizer.bos_token_id, length):
        with torch.no_grad():
            logits = tiny.model(torch.tensor([context])).logits[0]
        target = torch.tensor(piece)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    expected = math.exp(total / len(ids))
    assert perplexity(tiny.model, unrelated) == pytest.approx(expected, rel=1e-5)


def test_a_long_text_is_used_in_part(tiny: Base, text: Path) -> None:
    for source in ("python-docs", "demo-tiny"):
        unrelated = read_unrelated(of(source), tiny)
        assert unrelated is not None
        assert unrelated.tokens == TOKENS_USED


def test_rows_are_those_of_the_test_split(tiny: Base, tmp_path: Path) -> None:
    rows = [{"text": "one", "split": "train"}, {"text": " ", "split": "test"},
            {"text": "two", "split": "test"}, {"text": "three", "split": "test"}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unrelated = read_unrelated(of(path), tiny)
    assert unrelated is not None
    assert tiny.tokenizer.decode(unrelated.encoded.targets) == "two\n\nthree"


def test_a_text_that_cannot_be_read_is_named(tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("sentence,label\ngood,1\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    for name, message in {
        "none.txt": r"--unrelated-text .*none\.txt: no such file",
        "labels.csv": r"line 2 has no text in a column text, found sentence, label",
        "blank.jsonl": r"--unrelated-text .*blank\.jsonl has no text",
    }.items():
        with pytest.raises(DataError, match=message):
            read_unrelated(of(tmp_path / name), tiny)


@pytest.fixture(scope="module")
def full(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("full") / "run"
    flags = ("--method", "full", "--learning-rate", 0.01, "--unrelated-text", text)
    assert lora("train", *FLAGS, *flags, "--run-dir", run) == 0
    return run


def test_training_at_a_high_rate_forgets(
    full: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = forgetting(full)
    assert result["source"] == str(text)
    assert result["tokens"] == len(TEXT)  # the tokenizer is of bytes
    assert result["after"] > 1.5 * result["before"]
    assert lora("show", full) == 0
    line = f"before training {result['before']:.4f}  after {result['after']:.4f}"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_without_effect_forgets_nothing(
    full: Path, text: Path, tmp_path: Path, quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rate is so small that rounding leaves nothing of what it adds."""
    flags = ("--learning-rate", 1e-30, "--quantize", quantize, "--unrelated-text", text)
    assert lora("train", *FLAGS, *flags, "--run-dir", tmp_path / "run") == 0
    result = forgetting(tmp_path / "run")
    assert result["after"] == result["before"]
    assert (result["before"] == forgetting(full)["before"]) == (quantize == "none")
    assert f"before training {result['before']:.4f}" in capsys.readouterr().out


def test_a_resumed_run_measures_the_untrained_base_too(
    full: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = ("--method", "full", "--learning-rate", 0.01, "--unrelated-text", text)
    with monkeypatch.context() as patch:
        sigterm_after(2, patch)
        assert lora("train", *FLAGS, *flags, "--run-dir", run) == 143
    assert lora("train", "--resume", run) == 0
    assert forgetting(run) == forgetting(full)


def test_before_is_without_the_adapter_that_is_trained_further(
    full: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--learning-rate", 0.01, "--unrelated-text", text)
    assert lora("train", *FLAGS, *flags, "--run-dir", tmp_path / "first") == 0
    more = ("--adapter", tmp_path / "first" / "adapter", *flags)
    assert lora("train", *FLAGS, *more, "--run-dir", tmp_path / "second") == 0
    first, second = forgetting(tmp_path / "first"), forgetting(tmp_path / "second")
    assert first["before"] == second["before"] == forgetting(full)["before"]
    assert first["after"] != first["before"]


def test_a_text_that_cannot_be_scored_is_named(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--unrelated-text", text, "--run-dir", tmp_path / "run")
    assert lora("train", "--base", "demo", "--data", "demo-tiny", *flags) == 2
    message = "--unrelated-text has no effect with --task classification. Remove it."
    assert message in capsys.readouterr().err
    base = saved(tmp_path / "t5", "t5")
    for verb in ("plan", "train"):
        assert lora(verb, *FLAGS, "--base", base, *flags) == 2
        assert "--unrelated-text does not work with encoder-decoder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
