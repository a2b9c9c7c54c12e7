"""The files that a run writes into its folder and later commands read, each with its schema.

environment.json   versions, machine, command, and digests of the training data
metrics.jsonl      one row per step and per evaluation, as they happen
predictions.jsonl  the answers on the held-out split
summary.json       the result; written last, so only a complete run has it
diverged.json      why the run ended without one, if its loss was not finite

Record writes metrics.jsonl during training. The readers need no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from lora.errors import RunError
from lora.files import readable, writable, write_whole
from lora.interop import documents
from lora.interop.documents import Count, Finite, Positive, Seconds

if TYPE_CHECKING:  # both import torch, which a reader of a summary does without
    from lora.finetune.evaluate import Evaluation

Share = Annotated[float, Field(ge=0, lt=1)]
Scores = Annotated[dict[str, Finite], Field(min_length=1)]
ScoredTask = Literal["classification", "regression", "text"]
Split = Literal["train", "dev", "test"]
Epoch = Annotated[float, Field(gt=0, le=1_000_000)]
Mark = tuple[Count, str]
"""The length of metrics.jsonl at a checkpoint, in bytes, and the SHA-256 of those bytes."""
NOTHING: Mark = (0, hashlib.sha256().hexdigest())
DIVERGED = "diverged.json"


class Evaluated(TypedDict):
    """Means over the steps since the last evaluation, and the scores on dev after them."""

    step: Positive
    epoch: Epoch
    loss: Finite
    first_loss: NotRequired[Finite]  # older runs lack it
    seconds: Seconds
    padding: Finite
    dev_loss: Finite
    dev: Scores


class EvaluationRow(Evaluated):
    kind: Literal["evaluation"]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    loss: float  # mean over the batch's examples, weighted by --class-weights; of texts over tokens
    learning_rate: float
    gradient_norm: float  # before clipping
    examples: int
    targets: int  # examples, or tokens with a label
    tokens: int  # without padding
    padding: float  # share of the batch's positions that are padding
    seconds: float
    epoch_ends: bool
    skipped: bool = False  # a gradient overflowed in float16: nothing was changed
    stop: int = 0  # the signal that asks to stop after this step, sent to any of the ranks


class StepRow(TypedDict):
    """A Step without `stop`. The gradient norm of a skipped step is 0."""

    kind: Literal["step"]
    step: Positive
    steps: Positive
    epoch: Positive
    loss: Finite
    learning_rate: Finite
    gradient_norm: Finite
    examples: Positive
    targets: Positive
    tokens: Positive
    padding: Share
    seconds: Seconds
    epoch_ends: bool
    skipped: NotRequired[bool]


class Environment(TypedDict):
    """The keys of environment.json that later commands read: digests of the data, and remarks."""

    data: str
    tokens: str
    note: str
    method: NotRequired[str]  # SHA-256 of the user's file that defines it
    asked: NotRequired[dict[str, Any]]
    """The settings that the run decided, such as dtype = "auto", as they were given; null for one
    that was left out. config.toml has what they were resolved to."""


class Answer(TypedDict):
    """A row of predictions.jsonl of classification or regression."""

    text: str
    pair: NotRequired[str]


class Turn(TypedDict):
    """A message. Other keys are checked when the conversation is read."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    role: str
    content: str


