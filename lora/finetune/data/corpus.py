"""Reads labelled texts, single or in pairs, from files or the hub.

read_examples(data)        -> Corpus: train, dev and test of a data set to train on
read_split(data, ...)      -> Corpus and a split's name: labelled rows to evaluate a model on
unlabelled(data, ...)      -> examples of one file to predict; labels are optional
read_predictions(path)     -> predictions to score, with their references
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora.errors import DataError
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
from lora.finetune.data.division import divided, groups_by, without_tenth
from lora.finetune.data.included import resolved_with_note, rows_with_text
from lora.finetune.data.rows import SPLITS, BadRows, Row, is_plain, read_rows, text_in

Task = Literal["auto", "classification", "regression", "text"]
MOST_CLASSES = 20
"""A line lists the classes one by one up to this number, and the largest ones of more."""
LARGEST_CLASSES = 8
LONGEST_LABEL = 40  # characters of a label that are shown


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts. The label is a class name, a number as text, or None."""

    text: str
    pair: str | None
    label: str | None
    place: str = ""  # "FILE, line N"

    def content(self) -> tuple[Any, ...]:
        """Returns what a model sees, and the label: what Corpus.digest() hashes."""
        return self.text, self.pair, self.label


@dataclass(frozen=True)
class Corpus:
    """A data set: train to learn from, dev to choose the checkpoint, test to report results on."""

    source: str
    task: Task  # never "auto"
    labels: tuple[str, ...]  # the classes; empty for other tasks
    train: tuple[Any, ...]  # Examples, or Conversations if the task is text
    dev: tuple[Any, ...]
    test: tuple[Any, ...]
    columns: Columns = ANY  # the columns in use; not set if the task is text
    notes: tuple[str, ...] = ()  # decisions that the user did not make, in words
    layout: str = ""  # a line for the user: header, and the column of each role
    class_names: tuple[str, ...] = ()  # what to show for the labels, in their order
    class_weights: tuple[float, ...] = ()  # in the training loss, in the order of the labels
    tasks: tuple[str, ...] = ()  # names of the data sets, if the task is text
    bad: BadRows = field(default_factory=BadRows)
    """Unusable rows so far, if the task is text. The template's refusals are added later."""

    @property
    def held_out(self) -> tuple[str, tuple[Any, ...]]:
        """Returns name and rows of the split to report results on: test, or dev without a test."""
        return ("test", self.test) if self.test else ("dev", self.dev)

    @property
    def summary(self) -> list[str]:
        """Lines for the user, before training: the columns in use, the rows of each class. Empty
        if the task is text."""
        if self.task == "text":
            return []
        return [*filter(None, [self.layout]), *_class_counts(self), *_weights_line(self)]

    def shown(self, label: str) -> str:
        """Returns a label with its name, if the user named the classes: positive (1)."""
        names = dict(zip(self.labels, self.class_names))
        return f"{names[label]} ({label})" if label in names else label[:LONGEST_LABEL]

    def digest(self) -> str:
        """Returns the SHA-256 of the texts and labels of all splits, in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.dev, self.test):
            rows = [example.content() for example in split]
            digest.update(json.dumps(rows).encode())
        return digest.hexdigest()

    def targets(self, examples: Sequence[Example]) -> list[float]:
        """Returns the labels as numbers: class indices, or the values of a regression."""
        if self.task == "regression":
            return [number_of(example.label) for example in examples]
        index = {label: i for i, label in enumerate(self.labels)}
        return [float(index[str(example.label)]) for example in examples]


def read_examples(
    data: str,
    columns: Columns = ANY,
    task: Task = "auto",
    labels: tuple[str, ...] = (),
    limits: Mapping[str, int | None] = {},
    skip_bad_lines: int = 0,
) -> Corpus:
    """Returns a data set in three splits, divided by us if it has none.

    columns, labels: empty ones are those of train. limits: the most rows of each split.
    task "auto": regression if the labels are fractional numbers, else classification.
    Raises DataError with the file, the row and what to do.
    """
    bad, header = BadRows(skip_bad_lines), Header(columns)
    data, notes = resolved_with_note(data)
    splits = _read_splits(data, header, bad)
    if "" in splits:
        notes.append(f"{data} has no column 'split': divided 80/10/10 into train, dev and test")
    if not splits.get("train") and not splits.get(""):
        bad.judge(left=False)
        raise _no_training_rows(data, splits)
    examples, taken = _examples_of(data, splits, columns, bad)
    label = taken.label
    if "" in examples:
        examples = _split_once(data, examples[""], bad)
    for name in _hidden(examples):
        no_label = {example.label for example in examples[name]} == {None}
        del examples[name]
        why = f"has no {label}" if no_label else "hides its labels"
        notes.append(f"the split {name} {why} and is ignored")
    for name, rows in examples.items():
        examples[name] = _labelled(rows, labels, bad)
    train, dev, test = (tuple(examples.get(name, ())) for name in SPLITS)
    if not dev:
        train, dev = _hold_out(data, train, bad)
        notes.append(f"{data} has no dev split: every tenth train text is held out as dev")
    if not labels:
        _check_decimals(data, train)
    if task == "auto":
        task = "regression" if not labels and _fractional(train) else "classification"
        if task == "regression":
            notes.append("the labels are fractional numbers, so the task is regression")
    if task == "classification":
        labels = labels or sorted_labels({str(example.label) for example in train})
        _check_classes(data, train, labels, label if columns.label is None else None, bad)
    labels = labels if task == "classification" else ()
    # After the division and the choice of classes: a limit moves no row, and changes no class.
    train, dev, test = (rows[: limits.get(name)] for name, rows in zip(SPLITS, (train, dev, test)))
    notes += _note_on_unseen(labels, train)
    corpus = Corpus(data, task, labels, train, dev, test, taken)
    train, dev, test = (tuple(_fitting(corpus, split, bad)) for split in (train, dev, test))
    notes = bad.judge() + notes
    if not train or not dev:
        empty = "dev" if train else "train"
        raise DataError(f"--data {data}: {empty} has no usable row left. Pass more rows.")
    layout = _columns_line(data, header.seen, taken)
    return replace(corpus, train=train, dev=dev, test=test, notes=(*notes,), layout=layout)


def _no_training_rows(data: str, splits: Mapping[str, Any]) -> DataError:
    if not splits and Path(data).is_file():
        return DataError(f"--data {data} has a header and no rows below it. Add rows.")
    return DataError(
        f"--data {data} has no training rows, found {', '.join(splits) or 'nothing'}."
        " Pass a folder with train.tsv, .csv or .jsonl."
    )


def _shown_texts(example: Example) -> tuple[str, str | None]:
    return example.text, example.pair


def _hold_out(
    data: str, train: Sequence[Example], bad: BadRows
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Returns train without every tenth text, and those as dev. Raises DataError if nothing is left
    in train."""
    kept, dev = without_tenth(groups_by(train, _shown_texts))
    if not kept:
        bad.judge()
        raise DataError(f"--data {data}: too few rows to hold one out as dev. Pass a dev split.")
    return tuple(kept), tuple(dev)


