"""A run's configuration: one frozen dataclass, every field a flag and a key of a TOML file.

    lora train --config recipes/sst2.toml --method full --seed 1

The file sets values that the command line can override. It may hold one table per method, such as
`[methods.full]`: for that method, its keys override the file's other keys.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
import tyro
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
)

from lora.adapter_config import method_and_config
from lora.adapter_file import find_folder, settings_in
from lora.card import FORMER_NAMES, base_in
from lora.declared import declared, is_list
from lora.errors import ConfigError, FileError, SettingError
from lora.files import readable
from lora.finetune.arguments import check_flags, joined, split_config, value_of
from lora.finetune.data.corpus import Task
from lora.finetune.data.templates import LossOn
from lora.finetune.devices import check_device
from lora.finetune.flags import as_flag, describe_flags, hint, usage_line
from lora.finetune.methods import label, method_named, method_names, recordable, settings_brought
from lora.finetune.metrics import Metric
from lora.finetune.verbs import EXAMPLES, FIRST
from lora.interop import documents
from lora.interop.documents import wanted
from lora.method import METHODS
from lora.settings import LARGEST, MethodConfig

Schedule = Literal["linear", "cosine", "constant"]
Final = Literal["last", "best"]


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must be distinct")
    return values


def _table_or_balanced(value: object) -> object:
    if value != "balanced" and not isinstance(value, dict):
        raise ValueError("must be balanced, or labels with their weights")
    return value


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[\w.+-]{0,80}", name):
        raise ValueError("must be at most 80 letters, digits, and the characters . _ + -")
    return name


Text = Annotated[str, Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Whole = Annotated[int, Field(ge=1, le=LARGEST)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Distinct = AfterValidator(_distinct)
ClassWeights = Annotated[dict[str, Rate] | Literal["balanced"], BeforeValidator(_table_or_balanced)]
ABOUT = "Fine-tune a base model on a data set with one method."
C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[C]):
    """The configuration of one training run: base, data, method and hyperparameters."""

    base: Text = "demo"
    """Base model: demo (a built-in MiniLM, for classification and regression), demo-lm-tiny (a
    small built-in LLaMA with random weights, for --task text), smollm2 (SmolLM2-135M-Instruct, for
    --task text, after `lora data fetch smollm2`), a local folder, a GGUF file, or a name on the
    Hugging Face hub."""
    data: Annotated[tuple[Text, ...], Field(min_length=1), Distinct] = ("demo",)
    """Training data: a folder with train, dev and test files; one file (TSV, CSV, JSONL, JSON,
    Parquet or TXT); a data set on the hub such as glue/sst2; or an included one (`lora data` lists
    them). demo: film reviews if `lora data fetch` has downloaded them, else 1,000 sentences written
    for this project. A file without a column `split` is divided 80/10/10; without dev, every tenth
    text of train becomes dev. With --task text, several can be given, each as SOURCE or
    NAME=SOURCE."""
    weights: dict[str, Rate] = dataclasses.field(default_factory=dict)
    """With several --data: weights of the data sets, as NAME WEIGHT pairs, such as chat 2 code 1;
    NAME is by default the last part of SOURCE. A data set's share of each epoch is proportional to
    its size times its weight. Weights not given are 1."""
    temperature: Rate = 1.0
    """With several --data: raise each data set's share of an epoch to the power 1 / temperature,
    then rescale the shares. 1 changes nothing; larger values bring the shares closer to equal."""
    method: Text = "lora"
    """Training method: a name that `lora methods` lists, or a class in your own file,
    path/to/mine.py:MyMethod."""
    adapter: Path | None = None
    """Folder of an adapter, saved by this package or by PEFT, to train further in a new run
    (--resume continues an interrupted run). Its files give the method, the settings and, unless
    --base is given, the base."""
    resize_embeddings: bool = False
    """With --adapter: resize the base's embeddings if the adapter was trained on a base with
    another vocabulary size."""
    add_tokens: Annotated[tuple[Text, ...], Distinct] = ()
    """New tokens, such as '<tool>', to add to the tokenizer and to the base's embeddings. Their
    embedding rows are trained with the adapter, and the tokenizer is saved beside it."""
    text_column: Text | None = None
    """Column of the text: a name, or a number counted from 0. Default: the first of text, sentence,
    review, question, sentence1, question1 and premise, else decided by the values. Not with --task
    text, whose columns have the names that --task lists."""
    pair_column: Text | None = None
    """Column of the second text, for tasks on sentence pairs. Default: sentence2 beside sentence1,
    question2 beside question1, hypothesis beside premise, or sentence beside question."""
    label_column: Text | None = None
    """Column of the label. Default: the first of label, labels, score, target and class, else
    decided by the values."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file holds the column names. auto: compares it with the
    rows below; if the result is unclear, an error asks for yes or no."""
    task: Task = "auto"
    """What to train: a classifier, a regression, or a language model (text). auto: text if the rows
    hold messages, conversations, or a prompt (instruction, prompt, question or input) with its
    answer (output, completion, response or answer); regression if the labels are fractional
    numbers; else classification. Plain texts without labels need --task text."""
    template: Text = "auto"
    """With --task text: what turns conversations into text. plain: `User: ... Assistant: ...`.
    none: the prompt followed by the answer. auto: the model's chat template; plain, if the model
    has none; none, for texts without prompts. Or a Jinja file."""
    loss_on: LossOn = "answers"
    """With --task text: the tokens that the loss is computed on, those of the answers or all."""
    packing: bool = False
    """With --task text: pack several texts into each row of --max-length tokens instead of padding
    each text. Packed texts do not attend to one another, and a step still takes --batch-size texts:
    the result differs only by rounding and by random dropout."""
    skip_bad_lines: Number = 0
    """Maximum number of unusable rows in the data. They are skipped, and the first 10 are listed;
    with more, the run stops with an error."""
    max_new_tokens: Whole = 256
    """With --task text: maximum tokens of an answer when the model is scored on the test split (dev
    if there is no test)."""
    answered: Number | None = None
    """With --task text: score the answers to only the first N prompts of each data set's test split
    (dev if there is no test). 0: only perplexity is computed. Default: all."""
    metric: Metric = ""
    """The metric by which methods are compared. If it is computed on dev (of texts only perplexity
    and token_accuracy are), it also chooses the best checkpoint. Default: accuracy, pearson, or for
    texts exact_match; if at least half of the references are longer than five words, rougeL."""
    unrelated_text: Text | None = None
    """Text that has nothing to do with the task: a TXT file, a data set with a column `text`, or
    python-docs (Python's help topics, if they are installed). Its perplexity before and after
    training shows how much the model forgets. The first 4,096 tokens are used. With --task text
    only."""
    labels: Annotated[tuple[str, ...], Distinct] = ()
    """All labels, in the order of the classes, such as neg neutral pos. Default: the labels of the
    training split, sorted."""
    class_names: Annotated[tuple[Text, ...], Distinct] = ()
    """Names to show for the labels, in the order of the labels, such as negative positive for the
    labels 0 and 1. Data and predictions keep the labels."""
    class_weights: ClassWeights = dataclasses.field(default_factory=dict)
    """Weights of the classes in the training loss, as LABEL WEIGHT pairs, such as spam 5; labels
    not given have weight 1. balanced: every class has the same total weight, however many rows it
    has."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the training loss: this share of each target's probability is spread
    evenly over all classes."""
    epochs: Whole = 3
    """Passes over the training split."""
    batch_size: Whole = 16
    """Examples per optimizer step, over all devices."""
    micro_batch_size: Whole | None = None
    """Rows per forward and backward pass on one device (a row is an example, or several packed
    ones). Gradients accumulate over the passes of a step. Smaller values need less memory; the
    result differs only by rounding and by random dropout. Default: the device's share of
    --batch-size."""
    learning_rate: Rate | None = None
    """Peak learning rate of AdamW. Default: the method's (`lora methods` shows it)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay of AdamW, applied to matrices only."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Fraction of the steps during which the learning rate rises linearly to its peak."""
    schedule: Schedule = "linear"
    """Learning rate after the warmup: linear or cosine decay to 0, or constant."""
    max_grad_norm: Rate = 1.0
    """Gradients with a larger total norm are scaled down to this norm."""
    max_length: Whole | None = None
    """Maximum tokens per example; longer texts are truncated. Batches are padded to their longest
    example. Default: 128, or 1,024 with --task text, but at most the base's maximum number of
    positions."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """bfloat16: frozen weights are stored, and matrices multiplied, in bfloat16; trainable
    parameters and optimizer state stay in float32. float16: the same, with a loss scale, for GPUs
    without bfloat16 (T4, V100, RTX 20). auto: bfloat16 if the hardware has bfloat16 matrix
    multiplication, else float32."""
    device: Text = "auto"
    """Device to compute on: cpu, cuda, cuda:1, mps or xpu. auto: a CUDA device if there is one,
    else the CPU."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a run on a GPU can be repeated and resumed bit for
    bit. Slower. Runs on a CPU repeat and resume bit for bit without this flag."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: store the linear layers of the frozen base in 4 bits per weight (QLoRA)."""
    dense: tuple[Text, ...] = ()
    """Layers that --quantize does not quantize: names or the last parts of names, such as q_proj or
    self_attn.q_proj. Heads, embeddings and norms are never quantized."""
    compile: bool = False
    """Compile the model with torch.compile. The first step takes up to minutes longer. Later steps
    may be faster; on a CPU they were not, so measure."""
    activation_checkpointing: bool = False
    """Store only the input of each block and recompute its activations in the backward pass: less
    memory, slower steps."""
    shard: bool = False
    """Shard the frozen base over the processes of --nproc or torchrun (FSDP2), for bases that do
    not fit on one device. Each process loads only its part."""
    offload: bool = False
    """Keep the frozen base in CPU memory, and copy each block to the accelerator when it is needed.
    Turns on --shard, and works on a single GPU too."""
    eval_steps: Whole | None = None
    """Optimizer steps between evaluations on the dev split. Default: the steps of one epoch."""
    save_steps: Whole | None = None
    """Save a checkpoint every this many optimizer steps, and also at each evaluation. Default: only
    at each evaluation."""
    keep_last: Number = 1
    """Number of newest checkpoints to keep. 0: one while the run is in progress, none once it is
    complete."""
    keep_best: Number = 1
    """Number of best checkpoints to keep, ranked by their dev score: accuracy for classification,
    Pearson's r for regression, perplexity for text. The loss breaks ties."""
    early_stopping: Whole | None = None
    """Stop training after this many evaluations in a row that are no better than the best so far,
    ranked as for --keep-best. Default: never."""
    final: Final = "last"
    """Which checkpoint to save as the result and score on the held-out split (test, or dev if there
    is no test). last: the newest. best: the best on dev, ranked as for --keep-best."""
    baseline: bool = False
    """Also score the base alone, with the adapter disabled, on the held-out split."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed of the new head, the adapter's initialization, dropout and the order of the
    data."""
    limit: Whole | None = None
    """Use only the first N rows of every split. Default: all."""
    dev_limit: Whole | None = None
    """Use only the first N rows of the dev split. Default: that of --limit."""
    test_limit: Number | None = None
    """Use only the first N rows of the test split. 0: ignore the test split, so that the final
    scores are those of dev. Default: that of --limit."""
    name: Annotated[str, AfterValidator(_plain_name)] = ""
    """Name that tables show for the run's method. Default: the value of --method. It also selects
    the table [methods.NAME] in the file of --config, whose keys, even method, override the file's
    other keys."""
    note: str = ""
    """Free text to record in the run's summary.json."""
    trackers: tuple[Text, ...] = ()
    """Also log the metrics to tensorboard, wandb, mlflow or trackio."""
    run_dir: Path | None = None
    """Folder for the run's files: adapter, checkpoints, metrics and predictions. It must not exist.
    Default: runs/TIME-METHOD-XXXX."""
    settings: C
    """Settings of the chosen --method. For those of another: lora train --method NAME --help."""

    def __post_init__(self) -> None:
        values = {name: value for name, value in vars(self).items() if name != "settings"}
        try:
            _schema().model_validate(values, strict=True)
        except ValidationError as problem:
            error = problem.errors(include_url=False)[0]
            field, *inner = map(str, error["loc"])
            # pydantic names the option of a union too.
            keys = "".join(f"[{key}]" for key in inner if not key.startswith("dict["))
            value = documents.shown(error["input"])
            message = f"{keys} {wanted(error)}, found {value}."
            raise SettingError(field, message.lstrip()) from None
        object.__setattr__(self, "method", recordable(self.method))
        if self.base in FORMER_NAMES:
            name = FORMER_NAMES[self.base]
            raise ConfigError(
                f"--base {self.base} is now called {name}. Pass --base {name}, or, for the model of"
                " make demo-lm, --base smollm2."
            )
        check_device(self.device)
        if len(self.labels) == 1:
            raise SettingError("labels", f"must be at least two, found {self.labels!r}.")
        if self.dense and self.quantize == "none":
            raise ConfigError("--dense needs a quantized base. Set --quantize nf4, or remove it.")
        if self.compile and (self.shard or self.offload):
            raise ConfigError("--compile cannot be combined with --shard or --offload. Remove one.")
        if self.adapter is not None and (self.shard or self.offload):
            raise ConfigError("--adapter cannot be combined with --shard or --offload. Remove one.")
        if self.add_tokens and (self.adapter is not None or self.shard or self.offload):
            other = "--adapter" if self.adapter is not None else "--shard or --offload"
            raise ConfigError(f"--add-tokens cannot be combined with {other}. Remove one.")
        if self.resize_embeddings and self.adapter is None:
            raise ConfigError("--resize-embeddings has no effect without --adapter. Remove it.")


@dataclass(frozen=True, kw_only=True)
class TrainFlags(RunConfig[C]):
    """The flags of lora train: a run's configuration, and the flags that are read before it. The
    latter are fields here only so that --help lists them."""

    config: Path | None = None
    """TOML file of flags, with _ for -: learning_rate = 1e-4, packing = true, data = ["a.jsonl",
    "b.jsonl"]. A table [methods.NAME] applies to runs with this --name. Flags on the command line
    override the file."""
    resume: Path | None = None
    """Run directory of an interrupted run, to continue with its own settings. Other flags are
    refused, except --nproc and --device, and --base or --method if that folder or file has
    moved."""
    nproc: int | None = None
    """Number of processes on this machine, one per GPU. Default: one process. For several machines,
    use torchrun -m lora train."""


@functools.cache
def _schema() -> type[BaseModel]:
    """Returns the pydantic model that validates RunConfig's fields by their annotations."""
    hints = get_type_hints(RunConfig, include_extras=True)
    kinds: dict[str, Any] = {name: (kind, ...) for name, kind in hints.items()}
    del kinds["settings"]  # its class validates itself
    return create_model("RunFields", **kinds)


def config_of_method(name: Any) -> type[MethodConfig]:
    """Returns the Config of the method that --method names. Raises ConfigError if one of its fields
    has the name of a flag that every run has."""
    kind = method_named(name).Config
    if both := {*declared(kind)} & ({*declared(TrainFlags)} - {"settings"}):
        raise ConfigError(
            f"{kind.__name__} has a field {min(both)}, but every run has a flag of that name."
            " Rename the field."
        )
    return kind


def field_names() -> set[str]:
    """Returns the names of all fields that are flags of a run, with any method."""
    kinds: list[Any] = [RunConfig, *(method.Config for method in METHODS.values())]
    names = {field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)}
    return names - {"settings"}


