"""Examples in, padded batches out.

read(...)    -> Corpus: rows of text, pair and label per split, from files or the hub
encode(...)  -> Encoded: token ids per example
batches(...) -> lists of row numbers, lengths together, a pure function of (seed, epoch)
collate(...) -> tensors (batch, longest of the batch)
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora import demo
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


@dataclass(frozen=True)
class Example:
    """One text, or a pair; the label is a class's name, a number, or None where unknown."""

    text: str
    pair: str | None
    label: str | None


@dataclass(frozen=True)
class Corpus:
    """A data set as read: what to learn from, what to choose by, what to report on."""

    source: str
    task: Task  # auto no longer
    labels: tuple[str, ...]  # () for regression
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    note: str = ""  # what was decided on the user's behalf

    @property
    def held_out(self) -> tuple[str, tuple[Example, ...]]:
        """The split that results are reported on: test, or dev where there is none."""
        return ("test", self.test) if self.test else ("dev", self.dev)

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
    note = ""
    if data == "demo":
        splits = _by_split_column(read_file(demo.REVIEWS, columns))
    elif Path(data).is_dir():
        splits = _read_folder(Path(data), columns)
    elif Path(data).is_file():
        rows = read_file(Path(data), columns)
        if rows and "split" in rows[0][1]:
            splits = _by_split_column(rows)
        else:
            splits = _cut(rows)
            note = f"{data} has no column 'split': cut 80/10/10 into train, dev and test"
    else:
        splits = _read_hub(data)
    examples = {name: _examples(rows, columns) for name, rows in splits.items()}
    # A benchmark's hidden labels are all -1: that split cannot be reported on.
    examples = {
        name: found
        for name, found in examples.items()
        if not all(example.label in (None, "-1") for example in found)
    }
    if not examples.get("train"):
        raise DataError(f"--data {data} has no training rows. Pass a folder with train.tsv.")
    train, dev, test = (tuple(examples.get(name, ())) for name in ("train", "dev", "test"))
    if not dev:
        train, dev = _hold_out(train, 0.1)
        note = f"{data} has no dev split: every tenth training row is held out as dev"
    if limit is not None:
        train, dev, test = train[:limit], dev[:limit], test[:limit]
    if task == "auto":
        task = "regression" if not labels and _fractional(train) else "classification"
    if task == "classification":
        labels = labels or _sorted_labels({str(example.label) for example in train})
        if len(labels) < 2:
            raise DataError(
                f"--data {data}: training needs two classes at least, found"
                f" {', '.join(labels) or 'none'} in {len(train)} rows. Check --label-column."
            )
    corpus = Corpus(data, task, labels if task == "classification" else (), train, dev, test, note)
    for name, split in (("train", train), ("dev", dev), ("test", test)):
        _check_labels(corpus, name, split)
    return corpus


def read_file(path: Path, columns: Columns = Columns()) -> list[tuple[int, Row]]:
    """(line number, row) of a TSV, CSV or JSONL file; without header the columns are 0, 1, ..."""
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: found {path.suffix or 'no ending'}. Known: {', '.join(ENDINGS)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        place = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {place}: byte {error.object[error.start]:#04x} is not UTF-8."
            f" Run iconv -f latin1 -t utf-8 {path.name}, where that is its encoding."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise DataError(f"{path} is empty. Pass a file with rows.")
    if path.suffix == ".jsonl":
        return _read_jsonl(path, text)
    if path.suffix == ".tsv":  # quotes mean nothing there, as in GLUE
        lines = [line.rstrip("\r").split("\t") for line in text.split("\n")]
        cells = [(number, cell) for number, cell in enumerate(lines, 1) if cell != [""]]
    else:
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            cells = [(reader.line_num, cell) for cell in reader if cell]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}.") from None
    header = cells[0][1]
    if _is_header(header, columns):
        cells = cells[1:]
    else:
        header = [str(number) for number in range(len(header))]
    rows = []
    for number, line in cells:
        if len(line) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(line)} columns, where the first row has"
                f" {len(header)}. Mend the line, or quote the separator."
            )
        rows.append((number, dict(zip(header, line, strict=True))))
    return rows