def _split_once(data: str, rows: list[Example], bad: BadRows) -> dict[str, list[Example]]:
    """Returns the rows in three splits. Raises DataError if they have too few different texts."""
    groups = groups_by(rows, _shown_texts)
    if len(groups) >= 3:
        return divided(groups)
    bad.judge()  # the rows that cannot be used are the better explanation
    found, advice = f"{len(rows)} rows", "Add rows."
    if len(groups) < len(rows):
        found, advice = f"{len(groups)} different texts", "Add rows, or a column 'split'."
    raise DataError(f"--data {data}: {found} are too few for train, dev and test. {advice}")


def _read_splits(data: str, header: Header, bad: BadRows) -> dict[str, list[Placed]]:
    """Returns the rows of each split; "" for rows without a split. Unusable rows go to `bad`."""
    splits: dict[str, list[Placed]] = {}
    for split, place, row in rows_with_text(data, header):
        if isinstance(row, DataError):
            bad.add(row, place)
        else:
            # A list or an object is neither a text nor a label, so its column counts as absent.
            plain = {name: value for name, value in row.items() if is_plain(value)}
            splits.setdefault(split, []).append((place, plain))
    if len(splits) > 1:
        # A guess could put a row of test into train.
        for place, _ in splits.pop("", ()):
            bad.add(DataError(f"{place}: no split, but other rows have one. Fill it in."), place)
    return splits


def _examples_of(
    data: str, splits: dict[str, list[Placed]], columns: Columns, bad: BadRows
) -> tuple[dict[str, list[Example]], Columns]:
    """Returns the examples of each split, and the columns in use: those of train in every split.

    Raises DataError if train has no label column, or another split lacks a text column.
    """
    main = "" if "" in splits else "train"
    taken = choose_columns(splits[main], columns)
    if taken.label is None:
        raise DataError(
            f"--data {data}: no label column among {', '.join(names_of(splits[main]))}."
            f" {first_row(splits[main])} Set --label-column, or --task text to train a language"
            " model on the texts."
        )
    examples = {}
    for name, rows in splits.items():
        names = names_of(rows)
        missing = [
            column
            for column in (taken.text, taken.pair)
            if column is not None and column not in names
        ]
        if missing:
            raise DataError(
                f"--data {data}: train has its text in {taken.text}, {taken.pair or 'no pair'};"
                f" {name} has no {missing[0]}, found {', '.join(names)}. Give every split the same"
                " columns."
            )
        examples[name] = _examples(rows, taken, bad)
    return examples, taken


