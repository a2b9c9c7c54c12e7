"""Rows of text, pair and label per split, from files or the hub: read(...) -> Corpus."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora import demo
from lora.checkpoint import json_object
from lora.config import Task
from lora.errors import DataError
from lora.models import hub_answers

TEXT = ("text", "sentence", "review", "question", "sentence1", "question1", "premise")
PAIR = {"sentence1": "sentence2", "question1": "question2", "premise": "hypothesis",
        "question": "sentence"}  # fmt: skip
LABEL = ("label", "labels", "score", "target", "class")
SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "validation_matched"),
    "test": ("test",),
}
ENDINGS = (".tsv", ".csv", ".jsonl")

Row = dict[str, str]
Placed = tuple[str, Row]  # where it stands, for errors: "FILE, line N"

csv.field_size_limit(2**31 - 1)  # as for TSV and JSONL: a text may be long


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
    train: tuple[Any, ...]  # Examples; of the task text lora.conversations.Conversations
    dev: tuple[Any, ...]
    test: tuple[Any, ...]
    pair: str | None = None  # the column of the second text, where there is one
    note: str = ""  # what was decided on the user's behalf
    tasks: tuple[str, ...] = ()  # names of the data sets that texts are from

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
            return [_number(example.label) for example in examples]
        index = {label: i for i, label in enumerate(self.labels)}
        return [float(index[str(example.label)]) for example in examples]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; a number from 0 where the file has no header."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def read(
    data: str,
    columns: Columns = Columns(),
    task: Task = "auto",
    labels: tuple[str, ...] = (),
    limit: int | None = None,
) -> Corpus:
    """A data set in three splits. Raises DataError with the file, the row and the remedy."""
    splits, notes = _read_splits(data, columns)
    if not splits.get("train"):
        raise DataError(
            f"--data {data} has no training rows, found {', '.join(splits) or 'nothing'}."
            " Pass a folder with train.tsv, .csv or .jsonl."
        )
    chosen = {name: choose_columns(_names(rows), columns) for name, rows in splits.items() if rows}
    text, pair, label = chosen["train"]
    if label is None:
        raise DataError(
            f"--data {data}: no label column among {', '.join(_names(splits['train']))}."
            " Set --label-column."
        )
    for name, other in chosen.items():
        if other[:2] != (text, pair):
            raise DataError(
                f"--data {data}: train has its text in {text}, {pair or 'no pair'}; {name} in"
                f" {other[0]}, {other[1] or 'no pair'}. Give every split the same columns."
            )
    examples = {name: _examples(rows, columns) for name, rows in splits.items()}
    for name in _hidden(examples):
        del examples[name]
        why = f"has no {label}" if chosen[name][2] is None else "hides its labels"
        notes.append(f"the split {name} {why}, and is left out")
    train, dev, test = (tuple(examples.get(name, ())) for name in ("train", "dev", "test"))
    if not dev:
        train, dev = _hold_out(train, 0.1)
        notes.append(f"{data} has no dev split: every tenth training row is held out as dev")
        if len(train) < 1:
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
        if len(labels) < 2:
            raise DataError(
                f"--data {data}: training needs two classes at least, found"
                f" {', '.join(labels) or 'none'} in {len(train)} rows. Check --label-column."
            )
    labels = labels if task == "classification" else ()
    corpus = Corpus(data, task, labels, train, dev, test, pair, "; ".join(notes))
    for split in (train, dev, test):
        _check_labels(corpus, split)
    return corpus


def _hidden(examples: dict[str, list[Example]]) -> list[str]:
    """Splits whose labels a benchmark keeps to itself: none, or all -1 where train has no -1."""
    known = {_number(example.label) for example in examples["train"]}
    found = []
    for name in set(examples) - {"train"}:
        labels = {example.label for example in examples[name]}
        minus_one = {_number(label) for label in labels} == {-1.0} and -1.0 not in known
        if labels and (labels == {None} or minus_one):
            found.append(name)
    return found


def _read_splits(data: str, columns: Columns) -> tuple[dict[str, list[Placed]], list[str]]:
    """The rows of each split, and what was decided on the user's behalf."""
    if data == "demo":
        return _by_split_column(read_file(demo.REVIEWS, columns)), []
    if Path(data).is_dir():
        return _read_folder(Path(data), columns), []
    if not Path(data).is_file():
        return read_hub(data), []
    rows = read_file(Path(data), columns)
    if any(name.lower() == "split" for name in _names(rows)):
        return _by_split_column(rows), []
    note = f"{data} has no column 'split': cut 80/10/10 into train, dev and test"
    return _cut(data, rows), [note]