def parse_run(arguments: Sequence[str], prog: str = "lora train") -> RunConfig[Any]:
    """Returns the configuration of a command line, which may contain `--config FILE`.

    Raises ConfigError if a flag or the file is invalid.
    """
    path, rest = split_config(arguments)
    table = read_toml(path) if path else {}
    if folder := value_of(rest, "--adapter"):
        table["adapter"] = folder
    if name := value_of(rest, "--name"):
        table["name"] = name
    with stated_in(path):
        if table.get("method") is not None:
            method_named(table["method"])  # a user's class has a name once it is imported
        method = _table_named(table).get("method", table.get("method"))
        if method is not None:
            method_named(method)
    method = value_of(rest, "--method") or method
    if method is not None:
        method_named(method)  # before the adapter's file is read: it may need the user's class
    filed = None
    if isinstance(table.get("adapter"), str):
        method, filed, table = _with_adapter(table, method)
    method = method or "lora"
    with stated_in(path):
        start = from_table(table, method)
    config = _with_flags(start, rest, prog)
    if filed is not None:
        _check_as_filed(config, filed)
    return config


def _with_adapter(
    table: dict[str, Any], method: str | None
) -> tuple[str, MethodConfig, dict[str, Any]]:
    """Returns the method of the adapter to continue training, its settings, and the table with
    both and with its base added. Keys that the table has stay. Raises ConfigError."""
    folder = str(table["adapter"])
    adapter_method, filed = method_and_config(folder)
    filed = _plain_name_is_a_name(filed)
    if method is not None and method_named(method) is not adapter_method:
        raise ConfigError(
            f"--method {method}: the adapter in {folder} was trained with"
            f" {adapter_method.name}. Remove --method."
        )
    base = base_in(settings_in(find_folder(folder)))
    settings = {field.name: getattr(filed, field.name) for field in fields(filed)}
    known = ({"base": base} if base else {}) | settings
    return method or adapter_method.name, filed, known | table


