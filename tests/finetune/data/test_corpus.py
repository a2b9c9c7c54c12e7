"""Files in every form people have, and every way they are broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import needs_shared

from lora.errors import DataError
from lora.finetune import demo
from lora.finetune.data.columns import Columns
from lora.finetune.data.corpus import Corpus, read_examples, read_predictions
from lora.finetune.data.corpus import unlabelled as unlabelled_with_notes
from lora.finetune.data.rows import read_rows

TSV = "sentence\tlabel\ngood film \t1\nbad film\t0\nfine\t1\npoor\t0\n"


def unlabelled(data: str, columns: Columns) -> list[Any]:
    return unlabelled_with_notes(data, columns)[0]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def folder(tmp_path: Path, train: str = TSV, end: str = "tsv", **others: str) -> str:
    write(tmp_path / "data" / f"train.{end}", train)
    for split, text in others.items():
        write(tmp_path / "data" / f"{split}.{end}", text)
    return str(tmp_path / "data")


def texts(corpus: Corpus) -> list[tuple[str, str | None, str | None]]:
    return [(e.text, e.pair, e.label) for e in corpus.train]


def test_a_folder_of_tsv_files(tmp_path: Path) -> None:
    corpus = read_examples(folder(tmp_path, dev=TSV, test=TSV))
    assert texts(corpus)[0] == ("good film", None, "1")
    assert corpus.labels == ("0", "1")
    assert corpus.held_out[0] == "test"
    assert corpus.targets(corpus.train) == [1.0, 0.0, 1.0, 0.0]
    assert corpus.notes == ()


def test_without_dev_every_tenth_row_is_held_out_and_said(tmp_path: Path) -> None:
    rows = "sentence\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(40))
    corpus = read_examples(folder(tmp_path, train=rows))
    assert [e.text for e in corpus.dev] == ["text 9", "text 19", "text 29", "text 39"]
    assert len(corpus.train) == 36
    assert "no dev split" in str(corpus.notes)
    assert corpus.held_out[0] == "dev"


def test_one_file_is_cut_and_said(tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f'"text, {i}",{"ab"[i % 2]}\n' for i in range(50))
    path = write(tmp_path / "all.csv", rows)
    corpus = read_examples(str(path))
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (40, 5, 5)
    assert len({e.text for e in (*corpus.train, *corpus.dev, *corpus.test)}) == 50
    assert "divided 80/10/10" in str(corpus.notes)
    assert read_examples(str(path)) == corpus
    assert corpus.labels == ("a", "b")


def test_a_text_that_recurs_stays_in_one_split(tmp_path: Path) -> None:
    """Exports repeat tickets and reviews. A copy in test of what was trained on proves nothing."""
    rows = [f"text {i},{'ab'[i % 2]}\n" for i in range(100)]
    path = write(tmp_path / "all.csv", "text,label\n" + "".join([*rows, *rows]))
    corpus = read_examples(str(path))
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (160, 20, 20)
    once = read_examples(str(write(tmp_path / "once.csv", "text,label\n" + "".join(rows))))
    for name in ("train", "dev", "test"):
        seen = [e.text for e in getattr(corpus, name)]
        assert sorted({*seen}) == sorted(e.text for e in getattr(once, name))
        assert len(seen) == 2 * len({*seen})
    held = read_examples(folder(tmp_path, train="text\tlabel\n" + TSV.partition("\n")[2] * 10))
    assert {e.text for e in held.dev}.isdisjoint(e.text for e in held.train)
    few = write(tmp_path / "few.csv", "text,label\na,1\nb,0\n" * 9)
    with pytest.raises(DataError, match="2 different texts are too few for train, dev and test"):
        read_examples(str(few), skip_bad_lines=9)  # the header recurs


def test_a_row_without_a_text_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\n,a\n  ,b\n" + "".join(
        f"text {i},{'ab'[i % 2]}\n" for i in range(20)
    ))  # fmt: skip
    with pytest.raises(DataError, match=r"2 rows cannot be used:\n.*line 2: no text.*\n.*line 3"):
        read_examples(str(path))


def test_numbers_with_a_decimal_comma_are_no_classes(tmp_path: Path) -> None:
    rows = "".join(f"text {i};{i % 5},{i % 7}\n" for i in range(40))
    path = str(write(tmp_path / "x.csv", "text;label\n" + rows))
    for task in ("auto", "regression"):
        with pytest.raises(DataError, match=r"numbers with a comma, such as '\d,\d'. Write a dec"):
            read_examples(path, task=task)  # type: ignore[arg-type]
    read_examples(path, labels=tuple(f"{i},{j}" for i in range(5) for j in range(7)))


def test_a_limit_changes_no_class(tmp_path: Path) -> None:
    """Rows of a class that the limit leaves out of train are right, and stay in test."""
    train = "text\tlabel\n" + "".join(f"t{i}\t{'ab'[i % 2]}\n" for i in range(20)) + "r\trare\n"
    data = folder(tmp_path, train=train, dev=train, test=train)
    corpus = read_examples(data, limits={"train": 10})
    assert corpus.labels == ("a", "b", "rare")
    assert (len(corpus.train), len(corpus.test)) == (10, 21)
    assert "no training row has the label rare" in str(corpus.notes)
    assert "no training row" not in str(read_examples(data).notes)


def test_a_split_column_is_followed(tmp_path: Path) -> None:
    rows = "text\tlabel\tsplit\na\t1\ttrain\nb\t0\ttrain\nc\t1\tvalidation\nd\t0\ttest\n"
    corpus = read_examples(str(write(tmp_path / "x.tsv", rows)))
    assert [e.text for e in corpus.dev] == ["c"]
    rows = rows.replace("validation", "hold")
    with pytest.raises(DataError, match="line 4: split 'hold' is none of"):
        read_examples(str(write(tmp_path / "x.tsv", rows)))


def test_no_header(tmp_path: Path) -> None:
    corpus = read_examples(folder(tmp_path, train="nice\t1\ndull\t0\n", dev="so so\t1\n"))
    assert texts(corpus) == [("nice", None, "1"), ("dull", None, "0")]
    three = "7\tnice\t1\n8\tdull\t0\n"
    with pytest.raises(DataError, match="has 3 columns and none is named text or label"):
        read_examples(folder(tmp_path, train=three))
    corpus = read_examples(folder(tmp_path, train=three, dev=three), Columns(text="1", label="2"))
    assert texts(corpus) == [("nice", None, "1"), ("dull", None, "0")]


def test_columns_by_name_pairs_and_jsonl(tmp_path: Path) -> None:
    rows = (
        '{"premise": "it rains", "hypothesis": "wet", "label": "yes", "id": 1}\n\n'
        '{"premise": "it snows", "hypothesis": "hot", "label": "no", "id": null}\n'
    )
    corpus = read_examples(folder(tmp_path, train=rows, dev=rows, end="jsonl"))
    assert texts(corpus) == [("it rains", "wet", "yes"), ("it snows", "hot", "no")]
    columns = Columns(text="hypothesis", label="id")
    with pytest.raises(DataError, match="train.jsonl, line 3: no label"):
        read_examples(folder(tmp_path, train=rows, dev=rows, end="jsonl"), columns)
    rows = "body,other,stars\nhello,there,1\nbye,now,2\n"
    columns = Columns(text="body", pair="other", label="stars")
    corpus = read_examples(folder(tmp_path / "c", train=rows, dev=rows, end="csv"), columns)
    assert texts(corpus) == [("hello", "there", "1"), ("bye", "now", "2")]


def test_labels_sort_as_numbers_where_they_are(tmp_path: Path) -> None:
    rows = "text\tlabel\n" + "".join(f"t{i}\t{i}\n" for i in range(12))
    assert read_examples(folder(tmp_path, train=rows, dev=rows)).labels == tuple(
        map(str, range(12))
    )


def test_fractional_labels_are_a_regression(tmp_path: Path) -> None:
    rows = "text\tlabel\na\t1.5\nb\t2\nc\t4e-1\n"
    corpus = read_examples(folder(tmp_path, train=rows, dev=rows))
    assert corpus.task == "regression"
    assert corpus.targets(corpus.train) == [1.5, 2.0, 0.4]
    assert read_examples(folder(tmp_path, train=TSV, dev=TSV), task="regression").labels == ()
    rows = rows.replace("4e-1", "much")
    with pytest.raises(DataError, match="train.tsv, line 4: label 'much' is no number"):
        read_examples(folder(tmp_path, train=rows, dev=rows), task="regression")


def test_a_hidden_test_split_is_not_reported_on(tmp_path: Path) -> None:
    hidden = "sentence\tlabel\nsome\t-1\nother\t-1\n"
    assert read_examples(folder(tmp_path, dev=TSV, test=hidden)).held_out[0] == "dev"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty. Pass a file"),
        ("\n\n", "is empty"),
        ("sentence\tlabel\n", "has no training rows"),
        ("sentence\tlabel\ngood\t1\nfine\t1\n", "at least two classes, found 1"),
        ("sentence\tlabel\ngood\t1\nfine\n", "line 3: 1 columns, the first row has 2"),
        ("sentence\tlabel\na\tb\tc\n", "line 2: 3 columns"),
        (b"sentence\tlabel\ngood\t1\nbl\xe9\t0\n", "line 3: byte 0xe9 is not UTF-8"),
        (
            "id\twords\tlabel\n7\tgood\t1\n",
            "none is named text beside the label label: id, words",
        ),
    ],
)
def test_training_files_that_cannot_be(tmp_path: Path, content: str | bytes, match: str) -> None:
    write(tmp_path / "data" / "train.tsv", content)
    with pytest.raises(DataError, match=match):
        read_examples(str(tmp_path / "data"))


def test_a_label_outside_the_set_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dev.tsv, line 3: label '2' is outside the set 0, 1"):
        read_examples(folder(tmp_path, dev="sentence\tlabel\nok\t1\nmeh\t2\n"))
    with pytest.raises(DataError, match="set no, yes. Fix the row, or set --labels"):
        read_examples(folder(tmp_path, dev=TSV), labels=("no", "yes"))


def test_missing_columns_files_and_folders(tmp_path: Path) -> None:
    data = folder(tmp_path, dev=TSV)
    with pytest.raises(DataError, match="--label-column stars: no such column. Found: sentence"):
        read_examples(data, Columns(label="stars"))
    with pytest.raises(DataError, match="--pair-column p: no such column"):
        read_examples(data, Columns(pair="p"))
    for name in ("./nowhere", "/nowhere", "nowhere.csv"):
        with pytest.raises(DataError, match="no such file or folder"):
            read_examples(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match="has no training rows, found nothing. Pass a folder with train.tsv"
    ):
        read_examples(str(tmp_path / "empty"))
    write(tmp_path / "data" / "train.csv", "text,label\na,1\n")
    with pytest.raises(DataError, match="train.csv, train.tsv for one split. Keep one"):
        read_examples(data)
    for name, header in (("header.csv", "text,label\n"), ("header.tsv", "text\tlabel\r\n")):
        with pytest.raises(DataError, match=f"{name} has a header and no rows below it. Add rows"):
            read_examples(str(write(tmp_path / name, header)))
    with pytest.raises(DataError, match="found .xlsx. Known"):
        read_examples(str(write(tmp_path / "x.xlsx", "a")))


def test_a_hub_name_without_a_hub_names_the_command_to_run() -> None:
    with pytest.raises(DataError, match="the hub does not answer. Run lora train --data demo"):
        read_examples("glue/sst2")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object: found a list"),
        ("[" * 99_999, "line 1: not a JSON object"),
    ],
)
def test_broken_json_lines_are_named(tmp_path: Path, line: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_examples(str(write(tmp_path / "x.jsonl", line)))


def test_rows_to_label_need_no_label(tmp_path: Path) -> None:
    rows = unlabelled(str(write(tmp_path / "x.tsv", "text\nfirst\nsecond\n")), Columns())
    assert [(e.text, e.label) for e in rows] == [("first", None), ("second", None)]
    rows = unlabelled(str(write(tmp_path / "y.tsv", "first line\nsecond\n")), Columns())
    assert [e.text for e in rows] == ["first line", "second"]


def test_predictions_with_one_or_several_references(tmp_path: Path) -> None:
    text = (
        '{"prediction": "a", "label": "b"}\n{"prediction": "c", "references": ["c", "d"]}\n'
        '{"prediction": "[x]", "references": "[x]"}\n'
    )
    path = write(tmp_path / "p.jsonl", text.replace('"references": "[x]"', '"label": "[x]"'))
    assert read_predictions(path)[:2] == (["a", "c", "[x]"], [["b"], ["c", "d"], ["[x]"]])
    with pytest.raises(DataError, match="line 1: needs prediction and label"):
        read_predictions(write(tmp_path / "q.jsonl", '{"prediction": "a"}\n'))


def test_sst2_reads_as_it_lies() -> None:
    corpus = read_examples(str(needs_shared("sst2-sentences")))
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (6920, 872, 1821)
    assert corpus.labels == ("0", "1")
    glue = read_examples(str(needs_shared("sst2")))
    assert len(glue.train) == 67_349
    assert len(glue.dev) == 872
    assert not any(e.text.endswith(" ") for e in glue.train)


def test_the_reviews_are_what_the_readme_says() -> None:
    corpus = read_examples("demo")
    splits = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 700, "dev": 100, "test": 200
    }  # fmt: skip
    for rows in splits.values():
        assert sum(e.label == "1" for e in rows) * 2 == len(rows)
    lengths = [len(e.text.split()) for rows in splits.values() for e in rows]
    assert min(lengths) == 4
    assert 35 <= max(lengths) <= 40
    assert len({e.text.lower() for rows in splits.values() for e in rows}) == 1000


def test_no_frame_of_a_review_stands_in_two_splits() -> None:
    """Neither four words in a row, nor a short sentence with one or two words exchanged."""
    import re

    seen: dict[str, str] = {}
    for line in demo.REVIEWS.read_text(encoding="utf-8").splitlines()[1:]:
        text, _, split = line.split("\t")
        words = re.findall(r"[a-z0-9']+", text.lower())
        frames = {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}
        if len(words) <= 12:
            for i in range(len(words)):
                frames.add("1 " + " ".join("_" if k == i else w for k, w in enumerate(words)))
                for j in range(i + 1, len(words) if len(words) >= 5 else 0):
                    frames.add(
                        "2 " + " ".join("_" if k in (i, j) else w for k, w in enumerate(words))
                    )
        for frame in frames:
            assert seen.setdefault(frame, split) == split, (frame, text)


def test_a_header_is_known_in_any_case_and_beside_numbers(tmp_path: Path) -> None:
    rows = "Text\tLabel\tSplit\na\t1\ttrain\nb\t0\ttrain\nc\t1\tdev\n"
    corpus = read_examples(str(write(tmp_path / "x.tsv", rows)))
    assert corpus.labels == ("0", "1")
    assert len(corpus.dev) == 1
    numbered = Columns(text="0", label="1")
    corpus = read_examples(folder(tmp_path, train=TSV, dev=TSV), numbered)
    assert corpus.labels == ("0", "1")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (Columns(text="label"), "no label column among sentence, label"),
        (Columns(text="label", label="label"), "one column cannot be two of text, pair and label"),
        (Columns(text="sentence", pair="sentence"), "one column cannot be two"),
    ],
)
def test_one_column_has_one_part(tmp_path: Path, columns: Columns, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_examples(folder(tmp_path, dev=TSV), columns)


def test_the_label_may_come_first(tmp_path: Path) -> None:
    rows = "0\ta bad film\n1\ta good film\n"
    corpus = read_examples(folder(tmp_path, train=rows, dev=rows), Columns(label="0"))
    assert texts(corpus)[0] == ("a bad film", None, "0")


def test_a_question_beside_a_sentence_is_a_pair(tmp_path: Path) -> None:
    rows = "question\tsentence\tlabel\nwho?\tme\tyes\nwhat?\tthat\tno\n"
    assert texts(read_examples(folder(tmp_path, train=rows, dev=rows)))[0] == ("who?", "me", "yes")


def test_nulls_do_not_move_columns(tmp_path: Path) -> None:
    whole = (
        '{"premise": "a", "hypothesis": "b", "label": 1}\n'
        '{"premise": "c", "hypothesis": "d", "label": 0}\n'
    )
    first_null = whole.replace('"hypothesis": "b"', '"hypothesis": null')
    with pytest.raises(DataError, match="line 1: no column 'hypothesis'"):
        read_examples(folder(tmp_path, train=first_null, dev=whole, end="jsonl"))
    no_label = whole.replace('"label": 1', '"label": null')
    with pytest.raises(DataError, match="test.jsonl, line 1: no label"):
        read_examples(folder(tmp_path, train=whole, dev=whole, test=no_label, end="jsonl"))
    with pytest.raises(DataError, match="train has its text in premise"):
        read_examples(
            folder(tmp_path, train=whole, dev=whole.replace("hypothesis", "other"), end="jsonl")
        )


def test_minus_one_is_a_label_where_train_has_it(tmp_path: Path) -> None:
    rows = "sentence\tlabel\ngood\t1\nbad\t-1\n"
    hidden = "sentence\tlabel\nworse\t-1\n"
    corpus = read_examples(folder(tmp_path, train=rows, dev=rows, test=hidden))
    assert corpus.held_out[0] == "test"
    hidden = hidden.replace("-1", "-1.0")
    corpus = read_examples(folder(tmp_path, train=TSV, dev=TSV, test=hidden))
    assert corpus.held_out[0] == "dev"
    assert "the split test hides its labels" in str(corpus.notes)


def test_rows_that_are_not_what_they_seem(tmp_path: Path) -> None:
    quote = "text,label\na,1\nb,0\n" + '"c,1\n' + "d,0\n" * 5
    with pytest.raises(DataError, match="line 9: unexpected end of data"):
        read_examples(folder(tmp_path / "1", train=quote, end="csv"))
    with pytest.raises(DataError, match="train.tsv, line 4: no label"):
        read_examples(
            folder(
                tmp_path / "2",
                train="text\tlabel\na\t1\nb\t0\nc\t\n",
                dev=TSV.replace("sentence", "text"),
            )
        )
    with pytest.raises(DataError, match="two columns are named 'label'"):
        read_examples(folder(tmp_path / "3", train="text\tlabel\tlabel\na\t1\t0\n"))
    with pytest.raises(DataError, match="line 1: surrogates not allowed"):
        read_examples(
            folder(tmp_path / "4", train='{"text": "\\ud800 x", "label": 1}\n', end="jsonl")
        )


def test_few_rows(tmp_path: Path) -> None:
    corpus = read_examples(folder(tmp_path, train="text\tlabel\na\t1\nb\t0\nc\t1\n"))
    assert (len(corpus.train), len(corpus.dev)) == (2, 1)
    with pytest.raises(DataError, match="2 rows are too few for train"):
        read_examples(str(write(tmp_path / "x.tsv", "text\tlabel\na\t1\nb\t0\n")))
    with pytest.raises(DataError, match="too few rows to hold one out|two classes"):
        read_examples(folder(tmp_path / "one", train="text\tlabel\na\t1\n"))


def test_whole_numbers_are_classes_and_an_empty_line_is_an_empty_text(tmp_path: Path) -> None:
    rows = TSV.replace("\t1\n", "\t1.0\n").replace("\t0\n", "\t0.0\n")
    assert read_examples(folder(tmp_path, train=rows, dev=rows)).labels == ("0.0", "1.0")
    path = write(tmp_path / "y.tsv", "text\none\n\nthree\n")
    assert [e.text for e in unlabelled(str(path), Columns(label="stars"))] == ["one", "", "three"]
    with pytest.raises(DataError, match="has no rows"):
        unlabelled(str(write(tmp_path / "z.tsv", "text\n")), Columns())


def test_references_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prediction": "a", "references": "[laughs] hello"}\n')
    assert read_predictions(path) == (["a"], [["[laughs] hello"]], [""])
    with pytest.raises(DataError, match="line 1: needs prediction and label"):
        read_predictions(write(path, '{"prediction": "a", "references": []}\n'))


def test_a_split_without_trains_label_is_left_out_and_said(tmp_path: Path) -> None:
    corpus = read_examples(folder(tmp_path, dev=TSV, test="id\tsentence\n0\tgood\n1\tbad\n"))
    assert corpus.test == ()
    assert "the split test has no label and is ignored" in str(corpus.notes)


def test_labels_that_are_one_number_sort_the_same_in_every_process() -> None:
    from lora.finetune.data.corpus import sorted_labels

    for labels in ({"1", "01", "2"}, {"2", "01", "1"}):
        assert sorted_labels(labels) == ("01", "1", "2")


@pytest.mark.parametrize("value", ['{"a": 1}', '["a"]', "null"])
def test_a_text_is_no_object_no_list_and_not_null(tmp_path: Path, value: str) -> None:
    rows = f'{{"text": "a", "label": 1}}\n{{"text": {value}, "label": 0}}\n'
    with pytest.raises(
        DataError, match=r"line 2: no column 'text' with a text, found label\. The text"
    ):
        read_examples(folder(tmp_path, train=rows, dev=rows, end="jsonl"))


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_is_read_by_the_mark_between_its_cells(tmp_path: Path, mark: str) -> None:
    rows = f'id{mark}"note, text"{mark}label\n1{mark}"a, or b"{mark}0\n2{mark}c, d{mark}1\n'
    found = read_rows(write(tmp_path / "cells.csv", rows))
    assert [row for _, row in found] == [
        {"id": "1", "note, text": "a, or b", "label": "0"},
        {"id": "2", "note, text": "c, d", "label": "1"},
    ]
    quoted = f'"ticket"{mark}"queue"\n"lost; my card\tagain"{mark}"bank"\n"b"{mark}"app"\n'
    found = read_rows(write(tmp_path / "quoted.csv", quoted))
    assert [row for _, row in found] == [
        {"ticket": "lost; my card\tagain", "queue": "bank"},
        {"ticket": "b", "queue": "app"},
    ]


def test_a_semicolon_in_a_text_is_no_mark(tmp_path: Path) -> None:
    texts_alone = write(tmp_path / "t.csv", "text\nwell; it is good\nbad\n")
    assert [row for _, row in read_rows(texts_alone)] == [
        {"text": "well; it is good"},
        {"text": "bad"},
    ]
    both = write(tmp_path / "b.csv", "text,label\na; b,0\nc; d,1\n")
    assert [row for _, row in read_rows(both)] == [
        {"text": "a; b", "label": "0"},
        {"text": "c; d", "label": "1"},
    ]


def test_the_digest_is_of_texts_and_labels_in_their_splits(tmp_path: Path) -> None:
    rows = "text\tlabel\na\t1\nb\t0\n"
    one = read_examples(folder(tmp_path / "1", train=rows, dev=rows)).digest()
    assert read_examples(folder(tmp_path / "2", train=rows, dev=rows)).digest() == one
    others = [(rows.replace("\na", "\nc"), rows), (rows + "c\t1\n", rows)]
    others += [(rows, rows.replace("\t1", "\t0")), (rows + "a\t1\n", rows.replace("a\t1\n", ""))]
    for number, (train, dev) in enumerate(others):
        assert (
            read_examples(folder(tmp_path / f"other{number}", train=train, dev=dev)).digest() != one
        )
