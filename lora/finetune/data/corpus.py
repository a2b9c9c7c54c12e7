"""Rows of text, pair and label per split, from files or the hub: read(...) -> Corpus."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora.errors import DataError
from lora.finetune import demo
from lora.finetune.data.columns import (
    ANY,
    LABEL,
    LARGEST_LABEL,
    Columns,
    Header,
    Placed,
    adopted,
    choose_columns,
    find_column,
    first_row,
    names_of,
    number_of,
)
from lora.finetune.data.rows import SPLITS, BadRows, Row, is_plain, read_rows, read_source, text_in

Task = Literal["auto", "classification", "regression", "text"]


@dataclass(frozen=True)
class Example:
    """One text, or a pair; the label is a class's name, a number, or None where unknown."""

    text: str
    pair: str | None
    label: str | None
    place: str = ""  # "FILE, line N"

    def content(self) -> tuple[Any, ...]:
        """All that a model sees of it, and its answer."""
        return self.text, self.pair, self.label


@dataclass(frozen=True)
class Corpus:
    """A data set as read: what to learn from, what to choose by, what to report on."""

    source: str
    task: Task  # auto no longer
    labels: tuple[str, ...]  # of a classification alone
    train: tuple[Any, ...]  # Examples; of the task text Conversations
    dev: tuple[Any, ...]
    test: tuple[Any, ...]
    columns: Columns = ANY  # those that were taken; of the task text none
    note: str = ""  # what was decided on the user's behalf
    said: tuple[str, ...] = ()  # which columns were taken, and the rows of each class
    tasks: tuple[str, ...] = ()  # names of the data sets that texts are from
    bad: BadRows = field(default_factory=BadRows)
    """Of the task text: rows left out so far. Who applies a template adds those that it refuses."""

    @property
    def held_out(self) -> tuple[str, tuple[Any, ...]]:
        """The split that results are reported on: test, or dev where there is none."""
        return ("test", self.test) if self.test else ("dev", self.dev)

    def digest(self) -> str:
        """SHA-256 of every split's texts and labels, in their order."""
        found = hashlib.sha256()
        for split in (self.train, self.dev, self.test):
            rows = [example.content() for example in split]
            found.update(json.dumps(rows).encode())
        return found.hexdigest()

    def targets(self, examples: Sequence[Example]) -> list[float]:
        """Labels as numbers: class indices, or the values of a regression."""
        if self.task == "regression":
            return [number_of(example.label) for example in examples]
        index = {label: i for i, label in enumerate(self.labels)}
        return [float(index[str(example.label)]) for example in examples]


def read_examples(
    data: str,
    columns: Columns = ANY,
    task: Task = "auto",
    labels: tuple[str, ...] = (),
    limit: int | None = None,
    skip_bad_lines: int = 0,
) -> Corpus:
    """A data set in three splits. Raises DataError with the file, the row and the remedy."""
    bad, header = BadRows(skip_bad_lines), Header(columns)
    splits = _read_splits(data, header, bad)
    notes = []
    if "" in splits:
        notes.append(f"{data} has no column 'split': cut 80/10/10 into train, dev and test")
    if not splits.get("train") and not splits.get(""):
        bad.judge(left=False)
        raise DataError(
            f"--data {data} has no training rows, found {', '.join(splits) or 'nothing'}."
            " Pass a folder with train.tsv, .csv or .jsonl."
        )
    examples, taken = _examples_of(data, splits, columns, bad)
    label = taken.label
    if "" in examples:
        if len(examples[""]) < 3:
            bad.judge()
        examples = _split_once(data, examples[""])
    for name in _hidden(examples):
        why = (
            f"has no {label}" if {e.label for e in examples[name]} == {None} else "hides its labels"
        )
        del examples[name]
        notes.append(f"the split {name} {why}, and is left out")
    for name, rows in examples.items():
        examples[name] = _labelled(rows, labels, bad)
    train, dev, test = (tuple(examples.get(name, ())) for name in SPLITS)
    if not dev:
        train, dev = _hold_out(train, 0.1)
        notes.append(f"{data} has no dev split: every tenth training row is held out as dev")
        if len(train) < 1:
            bad.judge()
            raise DataError(
                f"--data {data}: too few rows to hold one out as dev. Pass a dev split."
            )
    if limit is not None:
        train, dev, test = train[:limit], dev[:limit], test[:limit]
    if task == "auto":
        task = "regression" if not labels and _fractional(train) else "classification"
        if task == "regression":
            notes.append("the labels are fractional numbers: a regression")
    if task == "classification":
        labels = labels or _sorted_labels({str(example.label) for example in train})
        _check_classes(data, train, labels, label if columns.label is None else None, bad)
    labels = labels if task == "classification" else ()
    corpus = Corpus(data, task, labels, train, dev, test, taken)
    parts = [tuple(_fitting(corpus, split, bad)) for split in (train, dev, test)]
    notes = bad.judge() + notes
    if not parts[0] or not parts[1]:
        raise DataError(f"--data {data}: no row is left to learn from, or none to choose by.")
    corpus = replace(corpus, train=parts[0], dev=parts[1], test=parts[2], note="; ".join(notes))
    return replace(corpus, said=(_taken(data, header.seen, taken), *_class_counts(corpus)))


