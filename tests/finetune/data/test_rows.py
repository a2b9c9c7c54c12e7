"""One reader for every task: each ending gives the same rows, and what is broken is named."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lora.errors import DataError
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import from_row, read_conversations
from lora.finetune.data.corpus import read_examples, read_predictions, unlabelled
from lora.finetune.data.rows import BadRows, read_rows, read_source
from lora.finetune.metrics import score

ROWS = [{"text": f"a film, number {i}", "label": "ab"[i % 2]} for i in range(20)]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def parquet(path: Path, **columns: Any) -> str:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    arrays = {name: arrow.array(cells) for name, cells in columns.items()}
    pyarrow.parquet.write_table(arrow.table(arrays), path)
    return str(path)


def raw(cells: list[Any], kind: Any, seen_as: Any) -> Any:
    """Arrow cells whose bytes are seen as another type."""
    arrow = pytest.importorskip("pyarrow")
    return arrow.array(cells, kind).view(seen_as)


@pytest.mark.parametrize("end", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_classification_takes_every_ending(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{end}"
    if end == "parquet":
        parquet(path, text=[r["text"] for r in ROWS], label=[r["label"] for r in ROWS])
    else:
        text = {
            "jsonl": "\n".join(map(json.dumps, ROWS)),
            "json": json.dumps({"data": ROWS}),
            "csv": "text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS),
            "tsv": "text\tlabel\n" + "".join("\t".join(r.values()) + "\n" for r in ROWS),
        }[end]
        write(path, text)
    corpus = read_examples(str(path))
    some = [*corpus.train, *corpus.dev, *corpus.test]
    assert sorted((e.text, e.label) for e in some) == sorted((r["text"], r["label"]) for r in ROWS)
    assert corpus.labels == ("a", "b")


def test_a_text_file_is_labelled_line_by_line(tmp_path: Path) -> None:
    rows, notes = unlabelled(write(tmp_path / "x.txt", "one\n\ntwo\u2028three\n"), Columns())
    assert [row.text for row in rows] == ["one", "two\u2028three"]
    assert notes == [f"{tmp_path}/x.txt: the text in column text"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
@pytest.mark.parametrize("end", ["jsonl", "tsv", "csv", "txt"])
def test_a_line_ends_at_a_line_feed_alone(mark: str, end: str, tmp_path: Path) -> None:
    text = {
        "jsonl": "".join(
            json.dumps({"text": f"a{mark}b{i}"}, ensure_ascii=False) + "\n" for i in range(3)
        ),
        "tsv": "text\n" + "".join(f"a{mark}b{i}\n" for i in range(3)),
        "csv": "text\n" + "".join(f'"a{mark}b{i}"\n' for i in range(3)),
        "txt": "".join(f"a{mark}b{i}\n" for i in range(3)),
    }[end]
    expected = [{"text": f"a{mark}b{i}"} for i in range(3)]
    for form in (text, text.replace("\n", "\r\n")):
        assert [row for _, row in read_rows(Path(write(tmp_path / f"x.{end}", form)))] == expected


def test_nothing_here_cuts_lines_as_unicode_does() -> None:
    for path in sorted((ROOT / "lora").rglob("*.py")):
        assert ".splitlines(" not in path.read_text("utf-8"), path


def test_a_row_of_several_conversations_is_bad_once() -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}] * 3}
    bad = BadRows()
    for one in from_row(row, "x.jsonl, line 1"):
        bad.add(DataError(f"{one.place}: refused"), one.place)
    assert bad.count == len(bad.listed) == 1


def test_an_old_macintoshs_lines_end_at_a_carriage_return(tmp_path: Path) -> None:
    rows = [row for _, row in read_rows(Path(write(tmp_path / "x.tsv", "text\ra\rb\r")))]
    assert rows == [{"text": "a"}, {"text": "b"}]


def test_predictions_with_unicode_line_breaks_are_scored(tmp_path: Path) -> None:
    rows = [{"prediction": "a\u2028b", "references": ["a\u2028b", "\u0085"]}] * 2
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    found = read_predictions(Path(write(tmp_path / "p.jsonl", text)))
    assert found == (["a\u2028b"] * 2, [["a\u2028b", "\u0085"]] * 2, ["", ""])


UNREADABLE = {
    "bytes that are not UTF-8": (lambda: raw([b"\xff\xfe"] * 3, "binary", "string"), "codec"),
    "a date past the year 9999": (lambda: raw([10**7] * 3, "int32", "date32"), "out of range"),
    "an unknown time zone": (
        lambda: pytest.importorskip("pyarrow").array(
            [1] * 3, pytest.importorskip("pyarrow").timestamp("us", tz="Mars/Base")
        ),
        "Mars/Base",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_cell_without_a_value_is_a_bad_row_where_it_is_used(name: str, tmp_path: Path) -> None:
    make, why = UNREADABLE[name]
    path = parquet(tmp_path / "x.parquet", text=make(), label=["a", "b", "a"])
    with pytest.raises(DataError, match=f"3 rows cannot be used:\n  .*row 1: text .*{why}"):
        read_examples(path)
    path = parquet(tmp_path / "y.parquet", text=["c", "d", "e"], label=["a", "b", "a"], on=make())
    assert [row.text for row in unlabelled(path, Columns())[0]] == ["c", "d", "e"]  # on is not used
    for row in ("messages", "prompt", "text"):
        path = parquet(tmp_path / "z.parquet", **{row: make(), "completion": ["a"] * 3})
        with pytest.raises(DataError, match=f"3 rows cannot be used:\n  .*{why}"):
            read_conversations(path)


def test_one_bad_cell_leaves_the_others(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    texts = [b"one", b"\xff", *(b"more %d" % i for i in range(10))]
    cells = arrow.array(texts, "binary").view("string")
    path = parquet(tmp_path / "x.parquet", text=cells, label=["a", "b"] * 6)
    with pytest.raises(DataError, match=r"1 row cannot be used:\n.*row 2: text cannot be read"):
        read_examples(path)
    corpus = read_examples(path, skip_bad_lines=1)
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 11


def test_decimals_dates_and_nested_lists_of_parquet(tmp_path: Path) -> None:
    amounts = [decimal.Decimal("1.50"), decimal.Decimal("-0.25"), decimal.Decimal("100.00")]
    path = parquet(
        tmp_path / "x.parquet", text=["a", "b", "c"], label=amounts, at=[[[["x"]]]] * 3,
        on=[datetime.date(2026, 1, 2)] * 3, raw=[b"d\xc3\xa9"] * 3,
    )  # fmt: skip
    corpus = read_examples(path)
    assert corpus.task == "regression"
    parts = corpus.train, corpus.dev, corpus.test
    found = sorted(value for part in parts for value in corpus.targets(part))
    assert found == [-0.25, 1.5, 100.0]
    texts, _ = unlabelled(path, Columns(text="on"))
    assert [row.text for row in texts] == ["2026-01-02"] * 3
    assert [row.text for row in unlabelled(path, Columns(text="raw"))[0]] == ["dé"] * 3
    with pytest.raises(DataError, match="--text-column at: no such column. Found: text, label, on"):
        read_examples(path, Columns(text="at"))


def test_columns_of_parquet_without_a_name_or_with_the_same(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    cells = [arrow.array([f"t{i}" for i in range(20)]), arrow.array(["x", "y"] * 10)]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(arrow.Table.from_arrays(cells, names=["", "label"]), path)
    assert read_examples(str(path)).columns == Columns("0", None, "label")
    pyarrow.parquet.write_table(arrow.Table.from_arrays(cells, names=["text", "text"]), path)
    with pytest.raises(DataError, match="two columns are named 'text'"):
        read_examples(str(path))


@pytest.mark.parametrize("split", ['["train"]', '{"a": 1}', "3", "true", '"hold"'])
def test_a_split_that_is_none_is_a_bad_row(split: str, tmp_path: Path) -> None:
    rows = [json.dumps(row | {"split": "train"}) for row in ROWS]
    rows[4] = rows[4].replace('"train"', split)
    path = write(tmp_path / "x.jsonl", "\n".join(rows))
    with pytest.raises(DataError, match=r"1 row cannot be used:\n  .*line 5: split .* is none of"):
        read_examples(path)
    assert len(read_examples(path, skip_bad_lines=1).train) == 18  # and two held out
    with pytest.raises(DataError, match="line 5: split .* is none of"):
        read_conversations(path)


@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_integers_of_five_thousand_digits(end: str, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[2] = rows[2].replace('"a"', "9" * 5_000)
    text = "\n".join(rows) if end == "jsonl" else f"[{','.join(rows)}]"
    where = "line 3: not a JSON object" if end == "jsonl" else "x.json: its JSON cannot be read"
    for reader in (read_examples, read_conversations):
        with pytest.raises(DataError, match=where):
            reader(write(tmp_path / f"x.{end}", text))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', '"-inf"'])
def test_a_number_that_is_none_is_no_class_no_target_and_no_answer(
    value: str, tmp_path: Path
) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[3] = rows[3].replace('"b"', value)
    path = write(tmp_path / "x.jsonl", "\n".join(rows))
    with pytest.raises(DataError, match=r"1 row cannot be used:\n  .*line 4: .*(nan|inf|-inf)"):
        read_examples(path)
    assert read_examples(path, skip_bad_lines=1).labels == ("a", "b")
    numbers = [json.dumps({"text": f"t{i}", "label": i / 2}) for i in range(20)]
    numbers[3] = numbers[3].replace("1.5", value)
    path = write(tmp_path / "y.jsonl", "\n".join(numbers))
    for task in ("auto", "regression"):
        with pytest.raises(DataError, match="1 row cannot be used:\n  .*line 4: "):
            read_examples(path, task=task)
    if not value.startswith('"'):
        texts = [json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(20)]
        texts[3] = texts[3].replace('"c"', value)
        path = write(tmp_path / "z.jsonl", "\n".join(texts))
        with pytest.raises(DataError, match="line 4: completion is -?(nan|inf): no text"):
            read_conversations(path)
        path = write(tmp_path / "p.jsonl", f'{{"prediction": {value}, "label": 1}}\n')
        with pytest.raises(DataError, match="line 1: prediction is -?(nan|inf)"):
            read_predictions(Path(path))
    table = "".join(f"t{i}\t{'nan' if i == 3 else i % 2}\n" for i in range(20))
    with pytest.raises(DataError, match="line 5: label 'nan' is no finite number: is it missing"):
        read_examples(write(tmp_path / "x.tsv", "text\tlabel\n" + table))


def test_a_class_that_is_called_nan_is_asked_for(tmp_path: Path) -> None:
    rows = "".join(f"dish {i}\t{('nan', 'pizza')[i % 2]}\n" for i in range(20))
    path = write(tmp_path / "x.tsv", "text\tlabel\n" + rows)
    assert read_examples(path, labels=("nan", "pizza")).labels == ("nan", "pizza")


def test_the_demos_columns_by_number_too() -> None:
    by_name, by_number = read_examples("demo"), read_examples("demo", Columns(text="0", label="1"))
    assert by_number.train == by_name.train
    assert read_examples("demo", Columns(text="0")).dev == by_name.dev
    with pytest.raises(DataError, match="--text-column 7: no such column. Found: text, label"):
        read_examples("demo", Columns(text="7"))
    with pytest.raises(DataError, match="--text-column ²: no such column"):
        read_examples("demo", Columns(text="²"))


@pytest.mark.parametrize("value", ["1e200", "-1e39", "nan", "inf"])
def test_a_score_is_a_number(value: str) -> None:
    for pair in ((value, "1"), ("1", value)):
        with pytest.raises(DataError, match=r"finite numbers up to 3.40282e\+38, .*found"):
            score("regression", ["0", pair[0]], [["0"], [pair[1]]])
    assert score("regression", ["3e38", "0"], [["-3e38"], ["0"]])["mse"] == pytest.approx(1.8e77)


def test_bad_rows_are_counted_whole_and_ten_are_listed(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ROWS]
    for i in range(0, 15):
        rows[i] = ("{", '{"text": "a"}', '{"text": null, "label": "a"}')[i % 3]
    path = write(tmp_path / "x.jsonl", "\n".join([*rows, *map(json.dumps, ROWS)]))
    with pytest.raises(DataError) as error:
        read_examples(path)
    lines = str(error.value).split("\n")
    assert lines[0] == "15 rows cannot be used:"
    # Broken lines are met first, then rows without a text, then those without a label.
    numbers = [int(line.partition(", line ")[2].partition(":")[0]) for line in lines[1:11]]
    assert numbers == [1, 4, 7, 10, 13, 3, 6, 9, 12, 15]
    assert lines[11:] == [
        "  and 5 more", "Fix them, or pass --skip-bad-lines 15 to skip them.",
    ]  # fmt: skip
    corpus = read_examples(path, skip_bad_lines=15)
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 25
    assert corpus.notes[0].startswith("15 rows skipped, as --skip-bad-lines 15 allows:\n  ")
    with pytest.raises(DataError, match="--skip-bad-lines 15 to skip"):
        read_examples(path, skip_bad_lines=14)


def test_rows_that_are_all_bad_cannot_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "{\n" * 20)
    for reader in (read_examples, read_conversations):
        with pytest.raises(DataError, match="20 rows cannot be used.*\n.*(?s:.*)Too few other"):
            reader(path)


def test_a_hub_data_set_whose_rows_cannot_be_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")

    class Broken:
        def __iter__(self) -> Any:
            raise RuntimeError("no decoder")

    monkeypatch.setattr("lora.finetune.data.rows.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": Broken()})
    with pytest.raises(DataError, match="owner/name cannot be loaded from the hub: no decoder"):
        [*read_source("owner/name")]


def test_rows_of_the_hub_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A date beside the text is no error, and turns are lists."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b"}],
         "on": datetime.datetime(2026, 1, 2)}
        for i in range(10)
    ]  # fmt: skip
    monkeypatch.setattr("lora.finetune.data.rows.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": rows})
    splits, _ = read_conversations("owner/name")
    assert sorted(one.prompt[0].content for some in splits.values() for one in some) == [
        f"a{i}" for i in range(10)
    ]
    (row, *_) = [row for _, _, row in read_source("owner/name")]
    assert row == {**rows[0], "on": "2026-01-02T00:00:00"}


def test_what_lies_within_a_cell_is_as_json_would_hold_it(tmp_path: Path) -> None:
    day, amount = datetime.date(2026, 1, 2), decimal.Decimal("1.50")
    answer = {"role": "assistant", "content": "b", "name": b"n", "extra": {"on": day, "of": amount}}
    turns = [{"role": "user", "content": "a"} | dict.fromkeys(("name", "extra")), answer]
    path = parquet(tmp_path / "x.parquet", messages=[turns] * 3, tools=[[{"on": day}]] * 3)
    rows = [row for _, row in read_rows(Path(path))]
    assert rows[0] == {
        "messages": [
            {**turns[0], "name": None, "extra": None},
            {**answer, "name": "n", "extra": {"on": "2026-01-02", "of": "1.50"}},
        ],
        "tools": [{"on": "2026-01-02"}],
    }
    assert isinstance(rows[0], dict)
    assert len(from_row(rows[0], "x.parquet, row 1")) == 1
    broken = parquet(tmp_path / "y.parquet", messages=[[{"content": b"\xff", "role": "user"}]] * 3)
    with pytest.raises(DataError, match="row 1: messages cannot be read"):
        read_conversations(broken)