def _is_header(cells: list[str], columns: Columns) -> bool:
    asked = [c for c in (columns.text, columns.pair, columns.label) if c is not None]
    if asked:
        return not all(name.isdigit() for name in asked)
    return any(cell in (*TEXT, *LABEL) for cell in cells)


def _read_jsonl(path: Path, text: str) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: no JSON: {error}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {type(row).__name__}, not an object.")
        rows.append((number, {str(k): _cell(v) for k, v in row.items() if v is not None}))
    return rows


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read_folder(folder: Path, columns: Columns) -> dict[str, list[tuple[int, Row]]]:
    found = {}
    for split, names in SPLITS.items():
        paths = [folder / (name + end) for name in names for end in ENDINGS]
        there = [path for path in paths if path.is_file()]
        if len(there) > 1:
            raise DataError(f"{folder} has {', '.join(p.name for p in there)}: keep one.")
        if there:
            found[split] = read_file(there[0], columns)
    if "train" not in found:
        files = sorted(path.name for path in folder.iterdir())[:8]
        raise DataError(f"{folder} has no train.tsv, .csv or .jsonl, found {files or 'nothing'}.")
    return found


def _by_split_column(rows: list[tuple[int, Row]]) -> dict[str, list[tuple[int, Row]]]:
    found: dict[str, list[tuple[int, Row]]] = {}
    known = {name: split for split, names in SPLITS.items() for name in names}
    for number, row in rows:
        if row["split"] not in known:
            raise DataError(
                f"line {number}: split {row['split']!r} is none of {', '.join(sorted(known))}."
            )
        found.setdefault(known[row["split"]], []).append((number, row))
    return found


def _cut(rows: list[tuple[int, Row]]) -> dict[str, list[tuple[int, Row]]]:
    """80/10/10, by one shuffle that never changes."""
    rows = rows.copy()
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    return {"test": rows[:tenth], "dev": rows[tenth : 2 * tenth], "train": rows[2 * tenth :]}


def _hold_out(
    train: tuple[Example, ...], share: float
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    step = round(1 / share)
    dev = train[step - 1 :: step]
    return tuple(e for i, e in enumerate(train) if i % step != step - 1), dev


def _read_hub(data: str) -> dict[str, list[tuple[int, Row]]]:
    """A data set on the hub: glue/TASK, OWNER/NAME, or OWNER/NAME/CONFIG."""
    if data.startswith((".", "/", "~")) or data.endswith(ENDINGS):
        raise DataError(f"--data {data}: no such file or folder.")
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
                (number, {str(k): _cell(v) for k, v in row.items() if v is not None})
                for number, row in enumerate(rows, 1)
            ]
    return splits


def _examples(rows: list[tuple[int, Row]], columns: Columns) -> list[Example]:
    if not rows:
        return []
    first = rows[0][1]
    text, pair, label = choose_columns(list(first), columns)
    examples = []
    for number, row in rows:
        lacking = [name for name in (text, pair) if name is not None and name not in row]
        if lacking:
            raise DataError(f"line {number}: no column {lacking[0]!r}, found {', '.join(row)}.")
        examples.append(
            Example(
                text=row[text].strip(),
                pair=None if pair is None else row[pair].strip(),
                label=row[label].strip() if label is not None and label in row else None,
            )
        )
    return examples


def choose_columns(found: list[str], columns: Columns) -> tuple[str, str | None, str | None]:
    """The names of the text, pair and label columns: as asked, or by their usual names."""
    for asked, flag in (
        (columns.text, "--text-column"),
        (columns.pair, "--pair-column"),
        (columns.label, "--label-column"),
    ):
        if asked is not None and asked not in found:
            raise DataError(f"{flag} {asked}: no such column. Found: {', '.join(found)}.")
    if all(name.isdigit() for name in found):  # no header
        if len(found) > 2 and columns.text is None:
            raise DataError(
                f"the file has {len(found)} columns and no header: which is what?"
                " Set --text-column 0 --label-column 1, and --pair-column for pairs."
            )
        last = found[-1] if len(found) == 2 else None
        return columns.text or found[0], columns.pair, columns.label or last
    texts = [name for name in TEXT if name in found]
    if columns.text is None and not texts:
        raise DataError(f"no text column among {', '.join(found)}. Set --text-column.")
    text = columns.text or texts[0]
    pair = columns.pair or PAIR.get(text)
    labels = [name for name in LABEL if name in found]
    return text, pair if pair in found else None, columns.label or (labels[0] if labels else None)


