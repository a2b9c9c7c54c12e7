"""opinions/NAME: checked rows, fixed splits that share no document, and what `demo` means."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from conftest import ROOT

from lora.errors import DataError
from lora.finetune import cli
from lora.finetune.answers import scores_by_row, scores_of_answers
from lora.finetune.config import parse_run, read_toml
from lora.finetune.data.corpus import read_examples, read_predictions, read_split
from lora.finetune.data.included import (
    FILMS,
    STAND_IN,
    TINY,
    metrics_of_answers,
    recorded_source,
    resolved,
)
from lora.finetune.data.opinions import (
    OPINIONS,
    named_label,
    read_opinions,
    same_word,
    split_by_hash,
    within_one,
)
from lora.finetune.demo import fetch as fetching
from lora.finetune.inputs import read_corpus, read_texts

WORDS = ("warm", "dull", "sharp", "long", "kind", "flat")


def sentences(count: int) -> str:
    """Texts with ratings, as in the files: CRLF, no header, no end of the last line."""
    rows = [f"{n}\t{(-1) ** n * (n % 4 + 0.25)}\t{WORDS[n % 6]} film {n}" for n in range(count)]
    return "\r\n".join(rows)


Put = Callable[[str, str], None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes a text the downloaded file of a name."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    reviews = fetching.PACKAGES["reviews"]

    def write(name: str, content: str) -> None:
        known = fetching.PACKAGES["reviews"]
        payload = content.encode()
        digest = hashlib.sha256(payload).hexdigest()
        member = dataclasses.replace(reviews.files[name], sha256=digest, size=len(payload))
        altered = dataclasses.replace(known, files={**known.files, name: member})
        monkeypatch.setitem(fetching.PACKAGES, "reviews", altered)
        fetching.download_folder().mkdir(parents=True, exist_ok=True)
        (fetching.download_folder() / member.file).write_bytes(payload)

    return write


def test_the_sign_of_the_rating_is_the_label(put: Put) -> None:
    """Without zeros, and without the second of two equal texts, whatever its rating."""
    put("films", "1\t2.5\tgood\r\n2\t-0.1\tbad\r\n3\t0.0\tneither\r\n4\t-3\tgood\r\n5\t1\tneither")
    assert {o.text: o.label for o in read_opinions("films")} == {
        "good": "positive",
        "bad": "negative",
    }
    assert {o.text: (o.label, o.answer) for o in read_opinions("rating")} == {
        "good": ("2.5", "2"),
        "bad": ("-0.1", "0"),
        "neither": ("0.0", "0"),
    }


def test_splits_are_fixed_and_the_first_rows_a_sample(put: Put) -> None:
    put("films", sentences(1000))
    opinions = read_opinions("films")
    counts = [sum(o.split == split for o in opinions) for split in ("train", "dev", "test")]
    assert sum(counts) == 1000
    for count, share in zip(counts, (700, 100, 200), strict=True):
        assert abs(count - share) < 50
    splits = ["dev", "train", "test", "train"]
    assert [split_by_hash(text) for text in ("a", "b", "e", "h")] == splits
    first = [int(opinion.text.split()[-1]) for opinion in opinions[:100]]
    assert 350 < sum(first) / 100 < 650
    rated = {opinion.text: opinion.split for opinion in read_opinions("rating")}
    assert rated == {opinion.text: opinion.split for opinion in opinions}


def test_a_document_is_in_one_split(put: Put) -> None:
    rows = [f"{d}_{n}\t1.5\tsentence {n} of {d}" for d in range(100) for n in range(5)]
    put("editorials", "\r\n".join(rows))
    splits: dict[str, set[str]] = {}
    for opinion in read_opinions("editorials"):
        splits.setdefault(opinion.text.split()[-1], set()).add(opinion.split)
    assert len(splits) == 100
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "dev", "test"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("id\trating\ttext\r\n1\t2\ta", "line 1: rating 'rating' is no number from -4 to 4"),
        ("1\t2\ta\r\n2\tnan\tb", "line 2: rating 'nan' is no number"),
        ("1\t2\ta\r\n2\tinf\tb", "line 2: rating 'inf' is no number"),
        ("1\t2\ta\r\n2\t4.5\tb", "line 2: rating '4.5' is no number"),
        ("1\t2\ta\r\n2\t\tb", "line 2: rating '' is no number"),
        ("1\t2\ta\r\n2\t3\t ", "line 2: no text"),
        ("1\t2\r\n2\t3", "line 1: 2 columns, but three were expected: id, rating and text"),
        ("1\t2\ta\r\n2\tb", "line 2: 2 columns, the first row has 3"),
        ("1\t2\ta\tb\r\n", "line 1: 4 columns"),
        ("\r\n", "is empty"),
    ],
)
def test_what_is_not_a_rated_text_is_an_error(put: Put, content: str, match: str) -> None:
    put("films", content)
    with pytest.raises(DataError, match=match):
        read_opinions("films")


def test_bytes_that_are_no_text_are_an_error(put: Put) -> None:
    put("films", "1\t2\ta")
    file = fetching.path("films")
    file.write_bytes(b"1\t2\t\xff")
    with pytest.raises(DataError, match="is damaged: SHA-256"):
        read_opinions("films")


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(DataError, match="no data set opinions/books. Known: films, amazon, tweets"):
        read_opinions("books")
    with pytest.raises(DataError, match="films needs .*Run lora data fetch reviews"):
        read_examples("opinions/films")


def test_they_are_read_as_labelled_texts(put: Put) -> None:
    put("films", sentences(400))
    put("amazon", sentences(400).replace("film", "lamp"))
    corpus = read_examples("opinions/films", limits={"train": 50, "test": 50})
    assert (corpus.task, corpus.labels) == ("classification", ("negative", "positive"))
    assert len(corpus.train) == len(corpus.test) == 50
    assert corpus.columns.label == "label"
    assert corpus.notes == ()
    rating = read_examples("opinions/rating")
    assert rating.task == "regression"
    kind = (corpus.task, corpus.labels)
    other, split = read_split("opinions/amazon", corpus.columns, corpus.columns, kind, None)
    assert split == "test"
    assert all("lamp" in example.text for example in other.test)


def test_they_are_read_as_conversations(put: Put) -> None:
    for name in ("films", "amazon", "tweets", "editorials"):
        put(name, sentences(300))
    sources = [f"opinions/{name}" for name in OPINIONS]
    config = parse_run(
        ["--base", "demo-lm-tiny", "--task", "text", "--limit", "20", "--dev-limit", "3",
         "--data", *sources]
    )  # fmt: skip
    corpus = read_corpus(config)
    assert corpus.tasks == tuple(OPINIONS)
    sizes = [len(rows) // len(OPINIONS) for rows in (corpus.train, corpus.dev, corpus.test)]
    assert sizes == [20, 3, 20]
    system, question, answer = corpus.train[0].messages
    assert (system.role, system.content) == ("system", "Answer with one word.")
    head, text = question.content.split("\n\n")
    assert head == "Is this film review positive or negative?"
    assert "film" in text
    assert answer.content in ("positive", "negative")
    assert corpus.train[0].references == (answer.content,)
    rated = [row for row in corpus.train if row.task == "rating"]
    assert "a whole number" in rated[0].messages[0].content
    assert {row.references[0] for row in rated} <= {str(number) for number in range(-4, 5)}
    metrics = metrics_of_answers(config.data)
    assert set(metrics) == set(OPINIONS)
    assert set(metrics["rating"]) == {"exact_match", "within_one"}
    assert set(metrics["films"]) == {"exact_match", "named_label"}
    one, split = read_texts("words=opinions/tweets", None)
    assert (one.tasks, split, bool(one.test), bool(one.train)) == (("words",), "test", True, False)


def test_metrics_of_an_answer() -> None:
    assert same_word(" Positive.\n", "positive") == same_word('"negative"', "negative") == 1
    assert same_word("not positive", "positive") == same_word("", "positive") == 0
    for text, right in (
        ("This film review is positive.", 1), ("Positive", 1), ("It is negative", 0),
        ("both positive and negative", 0), ("unpositive", 0), ("", 0),
    ):  # fmt: skip
        assert named_label(text, "positive") == right, text
    assert within_one("2", "3") == within_one("-0", "1") == within_one("3", "3") == 1
    assert within_one("-3", "3") == within_one("three", "3") == 0


def test_demo_means_the_reviews_once_they_are_here(put: Put) -> None:
    assert resolved("demo") == recorded_source("demo") == TINY
    assert resolved("x=demo") == "x=demo-tiny"
    assert resolved("demo-tiny") == "demo-tiny"
    assert resolved("my-demo") == "my-demo"
    corpus = read_examples("demo")
    assert (corpus.source, corpus.notes) == (TINY, (STAND_IN,))
    assert "Run lora data fetch reviews" in STAND_IN
    assert read_examples(TINY).notes == ()
    assert [len(rows) for rows in (corpus.train, corpus.dev, corpus.test)] == [700, 100, 200]
    put("films", sentences(400))
    assert resolved("demo") == recorded_source("demo") == FILMS
    assert resolved("x=demo") == "x=opinions/films"
    assert read_examples("demo").train == read_examples("opinions/films").train
    fetching.path("films").write_bytes(b"damaged")
    assert resolved("demo") == TINY


def test_the_stand_in_has_no_conversations() -> None:
    config = parse_run(["--base", "demo-lm-tiny", "--task", "text"])
    with pytest.raises(DataError, match="demo-tiny has no prompts.*lora data fetch reviews"):
        read_corpus(config)


def test_a_run_records_what_demo_meant(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So does a run of an earlier version, whose demo was always the stand-in."""
    run = tmp_path / "run"
    flags = ["--epochs", "1", "--limit", "4", "--method", "head", "--run-dir", str(run)]
    assert cli.main(["train", *flags]) == 0
    assert STAND_IN in capsys.readouterr().err
    assert read_toml(run / "config.toml")["data"] == [TINY]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"] == TINY
    assert STAND_IN in summary["note"]
    older = Path(shutil.copytree(run, tmp_path / "older"))
    table = read_toml(older / "config.toml") | {"data": ["demo"]}
    (older / "config.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    put("films", sentences(400))
    for each in (run, older):
        assert cli.main(["eval", str(each)]) == 0
        printed = capsys.readouterr()
        assert f"loss {summary['loss']:.4f}" in printed.out
        assert "has changed" not in printed.err
    assert cli.main(["eval", str(run), "--data", "opinions/films"]) == 2
    assert "label 'positive' is outside the set 0, 1" in capsys.readouterr().err


def test_lora_data_lists_them_with_licence_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in ("opinions/films ", "demo-tiny ", "1,000 ", "licence MIT", "Hutto and Gilbert"):
        assert part in printed


@pytest.mark.slow
def test_the_real_reviews(downloads: None) -> None:
    """As many as were counted by hand, and in each split as many as docs/data.md says."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    counts = {"films": 10566, "amazon": 3599, "editorials": 4878, "tweets": 4196, "rating": 10603}
    for name, count in counts.items():
        opinions = read_opinions(name)
        assert len(opinions) == len({opinion.text for opinion in opinions}) == count
        splits = Counter(opinion.split for opinion in opinions)
        shown = " / ".join(f"{splits[split]:,}" for split in ("train", "dev", "test"))
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `opinions/{name}`")]
        assert shown in row
    corpus = read_examples("demo")
    assert corpus.source == FILMS
    assert len(corpus.train) >= 4000
    assert len(corpus.test) >= 2000
    assert corpus.notes == ()


@pytest.mark.parametrize(
    ("sources", "right"),
    [
        (["tasks/capital", "rating=opinions/rating"], (True, False, True, False)),
        (["tasks/capital", "rating=opinions/rating", "mine.jsonl"], (True, True, True, True)),
    ],
)
def test_a_comparison_counts_right_answers_as_the_run_did(
    sources: list[str], right: tuple[bool, ...], tmp_path: Path
) -> None:
    """The case of a letter and the sign of a number matter in data sets that say so; if one has no
    metric of its own, all answers are compared as SQuAD does, as in the scores of the run."""
    rows = [
        ("capital", "Uvupe", "Uvupe"), ("capital", "uvupe", "Uvupe"),
        ("rating", "-1.5", "-1.5"), ("rating", "1.5", "-1.5"),
    ]  # fmt: skip
    path = tmp_path / "predictions.jsonl"
    lines = [{"task": t, "prediction": p, "references": [r]} for t, p, r in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = read_predictions(path)
    assert scores_by_row(sources, answers, "exact_match") == right
    assert scores_by_row(sources, answers, "bleu") is None
    assert scores_of_answers(sources, answers)["exact_match"] == sum(right) / 4
    for task, shown in (("copy", "copy"), ("", "no data set")):
        other = answers._replace(tasks=[task, *answers.tasks[1:]])
        with pytest.raises(DataError, match=f"a prediction is of {shown}, and the run's data sets"):
            scores_by_row(sources, other, "exact_match")
