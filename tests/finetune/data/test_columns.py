"""Columns of a file that is not the run's own: by name, by number, and what was taken is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.errors import ConfigError, DataError
from lora.finetune.config import from_table, parse_run
from lora.finetune.data.columns import Columns
from lora.finetune.data.corpus import read_split, unlabelled

TEXTS = [(f"a {'kind' if i % 2 else 'rude'} waiter, table {i}", str(i % 2)) for i in range(12)]
BY_NAME = Columns(text="message", label="mood")
BY_NUMBER = Columns(text="0", label="1")
KIND: Any = ("classification", ("0", "1"))


def table(path: Path, header: str, order: str = "tl") -> str:
    """Columns t(ext), l(abel) and n(umber), in that order."""
    rows = [{"t": text, "l": label, "n": str(70 + i)} for i, (text, label) in enumerate(TEXTS)]
    lines = ["\t".join(row[key] for key in order) for row in rows]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return str(path)


FILES = [
    (BY_NUMBER, "", "tl", "0", "1"),
    (BY_NUMBER, "message\tmood", "tl", "message", "mood"),
    (BY_NUMBER, "text\tlabel", "tl", "text", "label"),
    (BY_NUMBER, "label\ttext", "lt", "text", "label"),  # names say more than places
    (BY_NUMBER, "id\ttext\tlabel", "ntl", "text", "label"),
    (BY_NUMBER, "foo\tbar\tid", "tln", "foo", "bar"),  # nothing but the places is known
    (BY_NAME, "message\tmood", "tl", "message", "mood"),
    (BY_NAME, "mood\tid\tmessage", "lnt", "message", "mood"),
    (BY_NAME, "text\tlabel", "tl", "text", "label"),
    (BY_NAME, "label\ttext", "lt", "text", "label"),
    (BY_NAME, "", "tl", "0", "1"),
    (BY_NAME, "", "lt", "1", "0"),
    (Columns(text="1", label="2"), "", "ntl", "1", "2"),
    (Columns(text="1", label="0"), "mood\tmessage", "lt", "message", "mood"),
]


@pytest.mark.parametrize(("trained", "header", "order", "text", "label"), FILES)
def test_columns_of_the_training_find_their_way(
    trained: Columns, header: str, order: str, text: str, label: str, tmp_path: Path
) -> None:
    data = table(tmp_path / "x.tsv", header, order)
    rows, notes = unlabelled(data, Columns(), trained)
    assert [(row.text, row.label) for row in rows] == TEXTS
    seen = "a header" if header else "no header"
    said = f"{data}: {seen}, the text in column {text}, the label in column {label}"
    assert notes == [said]
    corpus, name = read_split(data, Columns(), trained, KIND, None)
    assert name == "test"
    assert [(row.text, row.label) for row in corpus.test] == TEXTS
    assert corpus.summary[0] == said


@pytest.mark.parametrize("trained", [BY_NAME, BY_NUMBER, Columns()])
@pytest.mark.parametrize("header", ["", "message", "text"])
def test_a_file_of_texts_alone(trained: Columns, header: str, tmp_path: Path) -> None:
    data = table(tmp_path / "x.tsv", header, "t")
    rows, _ = unlabelled(data, Columns(), trained)
    assert [(row.text, row.label) for row in rows] == [(text, None) for text, _ in TEXTS]


@pytest.mark.parametrize("trained", [BY_NAME, BY_NUMBER])
def test_what_is_asked_goes_before_the_training(trained: Columns, tmp_path: Path) -> None:
    data = table(tmp_path / "x.tsv", "one\tmessage\tmood", "tnl")
    for asked in (Columns(text="one", label="mood"), Columns(text="0", label="2")):
        rows, _ = unlabelled(data, asked, trained)
        assert [(row.text, row.label) for row in rows] == TEXTS
    with pytest.raises(DataError, match="--text-column body: no such column. Found: one, message"):
        unlabelled(data, Columns(text="body"), trained)


def test_a_class_of_the_model_in_the_first_row_tells_that_it_is_an_example(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("nice film,good\npoor film,bad\n")
    with pytest.raises(DataError, match="does its first row name the columns"):
        unlabelled(str(path), Columns(), BY_NUMBER)
    rows, _ = unlabelled(str(path), Columns(), BY_NUMBER, ("bad", "good"))
    assert [(row.text, row.label) for row in rows] == [("nice film", "good"), ("poor film", "bad")]
    corpus, _ = read_split(str(path), Columns(), BY_NAME, ("classification", ("bad", "good")), None)
    assert [row.label for row in corpus.test] == ["good", "bad"]
    path.write_text("good,mood\nnice film,good\npoor film,bad\n")  # a column of that name
    rows, _ = unlabelled(str(path), Columns(text="good"), BY_NAME, ("bad", "good"))
    assert [row.label for row in rows] == ["good", "bad"]


@pytest.mark.parametrize("column", ["text_column", "pair_column", "label_column"])
def test_a_column_has_a_name(column: str) -> None:
    flag = "--" + column.replace("_", "-")
    with pytest.raises(
        ConfigError, match=f"{column} must be a text of at least 1 character, found ''"
    ):
        parse_run([flag, ""])
    with pytest.raises(ConfigError, match="header must be 'auto', 'yes' or 'no', found 'maybe'"):
        from_table({"header": "maybe"}, "lora")


def test_json_knows_names_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, (t, _) in enumerate(TEXTS)))
    rows, notes = unlabelled(str(path), Columns(), BY_NUMBER)
    assert [row.text for row in rows] == [text for text, _ in TEXTS]
    assert notes == [f"{path}: the text in column text"]


def test_columns_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    data = table(tmp_path / "x.tsv", "", "ntl")
    with pytest.raises(
        DataError, match=r"3 columns.*First row: 0 '70', 1 'a rude waiter, table 0'"
    ):
        unlabelled(data, Columns(), BY_NAME)
    with pytest.raises(DataError, match="no label column among message. First row: message 'a"):
        read_split(table(tmp_path / "y.tsv", "message", "t"), Columns(), BY_NAME, KIND, None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("one.csv", "Priority\nlow\nhigh\nlow\n"),  # a name, or a word among words
        ("two.csv", "Priority,Channel\nlow,mail\nhigh,phone\nlow,mail\n"),
        ("short.csv", "id;Description\n1;My parcel is lost\n5\n7\n8;Too late\n"),
        ("keys.jsonl", '{"body": "My parcel is lost"}\n'),
    ],
)
def test_a_file_without_the_column_of_the_training_is_not_guessed(
    file: str, content: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_text(content)
    trained = Columns(text="Description", label="Category")
    words = "which the model was trained on|first row name the columns"
    with pytest.raises(DataError, match=words):
        unlabelled(str(path), Columns(), trained)


def test_one_short_row_does_not_hide_the_columns(tmp_path: Path) -> None:
    rows = "id;Description\n1;My parcel is lost\n2;I was billed twice\n5\n"
    trained = Columns(text="Description", label="Category")
    for content in (rows, f"sep=;\n{rows}", rows + ";\n"):  # and Excel's own line, an empty row
        path = tmp_path / "x.csv"
        path.write_bytes(content.replace("\n", "\r\n").encode())
        line = 5 if content.startswith("sep") else 4
        with pytest.raises(DataError, match=f"line {line}: 1 columns, the first row has 2"):
            unlabelled(str(path), Columns(), trained)
        kept, _ = unlabelled(str(path), Columns(), trained, skip_bad_lines=1)
        assert [each.text for each in kept] == ["My parcel is lost", "I was billed twice"]