def _labelled(rows: Sequence[Example], labels: Sequence[str], bad: BadRows) -> list[Example]:
    """Returns the examples with a text and a label. The others go to `bad`.

    NaN and inf are usually missing values that some tool wrote. They are labels only if --labels
    names them.
    """
    kept = []
    for example in rows:
        place = example.place
        if not example.text:
            bad.add(DataError(f"{place}: no text. Fill it in, or set --text-column."), place)
        elif example.label is None:
            bad.add(DataError(f"{place}: no label. Fill it in, or set --label-column."), place)
        elif example.label not in labels and _is_not_finite(example.label):
            bad.add(
                DataError(
                    f"{place}: label {example.label!r} is no finite number: is it missing? Fill"
                    " it in, or name it as a class in --labels."
                ),
                place,
            )
        else:
            kept.append(example)
    return kept


def _is_not_finite(label: str) -> bool:
    """True if a label is written as a number and is NaN or infinite."""
    try:
        return not math.isfinite(float(label))
    except ValueError:
        return False


def _check_classes(
    data: str, train: Sequence[Example], labels: Sequence[str], guessed: str | None, bad: BadRows
) -> None:
    """Raises DataError if there are fewer than two classes, or the label column seems wrong.

    guessed: the label column, if the user did not name it. It is probably wrong if there are more
    than half as many classes as rows and its name is not a usual one.
    """
    if len(labels) < 2:
        bad.judge()
        raise DataError(
            f"--data {data}: training needs at least two classes, found"
            f" {', '.join(labels) or 'none'} in {len(train)} rows. Check --label-column."
        )
    many = 2 * len(labels) > len(train) > 4  # in fewer rows, different labels mean nothing
    if many and guessed is not None and guessed.strip().lower() not in LABEL:
        raise DataError(
            f"--data {data}: column {guessed} has {len(labels)} labels in {len(train)} rows, such"
            f" as {labels[0][:40]!r}: are they classes? If so, pass --label-column {guessed}; if"
            " not, set --text-column and --label-column."
        )


def _note_on_unseen(labels: Sequence[str], train: Sequence[Example]) -> list[str]:
    """Returns a note if no training row has one of the labels, else nothing."""
    seen = {example.label for example in train}
    unseen = [label[:LONGEST_LABEL] for label in labels if label not in seen]
    return [f"no training row has the label {', '.join(unseen[:LARGEST_CLASSES])}"] * bool(unseen)


def _check_decimals(data: str, train: Sequence[Example]) -> None:
    """Raises DataError if the labels are numbers with a decimal comma, as some countries write."""
    labels = [str(example.label) for example in train]
    odd = [label for label in labels if re.fullmatch(r"[+-]?\d+,\d+", label)]
    whole = sum(label.removeprefix("-").isdecimal() for label in labels)
    if odd and 10 * (len(odd) + whole) >= 9 * len(labels):
        raise DataError(
            f"--data {data}: labels are numbers with a comma, such as {odd[0]!r}. Write a decimal"
            " point, or, if they are classes, name them with --labels."
        )


def _columns_line(data: str, headed: bool | None, taken: Columns) -> str:
    """Returns a line for the user: whether there is a header, and the column of each role."""
    header = {None: "", True: "a header", False: "no header"}[headed]
    roles = {"text": taken.text, "pair": taken.pair, "label": taken.label}
    parts = [f"the {role} in column {name}" for role, name in roles.items() if name is not None]
    return f"{data}: {', '.join(filter(None, [header, *parts]))}"


def _class_counts(corpus: Corpus) -> list[str]:
    """Returns a line per split for the user: its rows per class, or the range of its values."""
    lines = []
    for name, rows in zip(SPLITS, (corpus.train, corpus.dev, corpus.test), strict=True):
        if rows and corpus.task == "regression":
            values = corpus.targets(rows)
            lines.append(f"{name}: {len(rows)} rows, from {min(values):g} to {max(values):g}")
        elif rows:
            counts = Counter(str(row.label) for row in rows)
            listed, others = [*corpus.labels], []
            if len(listed) > MOST_CLASSES:
                listed.sort(key=lambda label: -counts[label])
                listed, others = listed[:LARGEST_CLASSES], listed[LARGEST_CLASSES:]
            shown = [f"{corpus.shown(label)} {counts[label]}" for label in listed]
            if others:
                few, many = counts[others[-1]], counts[others[0]]
                shown.append(f"and {len(others)} more classes of {few} to {many}")
            lines.append(f"{name}: {len(rows)} rows, by class: {', '.join(shown)}")
    return lines


