"""What each verb takes: one frozen dataclass per verb, every field a flag.

The flags of lora train are those of config.RunConfig, of lora compare compare.CompareConfig, and of
lora export and lora convert they stand beside what they do, in lora/interop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a run would match, train, take and need. Every other flag is one of `lora train`."""

    nproc: int = 1
    """Devices to plan for, besides one: each with the whole base, and with its share of it."""
    json: bool = False
    """JSON, in bytes, on standard output."""
    config: Path | None = None
    """A TOML file of flags, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Score a run on a split of its data, or of other data; or score a file of predictions."""

    run: Path | None = None
    """A run directory, or the folder of an adapter, ours or PEFT's."""
    base: str | None = None
    """Where its base is, if not where it was or if the adapter does not say: a folder, or a name
    on the hub."""
    method: str | None = None
    """path/to/mine.py:MyMethod, if the adapter is of a method of yours. Of a run only if that file
    has moved or has changed since."""
    resize_embeddings: bool = False
    """Of an adapter's folder: if its base had more tokens or fewer, give this base as many."""
    data: str | None = None
    """Other data than the run's own."""
    split: Literal["test", "dev", "train"] | None = None
    """Default: test, or dev where there is none."""
    predictions: Path | None = None
    """JSON lines with `prediction` and `label` or `references`; needs no model."""
    harness: tuple[str, ...] = ()
    """Tasks of the LM Evaluation Harness instead, by their names or YAML files."""
    limit: int | None = None
    """Of --harness: documents of each task at most."""
    task: Literal["classification", "regression", "text"] | None = None
    """What --predictions are; text is scored by exact match, BLEU and ROUGE. Default: the task of
    the run beside the file, or classification."""
    text_column: str | None = None
    """Column of the text in --data. Default, here and below: the run's own."""
    pair_column: str | None = None
    """Column of the second text."""
    label_column: str | None = None
    """Column of the label."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV in --data names its columns."""
    skip_bad_lines: int = 0
    """Rows of --data that may be unusable: they are left out and listed."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Label texts with a run's model; JSON lines on standard output, or in --output."""

    run: Path
    """A run directory, or the folder of an adapter, ours or PEFT's."""
    base: str | None = None
    """Where its base is, if not where it was or if the adapter does not say."""
    method: str | None = None
    """path/to/mine.py:MyMethod, if the adapter is of a method of yours. Of a run only if that file
    has moved or has changed since."""
    resize_embeddings: bool = False
    """Of an adapter's folder: if its base had more tokens or fewer, give this base as many."""
    text: tuple[str, ...] = ()
    """Texts to label."""
    pair: tuple[str, ...] = ()
    """Their second texts, for tasks on sentence pairs."""
    data: str | None = None
    """A file of texts, labelled or not: TSV, CSV, JSONL, JSON, Parquet or TXT."""
    output: Path | None = None
    """Where the predictions go."""
    text_column: str | None = None
    """Column of the text in --data. Default, here and below: the run's own."""
    pair_column: str | None = None
    """Column of the second text."""
    label_column: str | None = None
    """Column of the label, which is passed on beside the prediction."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV in --data names its columns."""
    skip_bad_lines: int = 0
    """Rows of --data that may be unusable: they are left out and listed."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Let a run's model write. One --prompt is answered as text, as it is written; several, or
    those of --data, as JSON lines; without either it is a talk in the terminal."""

    run: Path
    """A run directory, of --task text, or the folder of such an adapter, ours or PEFT's."""
    base: str | None = None
    """Where its base is, if not where it was or if the adapter does not say."""
    method: str | None = None
    """path/to/mine.py:MyMethod, if the adapter is of a method of yours. Of a run only if that file
    has moved or has changed since."""
    resize_embeddings: bool = False
    """Of an adapter's folder: if its base had more tokens or fewer, give this base as many."""
    prompt: tuple[str, ...] = ()
    """What to answer."""
    data: str | None = None
    """A file of prompts, in any of the formats that training takes, answered there or not."""
    system: str | None = None
    """What the system says first, where the template has room for it."""
    output: Path | None = None
    """Where the JSON lines go."""
    skip_bad_lines: int = 0
    """Rows of --data that may be unusable: they are left out and listed."""
    adapter: Literal["on", "off", "both"] = "on"
    """off: the base alone; both: one beside the other."""
    max_new_tokens: int | None = None
    """Tokens at most. Default: the run's own."""
    temperature: float = 0.0
    """0: the most probable token at each step; above: drawn, the more evenly the higher."""
    top_k: int | None = None
    """Draw among so many of the most probable tokens alone."""
    top_p: float | None = None
    """Draw among the fewest most probable tokens whose probabilities add up to this."""
    seed: int = 0
    """Of what is drawn."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Print examples token by token as a run would learn them: what is masked is dimmed. Of data
    with labels print which columns are taken, the rows of each class, and examples. Every other
    flag is one of `lora train`."""

    count: int = 3
    """Examples of each data set."""
    split: Literal["train", "dev", "test"] = "train"
    """Where they are from."""
    config: Path | None = None
    """A TOML file of flags, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write a run's model as a plain one: W' in W's place, a folder that from_pretrained reads."""

    run: Path
    """A run directory, or the folder of an adapter, ours or PEFT's."""
    base: str | None = None
    """Where its base is, if not where it was or if the adapter does not say."""
    method: str | None = None
    """path/to/mine.py:MyMethod, if the adapter is of a method of yours. Of a run only if that file
    has moved or has changed since."""
    resize_embeddings: bool = False
    """Of an adapter's folder: if its base had more tokens or fewer, give this base as many."""
    output: Path
    """The folder to make."""
    dequantize: bool = False
    """Merge into the dequantised base, of a run on a base in four bits: not the one that was
    quantised."""
    untie: bool = False
    """Give a layer whose weight is tied to another's one of its own, where it is merged into."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """What the weights are written in: what the base's files hold, or another. They are merged in
    float32 and rounded once."""
    tolerance: float | None = None
    """How far the merge may move an output on the run's first texts. Default: a multiple of what
    rounding moves it by, measured on the model."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw loss and score over the epochs from the metrics that runs recorded."""

    runs: tuple[Path, ...]
    """Run directories."""
    output: Path | None = None
    """Folder of the pictures. Default: the first run's."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a method: that values and gradients are those of its equation, that it can be saved,
    loaded, merged and restored, that seeds, dtypes and devices work. Prints a table of what passed
    and what failed. Exit code: 0 if all passed, else 2."""

    method: str
    """path/to/mine.py:MyMethod, or the name of a method that `lora methods` lists."""