def _check_as_filed(config: RunConfig[Any], filed: MethodConfig) -> None:
    """Raise ConfigError if a flag differs from the setting in the adapter's file."""
    for field in fields(filed):
        value, filed_value = getattr(config.settings, field.name), getattr(filed, field.name)
        if value != filed_value:
            raise ConfigError(
                f"{as_flag(field.name)} {value}: the adapter in {config.adapter} was trained with"
                f" {filed_value}. Remove the flag."
            )


def _with_flags(start: RunConfig[Any], arguments: Sequence[str], prog: str) -> RunConfig[Any]:
    """Returns the configuration with the command line's flags applied."""
    # For a dict that is not empty, tyro makes a flag per key instead of one flag.
    filled = {
        field.name: value
        for field in fields(start.settings)
        if isinstance(value := getattr(start.settings, field.name), dict) and value
    }
    bare = replace(start.settings, **{name: {} for name in filled})
    weights, start = start.weights, replace(start, weights={})
    kind: Any = TrainFlags[config_of_method(start.method)]  # type: ignore[misc]
    flags: TrainFlags[Any] = parse(
        kind,
        arguments,
        prog,
        default=TrainFlags(**{**vars(start), "settings": bare}),
        description=ABOUT,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
    )
    config = RunConfig(**{f.name: getattr(flags, f.name) for f in fields(RunConfig)})
    back = {name: v for name, v in filled.items() if not getattr(config.settings, name)}
    return replace(
        config,
        settings=_plain_name_is_a_name(replace(config.settings, **back)),
        weights=config.weights or weights,
    )