def read_split(
    data: str, columns: Columns, task: Task, labels: tuple[str, ...], split: str | None
) -> tuple[Corpus, str]:
    """Labelled examples to score a trained model on, as the corpus's split of the name returned.

    A file without a split column is scored whole, as test. A folder needs no train file.
    """
    if Path(data).is_file():
        rows = read_file(Path(data), columns)
        whole = not any(name.lower() == "split" for name in _names(rows))
        splits = {split or "test": rows} if whole else _by_split_column(rows)
    else:
        splits, _ = _read_splits(data, columns)
    there = [name for name in ([split] if split else ["test", "dev", "train"]) if splits.get(name)]
    if not there:
        raise DataError(
            f"--data {data} has no {split or 'labelled'} split, found {', '.join(splits)}."
        )
    examples = tuple(_examples(splits[there[0]], columns))
    held = {name: examples if name == there[0] else () for name in SPLITS}
    corpus = Corpus(data, task, labels, held["train"], held["dev"], held["test"])
    _check_labels(corpus, examples)
    return corpus, there[0]


def _names(rows: Sequence[Placed]) -> list[str]:
    """The columns that any row has, in order."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def read_file(path: Path, columns: Columns = Columns()) -> list[Placed]:
    """The rows of a TSV, CSV or JSONL file; without header the columns are 0, 1, ..."""
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: found {path.suffix or 'no ending'}. Known: {', '.join(ENDINGS)}.")
    text = text_of(path)
    if path.suffix == ".jsonl":
        return [
            (f"{path}, line {number}", {k: _cell(v) for k, v in row.items() if _is_plain(v)})
            for number, row in _json_lines(path, text)
        ]
    if path.suffix == ".tsv":  # quotes mean nothing there, as in GLUE
        lines = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
        alone = max(map(len, lines)) == 1  # an empty line is an empty text
        cells = [(number, cell) for number, cell in enumerate(lines, 1) if alone or cell != [""]]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            cells = [(reader.line_num, cell) for cell in reader if cell]
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}. Mend the quotes, or save it as .tsv."
            ) from None
    header = cells[0][1]
    for mark in (";", "\t") if path.suffix == ".csv" and len(cells) > 1 else ():
        marks = {len(line) == 1 and line[0].count(mark) for _, line in cells}
        if len(marks) == 1 and max(marks) > 0:
            raise DataError(
                f"{path}: one column, {header[0]!r}, with {max(marks)} {mark!r} in every row. A"
                " CSV's columns lie between commas. Save it so, or with tabs as .tsv."
            )
    named, numbered = _is_header(header, columns)
    if named:
        cells = cells[1:]
    if numbered:
        header = [str(number) for number in range(len(header))]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path}: two columns are named {twice!r}. Rename one.")
    rows = []
    for number, line in cells:
        if len(line) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(line)} columns, where the first row has"
                f" {len(header)}. Mend the line, or quote the separator."
            )
        rows.append((f"{path}, line {number}", dict(zip(header, line, strict=True))))
    return rows


def text_of(path: Path) -> str:
    """The file's text. Raises DataError where it is not UTF-8, empty, or not to be read."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = raw[: error.start].count(b"\n") + 1
        likely = "utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        raise DataError(
            f"{path}, line {place}: byte {raw[error.start]:#04x} is not UTF-8."
            f" Run iconv -f {likely} -t utf-8 {path.name}, where that is its encoding."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise DataError(f"{path} has NUL characters: no text. Run iconv -f utf-16le -t utf-8.")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DataError(f"{path} is empty. Pass a file with rows.")
    return text