def _read_splits(data: str, header: Header, bad: BadRows) -> dict[str, list[Placed]]:
    """The rows of each split; "" holds those of a file that names none."""
    splits: dict[str, list[Placed]] = {}
    source = str(demo.REVIEWS) if data == "demo" else data
    for split, place, row in read_source(source, header):
        if isinstance(row, DataError):
            bad.add(row, place)
        else:
            plain = {name: value for name, value in row.items() if is_plain(value)}
            splits.setdefault(split, []).append((place, plain))
    if len(splits) > 1:
        for place, _ in splits.pop("", ()):
            bad.add(DataError(f"{place}: no split, where other rows have one. Fill it in."), place)
    return splits


def _examples_of(
    data: str, splits: dict[str, list[Placed]], columns: Columns, bad: BadRows
) -> tuple[dict[str, list[Example]], Columns]:
    """The examples of each split, and the columns that they are from, alike in every split."""
    main = "" if "" in splits else "train"
    taken = choose_columns(splits[main], columns)
    if taken.label is None:
        raise DataError(
            f"--data {data}: no label column among {', '.join(names_of(splits[main]))}."
            f" {first_row(splits[main])} Set --label-column."
        )
    examples = {}
    for name, rows in splits.items():
        names = names_of(rows)
        lacking = [one for one in (taken.text, taken.pair) if one is not None and one not in names]
        if lacking:
            raise DataError(
                f"--data {data}: train has its text in {taken.text}, {taken.pair or 'no pair'};"
                f" {name} has no {lacking[0]}, found {', '.join(names)}. Give every split the same"
                " columns."
            )
        examples[name] = _examples(rows, taken, bad)
    return examples, taken


def _labelled(rows: Sequence[Example], labels: Sequence[str], bad: BadRows) -> list[Example]:
    """The examples that have a label; a number that is none, as NaN, has to be asked for."""
    kept = []
    for one in rows:
        if one.label is None:
            bad.add(
                DataError(f"{one.place}: no label. Fill it in, or set --label-column."), one.place
            )
        elif one.label not in labels and _number_is_none(one.label):
            bad.add(
                DataError(
                    f"{one.place}: label {one.label!r} is no finite number: is it missing? Fill"
                    " it in, or name it as a class in --labels."
                ),
                one.place,
            )
        else:
            kept.append(one)
    return kept


def _number_is_none(label: str) -> bool:
    """Whether a label is written as a number and is not finite."""
    try:
        return not math.isfinite(float(label))
    except ValueError:
        return False


def _check_classes(
    data: str, train: Sequence[Example], labels: Sequence[str], guessed: str | None, bad: BadRows
) -> None:
    """Raise DataError if there is nothing to classify, or if a column that was not asked for holds
    about as many labels as rows."""
    if len(labels) < 2:
        bad.judge()
        raise DataError(
            f"--data {data}: training needs two classes at least, found"
            f" {', '.join(labels) or 'none'} in {len(train)} rows. Check --label-column."
        )
    many = 2 * len(labels) > len(train) > 4
    if many and guessed is not None and guessed.strip().lower() not in LABEL:
        raise DataError(
            f"--data {data}: column {guessed} has {len(labels)} labels in {len(train)} rows, such"
            f" as {labels[0][:40]!r}: are they classes? If so, pass --label-column {guessed}; if"
            " not, set --text-column and --label-column."
        )