def parse(kind: Any, arguments: Sequence[str], prog: str, **more: Any) -> Any:
    """Parses arguments with tyro.cli. A list's flag may be given several times, and a leading value
    needs no flag: `lora eval RUN` means `lora eval --run RUN`.

    Raises ConfigError for an unknown flag or an invalid value. tyro reports other errors on stderr
    and raises SystemExit(2); for --help it raises SystemExit(0).
    """
    first = FIRST[prog].strip("[].").lower() if prog in FIRST else None
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [as_flag(first), *arguments]
    kinds = [get_origin(kind) or kind, *get_args(kind)]
    known = {name: annotation for part in kinds for name, annotation in declared(part).items()}
    known.pop("settings", None)
    if not more.get("return_unknown_args"):
        check_flags(arguments, known, prog)
    several = {
        name
        for name, kind in known.items()
        if is_list(kind) or any(get_origin(option) is dict for option in (kind, *get_args(kind)))
    }
    whole = joined(arguments, several)
    usage: AbstractContextManager[None] = nullcontext()
    if {"-h", "--help"} & set(arguments):
        for part in kinds:
            describe_flags(part, first)
        text = more.get("description") or inspect.getdoc(kinds[0]) or ""
        # tyro does not wrap it, and joins lines unless they begin with a space.
        lines = textwrap.wrap(" ".join(text.split()), shutil.get_terminal_size().columns - 1)
        lines += ["Examples:", *(f"   {example}" for example in EXAMPLES[prog])]
        more["description"] = "\n".join(f" {line}" for line in lines)
        usage = usage_line(" ".join(filter(None, [prog, FIRST.get(prog), "[flags]"])))
    report = io.StringIO()
    try:
        with redirect_stderr(report), usage:
            return tyro.cli(kind, args=whole, prog=prog, **more)
    except SystemExit as stop:
        # tyro turns every ValueError into a box on stderr. A ConfigError is one: raise it instead.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(report.getvalue())
        raise