def _is_header(cells: list[str], columns: Columns) -> tuple[bool, bool]:
    """Whether the first row is a header, and whether columns go by their numbers."""
    asked = [c for c in (columns.text, columns.pair, columns.label) if c is not None]
    known = any(cell.strip().lower() in (*TEXT, *LABEL, "split") for cell in cells)
    numbered = all(name.isdigit() for name in asked) if asked else not known
    return known or not numbered, numbered


def _json_lines(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json_object(line)))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: no JSON object: {error}. Mend the line."
            ) from None
    return rows


def _is_plain(value: object) -> bool:
    """Whether a JSON value is a text or a number, and no list, object or null."""
    return value is not None and not isinstance(value, list | dict)


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read_folder(folder: Path, columns: Columns) -> dict[str, list[Placed]]:
    found = {}
    for split, names in SPLITS.items():
        paths = [folder / (name + end) for name in names for end in ENDINGS]
        there = [path for path in paths if path.is_file()]
        if len(there) > 1:
            raise DataError(f"{folder} has {', '.join(p.name for p in there)}: keep one.")
        if there:
            found[split] = read_file(there[0], columns)
    return found


def _by_split_column(rows: list[Placed]) -> dict[str, list[Placed]]:
    found: dict[str, list[Placed]] = {}
    known = {name: split for split, names in SPLITS.items() for name in names}
    column = next(name for name in _names(rows) if name.lower() == "split")
    for place, row in rows:
        split = row.get(column, "")
        if split not in known:
            raise DataError(f"{place}: split {split!r} is none of {', '.join(sorted(known))}.")
        found.setdefault(known[split], []).append((place, row))
    return found


def _cut(data: str, rows: list[Placed]) -> dict[str, list[Placed]]:
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


def read_hub(data: str) -> dict[str, list[Placed]]:
    """A data set on the hub: glue/TASK, OWNER/NAME, or OWNER/NAME/CONFIG."""
    if data.startswith((".", "/", "~")) or data.endswith(ENDINGS):
        raise DataError(
            f"--data {data}: no such file or folder. Pass one, or a data set's name on the hub."
        )
    if not hub_answers():
        raise DataError(
            f"--data {data} is no file or folder here, and the hub does not answer. Run"
            " lora train --data demo, or pass a local file."
        )
    import datasets

    datasets.disable_progress_bars()
    parts = data.split("/")
    if parts[0] == "glue" and len(parts) == 2:
        name: str = "nyu-mll/glue"
        config: str | None = parts[1]
    else:
        name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"--data {data} cannot be loaded from the hub: {error}.") from error
    splits = {}
    for split, names in SPLITS.items():
        there = [name for name in names if name in found]
        if there:
            rows = found[there[0]]
            splits[split] = [
                (
                    f"{data}, {there[0]} row {number}",
                    {str(k): _cell(v) for k, v in row.items() if v is not None},
                )
                for number, row in enumerate(rows, 1)
            ]
    return splits


def _examples(rows: list[Placed], columns: Columns) -> list[Example]:
    if not rows:
        return []
    text, pair, label = choose_columns(_names(rows), columns)
    examples = []
    for place, row in rows:
        lacking = [name for name in (text, pair) if name is not None and name not in row]
        if lacking:
            raise DataError(
                f"{place}: no column {lacking[0]!r} with a text, found {', '.join(row) or 'none'}."
                " A row's text may not be absent, null, a list or an object. Mend the line."
            )
        example = Example(
            text=row[text].strip(),
            pair=None if pair is None else row[pair].strip(),
            label=(row.get(label, "").strip() or None) if label is not None else None,
            place=place,
        )
        try:
            f"{example.text}{example.pair}{example.label}".encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: {error.reason}: half of a character pair.") from None
        examples.append(example)
    return examples