def _number(label: str | None) -> float:
    try:
        return float(str(label))
    except ValueError:
        return math.nan


def _fractional(examples: Iterable[Example]) -> bool:
    """Whether the labels are numbers with a decimal point, so a quantity and no class."""
    values = [str(example.label) for example in examples]
    numbers = all(math.isfinite(_number(value)) for value in values)
    return numbers and any("." in value or "e" in value.lower() for value in values)


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=int))
    except ValueError:
        return tuple(sorted(labels))


def _check_labels(corpus: Corpus, split: str, examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, 1):
        if example.label is None:
            raise DataError(f"{split} row {number} has no label. Set --label-column.")
        if corpus.task == "regression":
            if not math.isfinite(_number(example.label)):
                raise DataError(f"{split} row {number}: label {example.label!r} is no number.")
        elif example.label not in corpus.labels:
            raise DataError(
                f"{split} row {number}: label {example.label!r} is outside the set"
                f" {', '.join(corpus.labels[:12])}. Mend the row, or set --labels."
            )


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the tokenizer's other fields, of every example of a split."""

    fields: tuple[dict[str, Tensor], ...]  # one dict of (length,) tensors per example
    targets: Tensor  # (examples,) long for classes, float32 for regression
    pad: int

    @property
    def lengths(self) -> list[int]:
        return [len(field["input_ids"]) for field in self.fields]

    def __len__(self) -> int:
        return len(self.fields)


def encode(
    tokenizer: Any, examples: Sequence[Example], targets: Sequence[float], task: str, length: int
) -> Encoded:
    """Tokenise a split; a text longer than `length` tokens is cut."""
    pairs = [example.pair or "" for example in examples]
    found = tokenizer(
        [example.text for example in examples],
        pairs if any(example.pair is not None for example in examples) else None,
        truncation=True,
        max_length=length,
    )
    names = list(found)
    return Encoded(
        fields=tuple(
            {name: torch.tensor(found[name][i]) for name in names} for i in range(len(examples))
        ),
        targets=torch.tensor(targets, dtype=torch.float32 if task == "regression" else torch.long),
        pad=tokenizer.pad_token_id,
    )


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers in batches of similar length: a pure function of its arguments.

    The rows are shuffled, sorted by length within stretches of 32 batches, cut into batches, and
    the batches shuffled, so that order stays random where it matters and padding stays small.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 32 * size
    found = []
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda row: lengths[row])
        found += [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(found)
    return found


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches by falling length: the order of evaluation."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[i : i + size] for i in range(0, len(order), size)]


def collate(encoded: Encoded, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """One batch (rows, longest of them), padded, without its targets."""
    batch = {}
    for name in encoded.fields[rows[0]]:
        fill = encoded.pad if name == "input_ids" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence(
            [encoded.fields[row][name] for row in rows], batch_first=True, padding_value=fill
        ).to(device)
    return batch


def take(corpus: Corpus, split: str) -> tuple[Example, ...]:
    """The examples of a split by its name. Raises DataError where it has none."""
    found: tuple[Example, ...] = getattr(corpus, split)
    if not found:
        raise DataError(f"{corpus.source} has no {split} split. Pass --split dev or train.")
    return found


def unlabelled(data: str, columns: Columns) -> list[Example]:
    """The rows of one file, labelled or not, in the file's order."""
    return _examples(read_file(Path(data), columns), columns)


def read_predictions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Predictions and, for each, its references, from JSON lines with `prediction` and `label` or
    `references` (a text or a list of them)."""
    predictions, references = [], []
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: predictions are JSON lines, in a file that ends in .jsonl.")
    for number, row in read_file(path):
        wanted = row.get("references", row.get("label"))
        if "prediction" not in row or wanted is None:
            raise DataError(
                f"{path}, line {number}: needs prediction and label (or references),"
                f" found {', '.join(row)}."
            )
        several = json.loads(wanted) if wanted.startswith("[") and "references" in row else [wanted]
        predictions.append(row["prediction"])
        references.append([_cell(reference) for reference in several])
    return predictions, references