def _taken(data: str, headed: bool | None, taken: Columns) -> str:
    """What a user is told of the columns."""
    header = {None: "", True: "a header", False: "no header"}[headed]
    roles = {"text": taken.text, "pair": taken.pair, "label": taken.label}
    what = [f"the {role} in column {name}" for role, name in roles.items() if name is not None]
    return f"{data}: {', '.join(filter(None, [header, *what]))}"


def _class_counts(corpus: Corpus) -> list[str]:
    """The rows of each class, or the range of a regression, per split."""
    lines = []
    for name, rows in zip(SPLITS, (corpus.train, corpus.dev, corpus.test), strict=True):
        if rows and corpus.task == "regression":
            values = corpus.targets(rows)
            lines.append(f"{name}: {len(rows)} rows, from {min(values):g} to {max(values):g}")
        elif rows:
            counts = Counter(str(row.label) for row in rows)
            shown = [f"{label[:40]} {counts[label]}" for label in corpus.labels[:20]]
            more = len(corpus.labels) - len(shown)
            shown += [f"and {more} classes more"] if more else []
            lines.append(f"{name}: {len(rows)} rows, by class: {', '.join(shown)}")
    return lines


def _hidden(examples: dict[str, list[Example]]) -> list[str]:
    """Splits whose labels a benchmark keeps to itself: none, or all -1 where train has no -1."""
    known = {number_of(example.label) for example in examples["train"]}
    found = []
    for name in set(examples) - {"train"}:
        labels = {example.label for example in examples[name]}
        minus_one = {number_of(label) for label in labels} == {-1.0} and -1.0 not in known
        if labels and (labels == {None} or minus_one):
            found.append(name)
    return found


def read_split(
    data: str,
    columns: Columns,
    trained: Columns,
    kind: tuple[Task, tuple[str, ...]],
    split: str | None,
    skip_bad_lines: int = 0,
) -> tuple[Corpus, str]:
    """Labelled examples to score a trained model on, as the corpus's split of the name returned.

    A file without a split column is scored whole, as test. A folder needs no train file. Columns
    that are not asked for are those that the model was `trained` on, or the usual ones; `kind` is
    its task and its classes.
    """
    task, labels = kind
    bad, header = BadRows(skip_bad_lines), Header(columns, trained, labels)
    splits = _read_splits(data, header, bad)
    if "" in splits:
        splits = {split or "test": splits[""]}
    there = [name for name in ([split] if split else ["test", "dev", "train"]) if splits.get(name)]
    if not there:
        bad.judge(left=False)
        raise DataError(
            f"--data {data} has no {split or 'labelled'} split, found {', '.join(splits)}."
        )
    rows = splits[there[0]]
    taken = choose_columns(rows, adopted(rows, columns, trained, header.seen))
    if taken.label is None:
        raise DataError(
            f"--data {data}: no label column among {', '.join(names_of(rows))}. {first_row(rows)}"
            " Set --label-column."
        )
    examples = _labelled(_examples(rows, taken, bad), labels, bad)
    found = Corpus(data, task, labels, (), (), (), taken)
    examples = _fitting(found, examples, bad)
    notes = bad.judge(left=bool(examples))
    train, dev, test = (tuple(examples) if name == there[0] else () for name in SPLITS)
    found = replace(found, train=train, dev=dev, test=test, note="; ".join(notes))
    return replace(found, said=(_taken(data, header.seen, taken), *_class_counts(found))), there[0]


def unlabelled(
    data: str,
    columns: Columns,
    trained: Columns = ANY,
    labels: Sequence[str] = (),
    skip_bad_lines: int = 0,
) -> tuple[list[Example], list[str]]:
    """The rows of one file, labelled or not, in the file's order, and what was taken for what; the
    `trained` columns and the classes of the model help to find it."""
    bad, header = BadRows(skip_bad_lines), Header(columns, trained, labels)
    rows = []
    for place, row in read_rows(Path(data), header):
        if isinstance(row, DataError):
            bad.add(row, place)
        else:
            rows.append((place, {name: v for name, v in row.items() if is_plain(v)}))
    if not rows:
        bad.judge(left=False)
        raise DataError(f"{data} has no rows.")
    if columns.label is not None and find_column(columns.label, names_of(rows)) is None:
        columns = replace(columns, label=None)
    taken = choose_columns(rows, adopted(rows, columns, trained, header.seen))
    examples = _examples(rows, taken, bad)
    return examples, [*bad.judge(left=bool(examples)), _taken(data, header.seen, taken)]