def choose_columns(found: list[str], columns: Columns) -> tuple[str, str | None, str | None]:
    """The names of the text, pair and label columns: as asked, or by their usual names."""
    if not found:
        raise DataError("the rows have no columns. Give each a text and a label.")
    asked = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    for role, name in asked.items():
        if name is not None and name not in found:
            raise DataError(f"--{role}-column {name}: no such column. Found: {', '.join(found)}.")
    given = [name for name in asked.values() if name is not None]
    if len(set(given)) < len(given):
        raise DataError(f"one column cannot be two of text, pair and label: {', '.join(given)}.")
    free = [name for name in found if name not in given]
    if all(name.isdigit() for name in found):  # no header: text first, label last
        if len(found) > 2 and columns.text is None:
            raise DataError(
                f"{len(found)} columns, and none that is called text or label: which is what? Set"
                " --text-column and --label-column to names of the first row, or to numbers from 0"
                " where there is no header, and --pair-column for pairs."
            )
        if columns.text is None and not free:
            raise DataError(f"column {', '.join(given)} is all there is: no text. Add a column.")
        text = columns.text or free.pop(0)
        last = free[-1] if len(found) == 2 and columns.pair is None and free else None
        return text, columns.pair, columns.label or last
    usual = {name.strip().lower(): name for name in free}
    texts = [usual[name] for name in TEXT if name in usual]
    # A question with a sentence beside it is the first of a pair, a sentence alone is the text.
    paired = [usual[a] for a, b in PAIR.items() if a in usual and b in usual]
    if columns.text is None and not texts:
        raise DataError(f"no text column among {', '.join(found)}. Set --text-column.")
    text = columns.text or (paired or texts)[0]
    partner = usual.get(PAIR.get(text.strip().lower(), ""))
    labels = [usual[name] for name in LABEL if name in usual and usual[name] != text]
    return text, columns.pair or partner, columns.label or (labels[0] if labels else None)


def _number(label: str | None) -> float:
    try:
        return float(str(label))
    except ValueError:
        return math.nan


def _fractional(examples: Iterable[Example]) -> bool:
    """Whether nine labels in ten are numbers, and some not whole: a quantity and no class."""
    values = [_number(example.label) for example in examples]
    numbers = [value for value in values if math.isfinite(value)]
    return 10 * len(numbers) >= 9 * len(values) and not all(v.is_integer() for v in numbers)


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _check_labels(corpus: Corpus, examples: Sequence[Example]) -> None:
    largest = torch.finfo(torch.float32).max
    for example in examples:
        if example.label is None:
            raise DataError(f"{example.place}: no label. Fill it in, or set --label-column.")
        if corpus.task == "regression":
            if not abs(_number(example.label)) <= largest:
                raise DataError(
                    f"{example.place}: label {example.label!r} is no number that float32 holds."
                    " Mend the row, or set --task classification."
                )
        elif example.label not in corpus.labels:
            raise DataError(
                f"{example.place}: label {example.label!r} is outside the set"
                f" {', '.join(corpus.labels[:12])}. "
                + (
                    "There are about as many labels as rows: set --text-column and --label-column."
                    if 2 * len(corpus.labels) > len(corpus.train) > 4
                    else "Mend the row, or set --labels."
                )
            )


def take(corpus: Corpus, split: str) -> tuple[Any, ...]:
    """The examples of a split by its name. Raises DataError where it has none."""
    found: tuple[Any, ...] = getattr(corpus, split)
    if not found:
        raise DataError(f"{corpus.source} has no {split} split. Pass --split dev or train.")
    return found


def unlabelled(data: str, columns: Columns) -> list[Example]:
    """The rows of one file, labelled or not, in the file's order."""
    rows = read_file(Path(data), columns)
    if not rows:
        raise DataError(f"{data} has no rows.")
    if columns.label is not None and columns.label not in _names(rows):
        columns = replace(columns, label=None)
    return _examples(rows, columns)


def read_predictions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Predictions and, for each, its references, from JSON lines with `prediction` and `label` or
    `references` (a text or a list of them)."""
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: predictions are JSON lines, in a file that ends in .jsonl.")
    predictions, references = [], []
    for number, row in _json_lines(path, text_of(path)):
        wanted = row.get("references", row.get("label"))
        several = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
        if row.get("prediction") is None or not several:
            raise DataError(
                f"{path}, line {number}: needs prediction and label (or references),"
                f" found {', '.join(row) or 'nothing'}."
            )
        predictions.append(_cell(row["prediction"]))
        references.append([_cell(reference) for reference in several])
    return predictions, references