@contextmanager
def stated_in(path: Path | None) -> Iterator[None]:
    """Inside, a ConfigError names the file that the configuration comes from."""
    try:
        yield
    except ConfigError as error:
        raise (error if path is None else FileError(f"{path}: {error}")) from None


def from_table(table: dict[str, Any], method: Any) -> RunConfig[Any]:
    """Returns the configuration of a TOML table for a method. Raises ConfigError."""
    kind = config_of_method(method)
    method_table = _table_named({**table, "name": table.get("name") or label(method)})
    if method_table.get("method", method) != method:
        raise ConfigError(
            f"[methods.{table['name']}] has method = {method_table['method']!r}, but --method is"
            f" {method}. Remove one of them, or pass another --name."
        )
    values = {
        k: v for k, v in table.items() if k not in ("methods", "seeds", "rates", "search_seeds")
    }
    values = settings_brought(method) | values | method_table | {"method": method}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    of_method = {field.name for field in fields(kind)}
    shared = {field.name for field in fields(RunConfig)} - {"settings"}
    unknown = [key for key in values if key not in of_method | shared]
    if unknown:
        advice = hint(unknown[0], of_method | shared, str)
        raise ConfigError(f"a {method} run has no key {unknown[0]}. {advice}")
    for name in ("text_column", "pair_column", "label_column"):
        if type(values.get(name)) is int:
            values[name] = str(values[name])
    if isinstance(values.get("data"), str):
        values["data"] = (values["data"],)
    for name in ("run_dir", "adapter"):
        if isinstance(values.get(name), str):
            values[name] = Path(values[name])
    settings = kind(**{k: v for k, v in values.items() if k in of_method})
    shared_values = {k: v for k, v in values.items() if k in shared}
    return RunConfig(settings=_plain_name_is_a_name(settings), **shared_values)