def _weights_line(corpus: Corpus) -> list[str]:
    """Returns a line with the weights of the classes, if they have any."""
    pairs = list(zip(corpus.labels, corpus.class_weights))
    if not pairs:
        return []
    shown = [f"{corpus.shown(label)} {weight:.3g}" for label, weight in pairs[:MOST_CLASSES]]
    more = [f"and {len(pairs) - MOST_CLASSES} more"] if len(pairs) > MOST_CLASSES else []
    return [f"weights in the training loss: {', '.join(shown + more)}"]


def _hidden(examples: dict[str, list[Example]]) -> list[str]:
    """Returns the splits without public labels: all missing, or all -1 as in GLUE's test files."""
    known = {number_of(example.label) for example in examples["train"]}
    hidden = []
    for name in [split for split in examples if split != "train"]:
        labels = {example.label for example in examples[name]}
        # If train has -1 too, it is a class or a value.
        minus_one = {number_of(label) for label in labels} == {-1.0} and -1.0 not in known
        if labels and (labels == {None} or minus_one):
            hidden.append(name)
    return hidden


def read_split(
    data: str,
    columns: Columns,
    trained: Columns,
    kind: tuple[Task, tuple[str, ...]],
    split: str | None,
    skip_bad_lines: int = 0,
) -> tuple[Corpus, str]:
    """Returns a Corpus with one split of labelled examples, and the name of that split.

    columns: the user's. Those not set default to the columns that the model was `trained` on, or
    else to the usual ones. kind: the model's task and classes. split: default is the first of test,
    dev and train that exists. A file without a column `split` is used whole, as test. A folder
    needs no train file. Raises DataError with the file, the row and what to do.
    """
    task, labels = kind
    bad, header = BadRows(skip_bad_lines), Header(columns, trained, labels)
    data, stand_in = resolved_with_note(data)
    splits = _read_splits(data, header, bad)
    if "" in splits:
        splits = {split or "test": splits[""]}
    wanted = [split] if split else ["test", "dev", "train"]
    present = [name for name in wanted if splits.get(name)]
    if not present:
        bad.judge(left=False)
        raise DataError(
            f"--data {data} has no {split or 'labelled'} split, found {', '.join(splits)}."
        )
    rows = splits[present[0]]
    taken = choose_columns(rows, adopted(rows, columns, trained, header.seen))
    if taken.label is None:
        raise DataError(
            f"--data {data}: no label column among {', '.join(names_of(rows))}. {first_row(rows)}"
            " Set --label-column."
        )
    examples = _labelled(_examples(rows, taken, bad), labels, bad)
    corpus = Corpus(data, task, labels, (), (), (), taken)
    examples = _fitting(corpus, examples, bad)
    notes = stand_in + bad.judge(left=bool(examples))
    train, dev, test = (tuple(examples) if name == present[0] else () for name in SPLITS)
    layout = _columns_line(data, header.seen, taken)
    corpus = replace(corpus, train=train, dev=dev, test=test, notes=(*notes,), layout=layout)
    return corpus, present[0]


def unlabelled(
    data: str,
    columns: Columns,
    trained: Columns = ANY,
    labels: Sequence[str] = (),
    skip_bad_lines: int = 0,
) -> tuple[list[Example], list[str]]:
    """Returns the examples of one file in its order, and notes for the user. Labels are optional.

    trained, labels: the columns and classes of the model, which help to recognise the columns.
    """
    bad, header = BadRows(skip_bad_lines), Header(columns, trained, labels)
    rows = []
    for place, row in read_rows(Path(data), header):
        if isinstance(row, DataError):
            bad.add(row, place)
        else:
            rows.append((place, {name: v for name, v in row.items() if is_plain(v)}))
    if not rows:
        bad.judge(left=False)
        raise DataError(f"{data} has no rows. Pass a file with rows.")
    # --label-column is for files that have one: predicting needs no labels.
    if columns.label is not None and find_column(columns.label, names_of(rows)) is None:
        columns = replace(columns, label=None)
    taken = choose_columns(rows, adopted(rows, columns, trained, header.seen))
    examples = _examples(rows, taken, bad)
    return examples, [*bad.judge(left=bool(examples)), _columns_line(data, header.seen, taken)]