class Written(TypedDict, total=False):
    """A row of predictions.jsonl of --task text: a prompt or messages, and tools if it has any."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    prompt: str
    messages: list[Turn]


class Forgetting(TypedDict):
    """The perplexity of a text that the task does not touch, before and after training."""

    source: str
    tokens: Positive
    before: Finite
    after: Finite


class Summary(TypedDict):
    method: str
    name: NotRequired[str]  # of the method in tables, if it is not the method's
    task: ScoredTask
    base: str
    data: str
    seed: Count
    note: str
    trainable: Count
    adapter_parameters: Count
    parameters: Positive
    learning_rate: Finite
    evaluations: Annotated[list[Evaluated], Field(min_length=1)]
    step: Positive
    split: Split
    rows: Positive
    loss: Finite
    metrics: Scores
    baseline: NotRequired[Scores]
    majority: NotRequired[dict[Split, Finite]]  # accuracy of the most frequent class, by split
    forgetting: NotRequired[Forgetting]
    train_seconds: Seconds
    seconds: Seconds
    peak_bytes: Count
    training_bytes: NotRequired[Count]  # lora.finetune.peak says what each counts
    process_bytes: NotRequired[Count]
    dtype: NotRequired[Literal["float32", "bfloat16", "float16"]]  # older runs lack it
    adapter_bytes: NotRequired[Count]  # what adapter/ holds in safetensors files
    tokens_per_second: NotRequired[Finite]  # of training, without padding


RecordedRow = StepRow | EvaluationRow
ROW: TypeAdapter[RecordedRow] = TypeAdapter(Annotated[RecordedRow, Field(discriminator="kind")])
ENVIRONMENT = TypeAdapter(Environment)
SUMMARY = TypeAdapter(Summary)
ANSWERS: dict[str, TypeAdapter[Any]] = {
    "classification": TypeAdapter(Answer),
    "regression": TypeAdapter(Answer),
    "text": TypeAdapter(Written),
}


def shown_name(summary: Summary) -> str:
    """What tables call the method of a run."""
    return summary.get("name") or summary["method"]


def has_ended(directory: Path) -> bool:
    """True if a run is complete, or diverged: nothing is left of it to train."""
    return is_complete(directory) or (directory / DIVERGED).is_file()


def is_complete(directory: Path) -> bool:
    """True if a run has its result; False if summary.json is missing or damaged."""
    try:
        summary_of(directory)
    except RunError:
        return False
    return True


def summary_of(directory: Path) -> Summary:
    """The result of a complete run. Raises RunError if it is missing or damaged."""
    path = directory / "summary.json"
    with readable(path, RunError, "Pass the folder of a run."):
        exists = path.is_file()
    if not exists:
        raise RunError(f"{directory} holds no complete run: no summary.json. Run lora train.")
    return documents.read_document(
        path, SUMMARY, RunError, f"Remove {directory}, and run it again."
    )


def environment_of(directory: Path) -> Environment:
    """What the run started with. Raises RunError."""
    return documents.read_document(
        directory / "environment.json", ENVIRONMENT, RunError, "Restore it, or start a new run."
    )


def metrics_of(directory: Path) -> list[RecordedRow]:
    """The rows that a run has recorded, without a last line that is incomplete. Raises RunError."""
    path = directory / "metrics.jsonl"
    with readable(path, RunError, "Pass a run directory."):
        exists = path.exists()
    if not exists:
        raise RunError(
            f"{directory} is not a run directory: it has no metrics.jsonl. Run lora train."
        )
    payload = documents.content(path, RunError, "Run lora train again.")
    whole = payload[: payload.rfind(b"\n") + 1]
    return documents.decode_lines(whole, ROW, path, RunError, "Run lora train again.")


def smoothed_losses(steps: Sequence[StepRow], width: int) -> list[float]:
    """Returns the mean of the loss over the last `width` steps, at each step."""
    losses = [step["loss"] for step in steps]
    sums = [0.0, *itertools.accumulate(losses)]
    firsts = [max(0, i - width + 1) for i in range(len(losses))]
    return [(sums[i + 1] - sums[f]) / (i + 1 - f) for i, f in enumerate(firsts)]


def metrics_at(directory: Path, mark: Mark, step: int) -> tuple[list[RecordedRow], bytes]:
    """The rows that a run had recorded at the checkpoint of `step`, and their bytes in the file.

    Raises RunError if the file has changed since.
    """
    if step == 0:
        return [], b""
    path, advice = directory / "metrics.jsonl", "Restore it, or start a new run."
    payload = documents.content(path, RunError, advice)[: mark[0]]
    if hashlib.sha256(payload).hexdigest() != mark[1]:
        raise RunError(f"{path} is damaged: it is not as it was at its checkpoint. {advice}")
    rows = documents.decode_lines(payload, ROW, path, RunError, advice)
    if not rows or rows[-1]["kind"] != "step" or rows[-1]["step"] != step:
        raise RunError(f"{path} is damaged: its checkpoint is of step {step}. {advice}")
    return rows, payload


def answers_of(directory: Path, task: str, most: int) -> list[Any]:
    """The first rows of predictions.jsonl; none before the run is complete. Raises RunError."""
    path, advice = directory / "predictions.jsonl", "Restore it, or start a new run."
    if not path.exists():
        return []
    payload = documents.content(path, RunError, advice)
    first = b"\n".join(payload.split(b"\n", most)[:most])
    return documents.decode_lines(first, ANSWERS[task], path, RunError, advice)


class Record:
    """Writes metrics.jsonl, and knows what it holds: every evaluation, the steps since the last
    one, and the tokens of all steps.

    `file` is None on ranks that write nothing. `log` gets each new row too; `rows` are in the file
    already.
    """

    def __init__(
        self,
        file: BinaryIO | None,
        rows: Sequence[Mapping[str, Any]],
        log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.file, self.log, self.digest = file, log, hashlib.sha256()
        self.evaluations: list[dict[str, Any]] = []
        self.steps: list[Mapping[str, Any]] = []
        self.tokens = 0  # without padding
        for row in rows:
            self._remember(row)

    def step(self, step: Step) -> None:
        """Write the row of an optimiser step."""
        row = {"kind": "step", **asdict(step)}
        del row["stop"]  # belongs to this process, not to the training
        if not step.skipped:
            del row["skipped"]
        self._write(row)

    def evaluation(self, step: int, epoch: float, dev: Evaluation) -> Mapping[str, Any]:
        """Write the row of an evaluation, with means over the steps since the one before."""
        targets = sum(s["targets"] for s in self.steps)
        tokens = sum(s["tokens"] for s in self.steps)
        positions = sum(s["tokens"] / (1 - s["padding"]) for s in self.steps)
        self._write(
            {
                "kind": "evaluation",
                "step": step,
                "epoch": epoch,
                "loss": sum(s["loss"] * s["targets"] for s in self.steps) / targets,
                "first_loss": self.steps[0]["loss"],
                "seconds": sum(s["seconds"] for s in self.steps),
                "padding": 1 - tokens / positions,
                "dev_loss": dev.loss,
                "dev": dev.metrics,
            }
        )
        return self.evaluations[-1]

    def mark(self) -> Mark:
        """The file's length and SHA-256, once it is on disk; NOTHING on ranks that write none."""
        if self.file is None:
            return NOTHING
        with writable(self.file.name, RunError):
            os.fsync(self.file.fileno())
        return self.file.tell(), self.digest.hexdigest()

    def _write(self, row: dict[str, Any]) -> None:
        """Write one line and flush it, so that a reader can follow the run."""
        if self.file is not None:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            with writable(self.file.name, RunError):
                self.file.write(line)
                self.file.flush()
            self.digest.update(line)
        self.log(row)
        self._remember(row)

    def _remember(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "step":
            self.steps.append(row)
            self.tokens += row["tokens"]
        else:
            self.evaluations.append({k: v for k, v in row.items() if k != "kind"})
            self.steps = []


@contextmanager
def recorder(
    directory: Path, mark: Mark, step: int, log: Callable[[Mapping[str, Any]], None], writes: bool
) -> Iterator[Record]:
    """Open metrics.jsonl to append to it after `mark`, the mark() of the checkpoint of `step`.

    What the file holds after the mark is cut off: those steps are done again. Only the rank that
    `writes` opens the file.
    """
    path, length = directory / "metrics.jsonl", mark[0]
    rows, payload = metrics_at(directory, mark, step)
    record = Record(None, rows, log)
    record.digest.update(payload)
    try:
        if writes:
            with writable(path, RunError):
                record.file = path.open("r+b" if length else "wb")
                record.file.truncate(length)
                record.file.seek(length)
        yield record
    finally:
        if record.file is not None:
            with suppress(OSError):  # flushes a line that failed to be written, which was reported
                record.file.close()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines: the whole file or nothing. Raises RunError."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_file(path: Path, payload: bytes) -> None:
    """Write the whole file or nothing. Raises RunError."""
    with writable(path, RunError):
        write_whole(path, payload)
