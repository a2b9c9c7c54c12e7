"""What a run's directory says of the run, each file with its schema.

environment.json   versions, machine, command, and digests of what was learned from
metrics.jsonl      one row per step and per evaluation
predictions.jsonl  the answers on the held-out split
summary.json       the result; there only when the run is complete
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from lora.errors import RunError
from lora.files import readable
from lora.interop import documents
from lora.interop.documents import Count, Finite, Positive, Seconds

Share = Annotated[float, Field(ge=0, lt=1)]
Scores = Annotated[dict[str, Finite], Field(min_length=1)]
Task = Literal["classification", "regression", "text"]
Split = Literal["train", "dev", "test"]
Epoch = Annotated[float, Field(gt=0, le=1_000_000)]
Mark = tuple[Count, str]
"""How far metrics.jsonl was at a checkpoint: so many bytes, and their SHA-256."""
NOTHING: Mark = (0, hashlib.sha256().hexdigest())


class Evaluated(TypedDict):
    """The training since the last evaluation, and what it has led to."""

    step: Positive
    epoch: Epoch
    loss: Finite
    first_loss: Finite
    seconds: Seconds
    padding: Finite
    dev_loss: Finite
    dev: Scores


class EvaluationRow(Evaluated):
    kind: Literal["evaluation"]


class StepRow(TypedDict):
    """lora.finetune.train.Step, less what is of its process."""

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


class Environment(TypedDict):
    """What the result may depend on besides the configuration."""

    data: str
    tokens: str
    note: str


class Answer(TypedDict):
    """A row of predictions.jsonl of a task that labels texts."""

    text: str
    pair: NotRequired[str]


class Turn(TypedDict):
    """A message; what else it has is read with the conversation."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    role: str
    content: str


class Written(TypedDict, total=False):
    """A row of predictions.jsonl of a task that writes texts: one of the two, and its tools."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    prompt: str
    messages: list[Turn]


class Summary(TypedDict):
    method: str
    task: Task
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
    train_seconds: Seconds
    seconds: Seconds
    peak_bytes: Count
    dtype: NotRequired[Literal["float32", "bfloat16"]]  # computed in; older runs do not say


Row = StepRow | EvaluationRow
ROW: TypeAdapter[Row] = TypeAdapter(Annotated[Row, Field(discriminator="kind")])
ENVIRONMENT = TypeAdapter(Environment)
SUMMARY = TypeAdapter(Summary)
ANSWERS: dict[str, TypeAdapter[Any]] = {
    "classification": TypeAdapter(Answer),
    "regression": TypeAdapter(Answer),
    "text": TypeAdapter(Written),
}


def summary_of(directory: Path) -> Summary:
    """The result of a complete run. Raises RunError if there is none, or it is damaged."""
    path = directory / "summary.json"
    with readable(path, RunError, "Pass the folder of a run."):
        there = path.is_file()
    if not there:
        raise RunError(f"{directory} holds no complete run: no summary.json. Run lora train.")
    return documents.read(path, SUMMARY, RunError, f"Remove {directory}, and run it again.")


def environment_of(directory: Path) -> Environment:
    """What the run was begun on. Raises RunError."""
    return documents.read(
        directory / "environment.json", ENVIRONMENT, RunError, "Bring it back, or run anew."
    )


def metrics_of(directory: Path) -> list[Row]:
    """The rows that a run has recorded; a last line whose writing was cut off is none. Raises
    RunError."""
    path = directory / "metrics.jsonl"
    with readable(path, RunError, "Pass a run directory."):
        there = path.exists()
    if not there:
        raise RunError(f"{directory} is no run directory: no metrics.jsonl. Run lora train.")
    payload = documents.content(path, RunError, "Run lora train again.")
    whole = payload[: payload.rfind(b"\n") + 1]
    return documents.decode_lines(whole, ROW, path, RunError, "Run lora train again.")


def metrics_at(directory: Path, mark: Mark, step: int) -> tuple[list[Row], bytes]:
    """The rows that a run had recorded at a checkpoint, after this step, and the file's bytes up to
    there. Raises RunError if the file is not as it was."""
    if step == 0:
        return [], b""
    path, then = directory / "metrics.jsonl", "Bring it back, or run anew."
    payload = documents.content(path, RunError, then)[: mark[0]]
    if hashlib.sha256(payload).hexdigest() != mark[1]:
        raise RunError(f"{path} is damaged: it is not as it was at its checkpoint. {then}")
    rows = documents.decode_lines(payload, ROW, path, RunError, then)
    if not rows or rows[-1]["kind"] != "step" or rows[-1]["step"] != step:
        raise RunError(f"{path} is damaged: its checkpoint is of step {step}. {then}")
    return rows, payload


def answers_of(directory: Path, task: str, most: int) -> list[Any]:
    """The first rows of predictions.jsonl; none before the run's end. Raises RunError."""
    path, then = directory / "predictions.jsonl", "Bring it back, or run anew."
    if not path.exists():
        return []
    payload = documents.content(path, RunError, then)
    first = b"\n".join(payload.split(b"\n", most)[:most])
    return documents.decode_lines(first, ANSWERS[task], path, RunError, then)
