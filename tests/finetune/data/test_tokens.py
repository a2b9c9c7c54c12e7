"""Token ids: cached strictly, in batches that are a pure function of seed and epoch."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.finetune.data import tokens
from lora.finetune.data.corpus import Example
from lora.finetune.data.tokens import Encoded, ahead, batches, collate, sorted_batches, tokenize
from lora.finetune.models import load_skeleton

TEXTS = ["a good film", "not a wasted frame", "dull", "", "a good film"]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.integers(1, 20),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_batches_hold_every_row_once_and_depend_on_seed_and_epoch_alone(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    found = batches(lengths, size, seed, epoch)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in found)
    assert len(found) == -(-len(lengths) // size)
    torch.manual_seed(epoch)
    assert batches(lengths, size, seed, epoch) == found


def test_batches_differ_by_seed_and_epoch_and_pad_little() -> None:
    lengths = [4 + (i * 37) % 57 for i in range(1000)]
    orders = {str(batches(lengths, 16, s, e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9

    def padding(found: list[list[int]]) -> float:
        area = sum(len(b) * max(lengths[r] for r in b) for b in found)
        return 1 - sum(lengths) / area

    assert padding(batches(lengths, 16, 0, 0)) < 0.1
    assert padding(sorted_batches(lengths, 16)) < 0.05
    assert padding([list(range(i, min(i + 16, 1000))) for i in range(0, 1000, 16)]) > 0.3


def test_collate_pads_to_the_longest_of_the_batch() -> None:
    ids = torch.cat([torch.arange(1, n + 1, dtype=torch.int32) for n in (3, 5, 2, 9)])
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoded = Encoded(fields, torch.tensor([0, 3, 8, 10, 19]), torch.zeros(4), pad=7)
    batch, _ = collate(encoded, [[0], [2], [1]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 7], [1, 2, 7, 7, 7], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5]


def test_a_mask_is_made_where_the_tokenizer_leaves_it_out() -> None:
    tokenizer = load_skeleton("demo", 2, "classification").tokenizer
    tokenizer.model_input_names = ["input_ids"]
    found = tokenize(tokenizer, [Example("a good film", None, None)], [0.0], "classification", 16)
    assert found.fields["attention_mask"].tolist() == [1] * 5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> Any:
    return load_skeleton("demo", 2, "classification").tokenizer


def encoded(tokenizer: Any, texts: list[str] = TEXTS, length: int = 16, pair: str | None = None,
            targets: list[float] | None = None) -> Encoded:  # fmt: skip
    examples = [Example(text, pair, None) for text in texts]
    return tokenize(tokenizer, examples, targets or [0.0] * len(texts), "classification", length)


def same(one: Encoded, two: Encoded) -> bool:
    return (
        one.fields.keys() == two.fields.keys()
        and all(torch.equal(one.fields[name], two.fields[name]) for name in one.fields)
        and torch.equal(one.offsets, two.offsets)
        and one.pad == two.pad
    )


def test_ids_are_the_tokenizers_own(cache: Path, tokenizer: Any) -> None:
    found = encoded(tokenizer)
    for again in (found, encoded(tokenizer)):  # made, and read from the cache
        rows = [
            again.fields["input_ids"][start:end].tolist()
            for start, end in zip(again.offsets[:-1], again.offsets[1:], strict=True)
        ]
        assert rows == tokenizer(TEXTS)["input_ids"]
        assert again.lengths == [len(row) for row in rows]


def test_the_second_time_nothing_is_tokenised(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(tokenizer)
    monkeypatch.setattr(tokens, "_tokenize", lambda *_: pytest.fail("tokenised again"))
    assert same(encoded(tokenizer), first)
    labelled = encoded(tokenizer, targets=[1.0, 0.0, 1.0, 0.0, 1.0])  # labels are not cached
    assert labelled.targets.tolist() == [1, 0, 1, 0, 1]


def test_whatever_changes_the_ids_is_another_file(cache: Path, tokenizer: Any) -> None:
    for count, make in enumerate(
        (
            lambda: encoded(tokenizer),
            lambda: encoded(tokenizer, length=4),
            lambda: encoded(tokenizer, pair="and so on"),
            lambda: encoded(tokenizer, pair=""),
            lambda: encoded(tokenizer, TEXTS[:-1]),
            lambda: encoded(tokenizer, ["a good filma", *TEXTS[1:]]),
            lambda: encoded(tokenizer, ["a good film", "not a wasted framed", "ull", *TEXTS[3:]]),
            lambda: (tokenizer.add_tokens(["wasted frame"]), encoded(tokenizer)),
            lambda: (setattr(tokenizer, "truncation_side", "left"), encoded(tokenizer)),
            lambda: (setattr(tokenizer, "split_special_tokens", True), encoded(tokenizer)),
            lambda: (setattr(tokenizer, "model_input_names", ["input_ids"]), encoded(tokenizer)),
        ),
        1,
    ):
        make()
        make()
        assert len(list(cache.glob("*.safetensors"))) == count


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text", "another's"])
def test_a_damaged_file_is_made_anew(
    damage: str, cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = encoded(tokenizer)
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-4],
        "flipped": whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:],
        "emptied": b"",
        "text": b"no tensors",
        "another's": safetensors.torch.save({"offsets": torch.zeros(3)}),
    }[damage]
    path.write_bytes(broken)
    assert same(encoded(tokenizer), first)
    assert "damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole


HEADERS: dict[str, dict[str, Any]] = {
    "floats": {"dtype": "F32"},
    "unsigned": {"dtype": "U32"},
    "no such dtype": {"dtype": "I31"},
    "bytes": {"dtype": "F4"},
    "another dtype": {"dtype": "BF16"},
    "a column": {"shape": "column"},
    "a matrix": {"shape": "matrix"},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_was_changed_is_not_believed(
    name: str, cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = encoded(tokenizer)
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    (count,) = header["input_ids"]["shape"]
    shapes = {"column": [count, 1], "matrix": [1, count]}
    changes = HEADERS[name]
    header["input_ids"] |= changes
    header["input_ids"]["shape"] = shapes.get(changes.get("shape", ""), [count])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert same(encoded(tokenizer), first)
    assert "damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["a column", "floats", "fewer", "backwards", "past the end"])
def test_a_digest_alone_is_not_believed(
    name: str, cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = encoded(tokenizer)
    (path,) = cache.glob("*.safetensors")
    found = safetensors.torch.load(path.read_bytes())
    ids, offsets = found["input_ids"], found["offsets"]
    found |= {
        "a column": {"input_ids": ids[:, None]},
        "floats": {"input_ids": ids.float()},
        "fewer": {"offsets": offsets[[0, -1]]},
        "backwards": {"offsets": offsets[[0, 2, 1, *range(3, len(offsets))]]},
        "past the end": {"offsets": offsets + (offsets == offsets.max())},
    }[name]
    metadata = {"digest": tokens._digest(found)}
    path.write_bytes(safetensors.torch.save(found, metadata))
    assert same(encoded(tokenizer), first)
    assert "damaged" in capsys.readouterr().err


def test_without_a_place_for_the_cache_texts_are_tokenised(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "file"))
    assert encoded(tokenizer).lengths[0] == 5


def test_a_place_that_may_not_be_searched_is_no_place(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded(tokenizer)  # there is a file, which only somebody else may see
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(cache) in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    assert encoded(tokenizer).lengths[0] == 5
    assert capsys.readouterr().err == ""


def test_a_tokenizer_with_code_of_its_own_is_not_cached(cache: Path, tokenizer: Any) -> None:
    class Shouting(type(tokenizer)):  # type: ignore[misc]
        pass

    tokenizer.__class__ = Shouting
    encoded(tokenizer)
    assert not list(cache.glob("*"))


def test_a_full_disk_costs_the_cache_alone(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "write_whole", full)
    assert encoded(tokenizer).lengths[0] == 5
    assert "No space left" in capsys.readouterr().err
    assert not list(cache.glob("*.safetensors"))


def _slowly(folder: str, began: Any, made: Any) -> None:
    import os

    os.environ["LORA_CACHE"] = folder
    original = tokens._tokenize

    def slow(*arguments: Any) -> Any:
        with made.get_lock():
            made.value += 1
        began.set()
        time.sleep(0.5)
        return original(*arguments)

    tokens._tokenize = slow
    encoded(load_skeleton("demo", 2, "classification").tokenizer)


def test_a_second_process_waits_for_the_first(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    began, made = context.Event(), context.Value("i", 0)
    two = [context.Process(target=_slowly, args=(str(cache), began, made)) for _ in range(2)]
    two[0].start()
    assert began.wait(60)
    two[1].start()
    for process in two:
        process.join(60)
        assert process.exitcode == 0
    assert made.value == 1


def test_one_entry_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    asked = threading.Event()

    def make(entry: int) -> int:
        made.append(entry)
        if entry == 1:
            asked.set()
        return entry * 10

    found = ahead(iter(range(5)), make)
    assert next(found) == 0
    assert asked.wait(10)  # 1 is made though nobody asked for it yet
    assert made == [0, 1]
    assert list(found) == [10, 20, 30, 40]


def test_what_fails_ahead_is_raised_where_it_is_asked_for() -> None:
    found = ahead([1, 0], lambda entry: 1 // entry)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