def _table_named(table: dict[str, Any]) -> dict[str, Any]:
    """Returns the table [methods.NAME] of a file, with the name that the file gives the run; {} if
    there is none. Raises ConfigError if a table is not one of a method."""
    tables = table.get("methods", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError(
            f"methods must be tables, found {tables!r}. Write [methods.lora], [methods.full], ..."
        )
    for name, its in tables.items():
        if "method" not in its and label(name) not in method_names():
            raise ConfigError(
                f"[methods.{name}]: no method has that name. Methods: {', '.join(method_names())}."
                ' For another name, set method in it: method = "lora".'
            )
    labels = {name if "method" in its else label(name): its for name, its in tables.items()}
    chosen: dict[str, Any] = labels.get(str(table.get("name")), {})
    return chosen


def _plain_name_is_a_name(settings: MethodConfig) -> MethodConfig:
    """Turns a single plain word after --target-modules into a list of one name: a string in the
    config would mean a regular expression."""
    plain = {
        name: (value,)
        for name, kind in declared(type(settings)).items()
        if is_list(kind)
        and isinstance(value := getattr(settings, name), str)
        and re.fullmatch(r"[\w.]+", value)
    }
    return replace(settings, **plain)


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the table of a TOML file. Raises ConfigError."""
    with readable(path, ConfigError):
        text = path.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits too
        raise ConfigError(f"{path} is not valid TOML: {error}. Fix it, or pass another.") from None


def to_toml(config: RunConfig[Any]) -> str:
    """Returns a run's config.toml, which is the same in whatever folder the run is."""
    return tomli_w.dumps(to_table(replace(config, run_dir=None)))


def to_table(config: RunConfig[Any]) -> dict[str, Any]:
    """Returns the configuration as a TOML table, from which from_table restores it. Omits None."""
    table: dict[str, Any] = {}
    for source in (config, config.settings):
        for field in fields(source):
            value = getattr(source, field.name)
            if is_dataclass(value) or value is None:
                continue
            default = {} if field.default_factory is dict else field.default
            if value in ((), "", {}) and value == default:
                continue
            if isinstance(value, tuple):
                value = list(value)
            table[field.name] = str(value) if isinstance(value, Path) else value
    return table
