"""A header is told from an example for any names, or the user is asked; never wrong without a word.

Each file has the rows that a first line goes on top of: as they are, and below a header.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from conftest import needs_shared

from lora.errors import DataError
from lora.finetune import demo
from lora.finetune.data.columns import Columns
from lora.finetune.data.corpus import read_examples
from lora.finetune.data.headers import has_header

WORDS = re.findall(
    r"\w+",
    "camera battery screen delivery staff room breakfast plot actor ending song chorus engine seat"
    " price refund ticket driver garden teacher lesson soup waiter view beach queue sound",
)
GOOD = ("lovely", "great", "splendid", "fast", "kind", "clean", "honest")
BAD = ("awful", "slow", "rude", "broken", "dull", "cold", "late")
Rows = list[list[str]]


def review(draw: random.Random, good: bool, mark: str = ".") -> str:
    first, last = draw.sample(WORDS, 2)
    kind = draw.choice(GOOD if good else BAD)
    return draw.choice(
        (
            f"The {first} was {kind} and so was the {last}{mark}",
            f"{kind} {first}, {kind} {last}{mark}",
            f"I thought that the {first} in the evening was {kind}{mark}",
            f"{kind} {first}",
        )
    )


def reviews(labels: tuple[str, str], count: int = 60, seed: int = 0, mark: str = ".") -> Rows:
    draw = random.Random(seed)
    picks = [draw.random() < 0.5 for _ in range(count)]
    return [[review(draw, good, mark), labels[good]] for good in picks]


def classes(labels: str, count: int = 80, seed: int = 1) -> Rows:
    draw, names = random.Random(seed), labels.split()
    rows = []
    for _ in range(count):
        name = draw.choice(names)
        words = " ".join(draw.sample(WORDS, draw.randint(2, 9)))
        rows.append([f"{words} {name[:4]}", name])
    return rows


def numbered(rows: Rows, start: int = 0) -> Rows:
    return [[str(number), *row] for number, row in enumerate(rows, start)]


def flipped(rows: Rows) -> Rows:
    return [row[::-1] for row in rows]


def pairs(labels: tuple[str, ...], count: int = 50, seed: int = 2) -> Rows:
    draw = random.Random(seed)
    return [
        [review(draw, True), review(draw, draw.random() < 0.5), draw.choice(labels)]
        for _ in range(count)
    ]


def single_words(count: int = 60) -> Rows:
    words = [*WORDS, *GOOD, *BAD, "run", "walk", "sing", "eat", "go", "fly", "see", "hear", "write"]
    kinds = ["noun"] * len(WORDS) + ["adjective"] * 14 + ["verb"] * 9
    rows = [[word, kind] for word, kind in zip(words, kinds, strict=True)]
    random.Random(3).shuffle(rows)
    return rows[:count]


def amounts(count: int = 50) -> Rows:
    draw = random.Random(4)
    return [[review(draw, True), f"{draw.uniform(0, 5):.2f}"] for _ in range(count)]


def stars(count: int = 60) -> Rows:
    draw = random.Random(5)
    return [[review(draw, True), str(draw.randint(1, 5))] for _ in range(count)]


def posts(count: int = 60) -> Rows:
    draw = random.Random(6)
    return [
        [str(7_000 + i), f"2023-0{1 + i % 9}-1{i % 10} 12:0{i % 6}", f"user{i}", review(draw, True),
         draw.choice(("sport", "politics", "culture"))]
        for i in range(count)
    ]  # fmt: skip


SENTIMENTS, TOPICS = ("negative", "positive"), "sport politics business technology"
INTENTS = "card_arrival lost_card exchange_rate top_up_failed balance_not_updated"
BY_CLASS = sorted(classes(TOPICS), key=lambda row: row[1])
BY_LENGTH = sorted(reviews(SENTIMENTS, mark=""), key=lambda row: len(row[0]))

HEADERS: list[tuple[str, Rows]] = [
    ("message,category", classes(TOPICS)),
    ("comment,topic", classes(TOPICS, seed=2)),
    ("tweet,polarity", reviews(SENTIMENTS)),
    ("body,intent", classes(INTENTS)),
    ("text,label", reviews(("0", "1"))),
    ("sentence,label", reviews(SENTIMENTS, 4)),
    ("review,sentiment", reviews(SENTIMENTS, 3)),
    ("v1,v2", flipped(classes("ham spam", 200))),
    ("Category,Message", flipped(classes("ham spam", 12))),
    ("label,text", flipped(reviews(("0", "1"), 3))),
    ("Tweet Text,Airline Sentiment", classes("negative neutral positive")),
    ("Beschwerde,Abteilung", classes("Technik Verkauf Personal", 150)),
    ("commentaire,sujet", classes("sport culture politique", 150)),
    ("評論,情感", reviews(("負面", "正面"), 100)),
    ("отзыв,оценка", reviews(("плохо", "хорошо"), 100)),
    ("zzz,qqq", reviews(SENTIMENTS, 200)),
    ("utterance,intent", classes(INTENTS, 6)),
    ("query,domain", classes(TOPICS, 5)),
    ("headline,is_sarcastic", reviews(("0", "1"), 10)),
    ("id,comment_text,toxic", numbered(reviews(("0", "1"), 20))),
    ("id,text,author", numbered(classes("EAP HPL MWS", 60))),
    (",text,label", numbered(reviews(SENTIMENTS, 30))),
    (",Phrase,Mood", numbered(classes("happy sad angry", 30))),
    ("0,1", reviews(SENTIMENTS, 30)),
    ("premise,hypothesis,label", pairs(("entailment", "neutral", "contradiction"))),
    ("question1,question2,is_duplicate", pairs(("0", "1"), 3)),
    ("sentence_A,sentence_B,judgment", pairs(("ENTAILMENT", "NEUTRAL"), 90)),
    ("Satz1,Satz2,Urteil", pairs(("gleich", "verschieden"), 90)),
    ("text,score", amounts()),
    ("essay,grade", stars()),
    ("Review Text,Rating", stars(4)),
    ("tweet_id,created_at,user,content,topic", posts()),
    ("post_id,date,author,body,flair", posts(8)),
    ("word,class", single_words()),
    ("mot,catégorie", single_words(50)),
    ("word,pos_tag", single_words(6)),
    ("text,label", BY_CLASS),
    ("Kommentar,Thema", BY_CLASS),
    ("message,category", BY_LENGTH),
    ("text,emotion", [["great film", "joy"], ["bad film", "anger"], ["odd film", "surprise"]]),
    (
        "title,genre",
        [[f"The {word} of {other}", word] for word, other in itertools.pairwise(WORDS)],
    ),
    ("text", [[review(random.Random(i), True)] for i in range(20)]),
    ("utterance", [[word] for word in WORDS]),
    (
        "Quality,#1 ID,#2 ID,#1 String,#2 String",
        [
            [str(i % 2), str(700 + i), str(900 + i), f"{w} was seen .", f"They saw {w} ."]
            for i, w in enumerate(WORDS)
        ],
    ),  # MRPC
    (
        "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score",
        [
            [
                str(i),
                "main",
                "MSRvid",
                "2012test",
                f"{i:04}",
                "none",
                "none",
                f"a {w}",
                f"the {w}",
                "4.2",
            ]
            for i, w in enumerate(WORDS)
        ],
    ),  # STS-B
    (
        "pair_ID,sentence_A,sentence_B,relatedness_score,entailment_judgment",
        [[str(i), f"a {w} waits", f"the {w} waits", "4.5", "NEUTRAL"] for i, w in enumerate(WORDS)],
    ),
    ("dialogue,summary_quality", [[row[0] * 9, row[1]] for row in stars()]),
]

EXAMPLES: list[Rows] = [
    classes(TOPICS), classes(TOPICS, seed=9), reviews(SENTIMENTS), classes(INTENTS),
    reviews(("0", "1")), reviews(("0", "1"), 3), reviews(SENTIMENTS, 30),
    reviews(("no", "yes"), 12),
    flipped(classes("ham spam", 200)), flipped(classes("ham spam", 12)),
    flipped(reviews(("0", "1"), 3)), flipped(reviews(("-1", "1"))), stars(), stars(3), amounts(),
    amounts(3), numbered(reviews(("0", "1"))), numbered(classes(TOPICS)), numbered(stars(), 1),
    pairs(("entailment", "neutral", "contradiction")), pairs(("0", "1"), 3), pairs(("0", "1")),
    numbered(pairs(("gleich", "verschieden"))), posts(), posts(8), posts(3),
    single_words(), single_words(30), flipped(single_words()), BY_CLASS, flipped(BY_CLASS),
    BY_LENGTH, BY_LENGTH[::-1], flipped(BY_LENGTH), sorted(single_words()),
    classes("question query comment title"), flipped(classes("text label message")),
    [["question", "wh"], ["where", "wh"], ["comment", "noun"], ["query", "noun"]],
    [["What is your name?", "ask"], ["Open the door!", "order"], ["It rains.", "say"]],
    [["Where is my card?", "card_arrival"], ["How do I pay?", "payment"], ["Stop it.", "stop"]],
    [["Go.", "Va !"], ["Hi.", "Salut !"], ["Run!", "Cours !"], ["Wow!", "Ça alors !"]],
    [[f"{word} number {i}", word] for i, word in enumerate(WORDS * 3)],
    [["1", "one two", "a"], ["2", "two", "b"], ["3", "three", "c"]],
    [[review(random.Random(i), True)] for i in range(20)],
    [[word] for word in WORDS],
    [["first line"], ["second"]],
    [["gj04", str(i % 2), "" if i % 3 else "*", f"The {w} rode the breeze."]
     for i, w in enumerate(WORDS)],  # CoLA
    [[str(1 + i % 4), f"{w} falls again", f"AP - The {w} fell."] for i, w in enumerate(WORDS)],
    [["0", str(146_781_036 + i), "Mon Apr 06 22:19:45 PDT 2009", "NO_QUERY", f"_{w}_", f"a {w}"]
     for i, w in enumerate(WORDS)],  # Sentiment140
    [["ham" if i % 5 else "spam", f"Go to the {w}, ok"] for i, w in enumerate(WORDS, 1)],
    [["12.5%", "rise"], ["-3%", "fall"], ["4%", "rise"]],
    [["n/a", "0"], ["good", "1"], ["bad", "0"], ["fine", "1"]],
]  # fmt: skip


def test_there_are_forty_of_each() -> None:
    assert min(len(HEADERS), len(EXAMPLES)) >= 40


@pytest.mark.parametrize(("header", "rows"), HEADERS, ids=[name for name, _ in HEADERS])
def test_a_header_is_known(header: str, rows: Rows) -> None:
    assert has_header([header.split(","), *rows]) is True


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_known(number: int) -> None:
    assert has_header(EXAMPLES[number]) is False


@pytest.mark.parametrize("seed", range(8))
def test_of_a_part_of_a_file_the_answer_is_the_same_or_open(seed: int) -> None:
    draw = random.Random(seed)
    for header, rows in HEADERS:
        some = draw.sample(rows, min(draw.randint(1, 30), len(rows)))
        assert has_header([header.split(","), *some]) is not False, header
    for rows in [*EXAMPLES, *(rows for _, rows in HEADERS)]:
        some = draw.sample(rows, min(draw.randint(4, 30), len(rows)))
        assert has_header(some) is not True, some[0]


@pytest.mark.parametrize(
    "cells",
    [
        [["nice film", "pos"], ["bad film", "neg"], ["poor film", "neg"]],
        [["zzz", "qqq"], ["bad film", "neg"], ["fine film", "pos"], ["poor film", "neg"]],
        [["What did you like about it?", "Team"], *classes("red green blue")],
        [["Hello", "7"], ["one", "a"], ["two", "a"], ["three", "a"]][:1],
        [["text", "label"], ["a film", "label"], ["b film", "text"], ["c film", "label"]],
        [["word"], ["two words here"], ["three words here"]][:2] + [["and four words"]] * 3,
    ],
)
def test_what_nobody_can_tell_is_left_open(cells: Rows) -> None:
    known = len(cells) == 5  # one column whose only cell is a usual name
    assert has_header(cells) is (True if known else None)


def test_a_header_with_numbers_is_one_even_over_one_row() -> None:
    assert has_header([["foo", "bar"], ["a film", "1"]]) is True
    assert has_header([["a film", "1"]]) is None
    assert has_header([["text", "label"]]) is True


def saved(path: Path, rows: Rows, header: str = "") -> str:
    mark = "\t" if path.suffix == ".tsv" else ","
    lines = [header.replace(",", mark)] if header else []
    cells = [[f'"{cell}"' if mark == "," else cell for cell in row] for row in rows]
    path.write_text("\n".join([*lines, *map(mark.join, cells)]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("end", ["csv", "tsv"])
@pytest.mark.parametrize(
    "names", ["message,category", "comment,topic", "tweet,polarity", "body,intent"]
)
def test_the_classes_are_those_of_the_rows(names: str, end: str, tmp_path: Path) -> None:
    rows = reviews(SENTIMENTS)
    data = saved(tmp_path / f"x.{end}", rows, names)
    corpus = read_examples(data)
    assert corpus.labels == SENTIMENTS
    examples = [*corpus.train, *corpus.dev, *corpus.test]
    assert sorted((e.text, str(e.label)) for e in examples) == sorted(map(tuple, rows))
    text, label = names.split(",")
    assert (
        corpus.summary[0]
        == f"{data}: a header, the text in column {text}, the label in column {label}"
    )
    counts = [sum(e.label == name for e in corpus.train) for name in SENTIMENTS]
    assert corpus.summary[1] == (
        f"train: 48 rows, by class: negative {counts[0]}, positive {counts[1]}"
    )
    bare = saved(tmp_path / f"y.{end}", rows)
    corpus = read_examples(bare)
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 60
    assert corpus.summary[0] == f"{bare}: no header, the text in column 0, the label in column 1"


def test_the_label_may_come_first_under_any_name_or_none(tmp_path: Path) -> None:
    rows = flipped(classes("ham spam", 30))
    for header, columns in (("v1,v2", ("v2", "v1")), ("", ("1", "0"))):
        corpus = read_examples(saved(tmp_path / "x.csv", rows, header))
        assert (corpus.columns.text, corpus.columns.label) == columns
        assert corpus.labels == ("ham", "spam")


def test_columns_without_a_name_are_called_by_their_number(tmp_path: Path) -> None:
    rows = [[row[1], row[0], "", "", ""] for row in classes("ham spam", 40)]  # SMS Spam Collection
    data = saved(tmp_path / "x.csv", rows, "v1,v2,,,")
    with pytest.raises(DataError, match=r"v1, v2, 2, 3, 4\. First row: v1 '(ham|spam)', v2 '"):
        read_examples(data)
    assert read_examples(data, Columns(text="v2", label="v1")).labels == ("ham", "spam")
    indexed = saved(tmp_path / "y.csv", numbered(reviews(SENTIMENTS)), ",text,label")
    assert read_examples(indexed).labels == SENTIMENTS


def test_an_open_question_is_asked_with_the_row_and_the_flag(tmp_path: Path) -> None:
    rows = [[f"{word} film", kind] for word, kind in zip(WORDS, ["neg", "bad"] * 4)]
    rows.insert(0, ["nice film", "pos"])
    data = saved(tmp_path / "x.csv", rows)
    with pytest.raises(DataError) as error:
        read_examples(data)
    assert str(error.value) == (
        f"{data}: does its first row name the columns, or is it an example? 2 columns, the first"
        " row: 0 'nice film', 1 'pos'. Pass --header yes or --header no."
    )
    corpus = read_examples(data, Columns(header="no"))
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 9
    corpus = read_examples(
        data, Columns(text="nice film", label="pos")
    )  # who names columns says so
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 8


def test_splits_follow_the_training_split(tmp_path: Path) -> None:
    rows = reviews(SENTIMENTS)
    saved(tmp_path / "train.csv", rows, "message,category")
    saved(tmp_path / "dev.csv", rows[:2], "message,category")
    saved(tmp_path / "test.csv", rows[:3], "category,message")
    with pytest.raises(DataError, match="two classes|outside|Give every split|cannot be used"):
        read_examples(str(tmp_path))
    saved(tmp_path / "test.csv", flipped(rows[:3]), "category,message")
    corpus = read_examples(str(tmp_path))
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (60, 2, 3)
    assert corpus.test[0].text == rows[0][0]


def test_a_header_that_comes_again_is_a_bad_row(tmp_path: Path) -> None:
    rows = reviews(SENTIMENTS)
    data = saved(tmp_path / "x.csv", [*rows, ["message", "category"], *rows], "message,category")
    with pytest.raises(DataError, match="line 62: the header again: message, category"):
        read_examples(data)
    corpus = read_examples(data, skip_bad_lines=1)
    assert corpus.labels == SENTIMENTS
    assert "1 row skipped" in str(corpus.notes)


def test_files_that_are_shipped_and_shared_are_known() -> None:
    paths = [demo.REVIEWS]
    paths += sorted(needs_shared("sst2-sentences").rglob("*.[ct]sv"))
    paths += sorted(needs_shared("sst2").rglob("*.[ct]sv"))
    for path in paths:
        lines = path.read_text(encoding="utf-8").split("\n")[:3_000]
        cells = [line.split("\t") for line in lines if line]
        assert has_header(cells) is ("label" in cells[0]), path