def _split_once(data: str, rows: list[Example]) -> dict[str, list[Example]]:
    """80/10/10, by one shuffle that never changes."""
    if len(rows) < 3:
        raise DataError(f"--data {data}: {len(rows)} rows cannot be cut in three. Add rows.")
    rows = rows.copy()
    random.Random(0).shuffle(rows)
    tenth = max(1, len(rows) // 10)
    return {"test": rows[:tenth], "dev": rows[tenth : 2 * tenth], "train": rows[2 * tenth :]}


def _hold_out(
    train: tuple[Example, ...], share: float
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    step = min(round(1 / share), max(len(train), 1))
    dev = train[step - 1 :: step]
    return tuple(e for i, e in enumerate(train) if i % step != step - 1), dev


def _examples(rows: Iterable[Placed], taken: Columns, bad: BadRows) -> list[Example]:
    examples = []
    for place, row in rows:
        try:
            examples.append(_example(place, row, taken))
        except DataError as error:
            bad.add(DataError(f"{place}: {error}"), place)
    return examples


def _example(place: str, row: Row, taken: Columns) -> Example:
    assert taken.text is not None
    for name in (taken.text, taken.pair):
        if name is not None and name not in row:
            raise DataError(
                f"no column {name!r} with a text, found {', '.join(row) or 'none'}."
                " A row's text may not be absent, null, a list or an object. Mend the line."
            )
    text = text_in(row, taken.text).strip()
    pair = None if taken.pair is None else text_in(row, taken.pair).strip()
    label = text_in(row, taken.label).strip() if taken.label in row else ""
    try:
        f"{text}{pair}{label}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{error.reason}: half of a character pair.") from None
    return Example(text, pair, label or None, place)


def _fractional(examples: Iterable[Example]) -> bool:
    """Whether nine labels in ten are numbers, and some not whole: a quantity and no class."""
    values = [number_of(example.label) for example in examples]
    numbers = [value for value in values if math.isfinite(value)]
    return 10 * len(numbers) >= 9 * len(values) and not all(v.is_integer() for v in numbers)


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _fitting(corpus: Corpus, examples: Sequence[Example], bad: BadRows) -> list[Example]:
    """The examples whose label the task takes."""
    kept = []
    for example in examples:
        if wrong := _misfit(corpus, example):
            bad.add(DataError(f"{example.place}: {wrong}"), example.place)
        else:
            kept.append(example)
    return kept


def _misfit(corpus: Corpus, example: Example) -> str:
    """What is wrong with a label, "" if nothing is."""
    if corpus.task == "regression":
        if abs(number_of(example.label)) <= LARGEST_LABEL:
            return ""
        return (
            f"label {example.label!r} is no number that float32 holds. Mend the row, or set --task"
            " classification."
        )
    if example.label in corpus.labels:
        return ""
    many = 2 * len(corpus.labels) > len(corpus.train) > 4
    way = "Mend the row, or set --labels."
    if many:
        way = "There are about as many labels as rows: set --text-column and --label-column."
    shown = ", ".join(corpus.labels[:12])
    return f"label {example.label!r} is outside the set {shown}. {way}"


def examples_of(corpus: Corpus, split: str) -> tuple[Any, ...]:
    """The examples of a split by its name. Raises DataError where it has none."""
    found: tuple[Any, ...] = getattr(corpus, split)
    if not found:
        raise DataError(f"{corpus.source} has no {split} split. Pass --split dev or train.")
    return found


def read_predictions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Predictions and, for each, its references, from JSON lines with `prediction` and `label` or
    `references` (a text or a list of them)."""
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: predictions are JSON lines, in a file that ends in .jsonl.")
    predictions, references = [], []
    for place, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        wanted = row.get("references", row.get("label"))
        several = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
        if row.get("prediction") is None or not several:
            raise DataError(
                f"{place}: needs prediction and label (or references),"
                f" found {', '.join(row) or 'nothing'}."
            )
        try:
            predictions.append(text_in(row, "prediction"))
            references.append([text_in({"reference": one}, "reference") for one in several])
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    return predictions, references