def _examples(rows: Iterable[Placed], taken: Columns, bad: BadRows) -> list[Example]:
    """Returns an example for each row that has a text. The others go to `bad`."""
    examples = []
    for place, row in rows:
        try:
            examples.append(_example(place, row, taken))
        except DataError as error:
            bad.add(DataError(f"{place}: {error}"), place)
    return examples


def _example(place: str, row: Row, taken: Columns) -> Example:
    """Returns the example of a row. Raises DataError without the place."""
    assert taken.text is not None
    for name in (taken.text, taken.pair):
        if name is not None and name not in row:
            raise DataError(
                f"no column {name!r} with a text, found {', '.join(row) or 'none'}."
                " The text must not be missing, null, a list or an object. Fix the line."
            )
    text = text_in(row, taken.text).strip()
    pair = None if taken.pair is None else text_in(row, taken.pair).strip()
    label = text_in(row, taken.label).strip() if taken.label in row else ""
    try:
        f"{text}{pair}{label}".encode()  # JSON can hold half of a UTF-16 pair (\ud800)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{error.reason}: the text has half of a UTF-16 pair. Write the whole character."
        ) from None
    return Example(text, pair, label or None, place)


def _fractional(examples: Iterable[Example]) -> bool:
    """True if 9 labels in 10 are numbers and at least one is no integer: then it is a quantity."""
    # The tenth may be typing errors. They become unusable rows, instead of classes.
    values = [number_of(example.label) for example in examples]
    numbers = [value for value in values if math.isfinite(value)]
    return 10 * len(numbers) >= 9 * len(values) and not all(v.is_integer() for v in numbers)


def sorted_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Sorts classes as integers if all are, else as texts. The order gives the class indices."""
    try:
        # "1" and "01" are equal integers, and a set has no order to fall back on.
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _fitting(corpus: Corpus, examples: Sequence[Example], bad: BadRows) -> list[Example]:
    """Returns the examples whose label fits the task. The others go to `bad`."""
    kept = []
    for example in examples:
        if wrong := _misfit(corpus, example):
            bad.add(DataError(f"{example.place}: {wrong}"), example.place)
        else:
            kept.append(example)
    return kept


def _misfit(corpus: Corpus, example: Example) -> str:
    """Returns what is wrong with an example's label, and what to do; "" if it fits the task."""
    if corpus.task == "regression":
        if abs(number_of(example.label)) <= LARGEST_LABEL:
            return ""
        return (
            f"label {example.label!r} is no number in the range of float32. Fix the row, or set"
            " --task classification."
        )
    if example.label in corpus.labels:
        return ""
    many = 2 * len(corpus.labels) > len(corpus.train) > 4  # then the column is probably wrong
    # Without rows to train on, a trained model is scored, whose labels are given.
    advice = f"Fix the row{', or set --labels' if corpus.train else ''}."
    if many:
        advice = "There are about as many labels as rows: set --text-column and --label-column."
    shown = ", ".join(corpus.labels[:12])
    return f"label {example.label!r} is outside the set {shown}. {advice}"


def examples_of(corpus: Corpus, split: str) -> tuple[Any, ...]:
    """Returns the examples of a split by its name. Raises DataError if it is empty."""
    examples: tuple[Any, ...] = getattr(corpus, split)
    if not examples:
        raise DataError(f"{corpus.source} has no {split} split. Pass --split dev or train.")
    return examples


class Predicted(NamedTuple):
    """Predictions, the references of each, and the name of its data set, "" if there is but one."""

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    tasks: Sequence[str]


def read_predictions(path: Path) -> Predicted:
    """Returns the predictions that JSON lines hold.

    A line has `prediction`, and `label` or `references`, a text or a list of texts. Unusable lines
    cannot be skipped, since a score over fewer rows would be wrong. Raises DataError.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: predictions must be JSON lines. Pass a file that ends in .jsonl.")
    predictions, references, tasks = [], [], []
    for place, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        tasks.append(str(row.get("task") or ""))
        answer = row.get("references", row.get("label"))
        answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
        if row.get("prediction") is None or not answers:
            raise DataError(
                f"{place}: needs prediction and label (or references),"
                f" found {', '.join(row) or 'nothing'}."
            )
        try:
            predictions.append(text_in(row, "prediction"))
            references.append([text_in({"reference": text}, "reference") for text in answers])
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    return Predicted(predictions, references, tasks)
