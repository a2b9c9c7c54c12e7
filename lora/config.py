"""A run's configuration: one frozen dataclass, every field a flag and a key of a TOML file.

    lora train --config recipes/sst2.toml --method full --seed 1

A file gives the values that the command line starts from. It may hold a table per method,
`[methods.full]`, whose keys win over the file's own where that method is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import tyro

import lora.methods  # noqa: F401  (fills METHODS)
from lora.adapter import METHODS, Method, MethodConfig, check, is_number, positive, whole_number
from lora.checkpoint import settings_of
from lora.declared import declared, is_list
from lora.errors import ConfigError

Task = Literal["auto", "classification", "regression", "text"]
Schedule = Literal["linear", "cosine", "constant"]
Final = Literal["last", "best"]
LossOn = Literal["answers", "all"]
TEMPLATES = ("auto", "plain", "none")
"""What --template takes besides a file."""
ABOUT = """Train one method on one data set.

Flags may stand in --config FILE.toml. --resume RUN goes on with a run that was cut off, by the
settings that it has. --nproc N trains on N processes of this machine; torchrun -m lora train on
those of several."""
C = TypeVar("C", bound=MethodConfig)
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "qlora": ("lora", {"quantize": "nf4"}),
}
"""What --method takes: the method that a name means, and the settings of the run it brings."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[C]):
    """One training run: a base, a data set, a method, and how long and fast."""

    base: str = "demo"
    """Base model: demo (embedded), demo-lm (a small LLaMA without training, for texts), a local
    folder, or a name on the hub."""
    data: tuple[str, ...] = ("demo",)
    """Data: demo (embedded), a folder with train/dev/test files, one TSV, CSV, JSONL, JSON, Parquet
    or TXT file, a data set on the hub such as glue/sst2, or tasks/NAME, which is made (`lora data
    tasks`). Of texts several: SOURCE or NAME=SOURCE each."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of several data sets, how much of each: NAME WEIGHT, times its size; 1 where not named."""
    temperature: float = 1.0
    """Of several data sets: shares are raised to 1 / temperature. 1: by their sizes; more: nearer
    to equal parts."""
    method: str = "lora"
    """What trains; `lora methods` lists them."""
    adapter: Path | None = None
    """Folder of an adapter, ours or PEFT's, that training goes on from. Its method and settings are
    those of its file."""
    text_column: str | None = None
    """Column of the text: a name, or a number from 0."""
    pair_column: str | None = None
    """Column of the second text, for tasks on sentence pairs."""
    label_column: str | None = None
    """Column of the label."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file names its columns. auto: it is told from the rows
    below, and asked for if they leave it open."""
    task: Task = "auto"
    """auto: text where the data has prompts and answers or conversations, regression where the
    labels are fractional numbers. text: a language model learns to write."""
    template: str = "auto"
    """How conversations become text: auto (the model's own, else plain), plain (User: ...
    Assistant: ...), none (prompt and answer as they stand), or a Jinja file."""
    loss_on: LossOn = "answers"
    """What a text is learned from: the answers, or all of it."""
    packing: bool = False
    """Texts share rows of --max-length tokens, without seeing one another: no padding, the same
    result."""
    skip_bad_lines: int = 0
    """Rows of the data that may be unusable: they are left out, counted and listed."""
    max_new_tokens: int = 256
    """Tokens at most of an answer that is written on the held-out split."""
    answered: int | None = None
    """Prompts of each held-out data set that are answered and scored by what is written. Default:
    all; 0: perplexity alone."""
    labels: tuple[str, ...] = ()
    """The classes in order. Default: those of the training split, sorted."""
    epochs: int = 3
    """Passes over the training split."""
    batch_size: int = 16
    """Examples per optimiser step, over all devices."""
    micro_batch_size: int | None = None
    """Rows computed at a time on a device, of an example each or packed, whose gradients add up to
    the step's. Less needs less memory and changes the result by rounding and the dropout's masks
    only. Default: its share of batch_size."""
    learning_rate: float | None = None
    """Peak rate of AdamW. Default: the method's own (`lora methods` shows it)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, on matrices only."""
    warmup: float = 0.06
    """Share of the steps in which the rate rises to its peak."""
    schedule: Schedule = "linear"
    """Of the rate after that: down to 0 along a line or half a cosine, or constant."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to."""
    max_length: int | None = None
    """Tokens per example at most; longer texts are cut. Batches are padded to their longest.
    Default: 128; for language models 1,024, or what the model has."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: matrix products in it, and frozen matrices held in it; what trains, and the
    optimiser, in float32. auto: bfloat16 where the processor multiplies in it, else float32."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: hold the linear layers of the frozen base in four bits each (QLoRA)."""
    dense: tuple[str, ...] = ()
    """Layers that --quantize leaves as they are: names, or dotted endings of them. Heads,
    embeddings and norms always stay."""
    compile: bool = False
    """torch.compile the model: minutes before the first step, which long runs win back."""
    activation_checkpointing: bool = False
    """Keep of each block its input alone, and compute the rest again for the backward pass: less
    memory, a longer step."""
    shard: bool = False
    """Divide the frozen base among the ranks of --nproc or torchrun (FSDP2), each tensor as it is
    read, for bases that one device does not hold."""
    offload: bool = False
    """Shard, and hold the pieces in the CPU's memory: each block is fetched to the accelerator."""
    eval_steps: int | None = None
    """Optimiser steps from one evaluation on dev to the next. Default: an epoch."""
    save_steps: int | None = None
    """Optimiser steps from one checkpoint to the next, besides those of the evaluations."""
    keep_last: int = 1
    """Newest checkpoints that stay; 0: one while the run is not complete."""
    keep_best: int = 1
    """Best checkpoints on dev that stay, by the task's first metric and then by the loss."""
    early_stopping: int | None = None
    """Evaluations in a row without a better one after which training ends."""
    final: Final = "last"
    """Which adapter is scored on the held-out split and handed on."""
    baseline: bool = False
    """Score the held-out split with the adapter off, too."""
    seed: int = 0
    """Covers the new head, the adapter's start, dropout and the order of the data."""
    limit: int | None = None
    """Use only the first N rows of every split."""
    note: str = ""
    """A remark for the run's summary."""
    trackers: tuple[str, ...] = ()
    """Show the metrics in tensorboard, wandb, mlflow or trackio too."""
    run_dir: Path | None = None
    """Where the run is recorded. Default: runs/TIME-METHOD."""
    settings: C
    """The method's own settings."""

    def __post_init__(self) -> None:
        sources = self.data
        good = isinstance(sources, tuple) and all(isinstance(one, str) and one for one in sources)
        check("data", sources, "one or several names, each once",
              good and 0 < len(sources) == len(set(sources)))  # fmt: skip
        good = isinstance(self.weights, dict) and all(
            isinstance(n, str) and is_number(w) and w > 0 for n, w in self.weights.items()
        )
        check("weights", self.weights, "names with numbers above 0", good)
        positive("temperature", self.temperature)
        whole_number("skip_bad_lines", self.skip_bad_lines, least=0)
        if self.answered is not None:
            whole_number("answered", self.answered, least=0)
        for name in ("base", "method", "note", "template"):
            value = getattr(self, name)
            check(name, value, "a text", isinstance(value, str) and bool(value or name == "note"))
        for name in ("text_column", "pair_column", "label_column"):
            value = getattr(self, name)
            good = value is None or (isinstance(value, str) and bool(value))
            check(name, value, "a column's name", good)
        good = self.header in ("auto", "yes", "no")
        check("header", self.header, "auto, yes or no", good)
        check("task", self.task, "one of " + ", ".join(get_args(Task)), self.task in get_args(Task))
        good = self.dtype in ("auto", "float32", "bfloat16")
        check("dtype", self.dtype, "auto, float32 or bfloat16", good)
        check("quantize", self.quantize, "none or nf4", self.quantize in ("none", "nf4"))
        good = isinstance(self.dense, tuple) and all(isinstance(name, str) for name in self.dense)
        check("dense", self.dense, "names of layers", good)
        if self.dense and self.quantize == "none":
            raise ConfigError("dense is of a quantised base. Set --quantize nf4, or leave it out.")
        for name in (
            "compile",
            "activation_checkpointing",
            "shard",
            "offload",
            "packing",
            "baseline",
        ):
            value = getattr(self, name)
            check(name, value, "true or false", isinstance(value, bool))
        if self.compile and (self.shard or self.offload):
            raise ConfigError("compile is of a base that lies whole. Leave it or --shard out.")
        if self.adapter is not None and (self.shard or self.offload):
            raise ConfigError("--adapter goes on a base that lies whole. Leave --shard out.")
        good = isinstance(self.trackers, tuple) and all(isinstance(t, str) for t in self.trackers)
        check("trackers", self.trackers, "names", good)
        for name, kinds in (("schedule", Schedule), ("final", Final), ("loss_on", LossOn)):
            value = getattr(self, name)
            check(name, value, "one of " + ", ".join(get_args(kinds)), value in get_args(kinds))
        for name in ("keep_last", "keep_best"):
            whole_number(name, getattr(self, name), least=0)
        good = all(isinstance(label, str) for label in self.labels)
        check("labels", self.labels, "texts", good and isinstance(self.labels, tuple))
        distinct = len(set(self.labels)) == len(self.labels) != 1
        check("labels", self.labels, "distinct, and two at least", distinct)
        for name in ("epochs", "batch_size", "max_new_tokens"):
            whole_number(name, getattr(self, name))
        for name in (
            "max_length",
            "limit",
            "micro_batch_size",
            "eval_steps",
            "save_steps",
            "early_stopping",
        ):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate)
        decay = self.weight_decay
        check("weight_decay", decay, "a number of at least 0", is_number(decay) and decay >= 0)
        positive("max_grad_norm", self.max_grad_norm)
        share = self.warmup
        check("warmup", share, "a share with 0 <= share <= 1", is_number(share) and 0 <= share <= 1)
        good = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        good = good and 0 <= self.seed < 2**63
        check("seed", self.seed, "a whole number from 0 to 2**63 - 1", good)


def method_named(name: Any) -> type[Method]:
    """The method that --method means. Raises ConfigError."""
    if not isinstance(name, str) or name not in NAMES:
        raise ConfigError(
            f"--method {name!r} is unknown. Found: {', '.join(sorted(NAMES))}. Run lora methods."
        )
    method = METHODS[NAMES[name][0]]
    if both := {*declared(method.Config)} & ({*declared(RunConfig)} - {"settings"}):
        raise ConfigError(
            f"{method.Config.__name__} has a field {min(both)}, which is a flag of every run."
            " Rename the field."
        )
    return method


def parse_run(arguments: Sequence[str], prog: str = "lora train") -> RunConfig[Any]:
    """The configuration that a command line, with `--config FILE` in it, asks for.

    Raises ConfigError on a flag or a file that is refused.
    """
    path, own = split_config(arguments)
    table = read_toml(path) if path else {}
    if folder := value_of(own, "--adapter"):
        table["adapter"] = folder
    method = value_of(own, "--method") or table.get("method")
    if "adapter" in table:
        found, filed = settings_of(str(table["adapter"]))
        filed = _plain_name_is_a_name(filed)
        if method not in (None, found.name) and NAMES.get(method, ("",))[0] != found.name:
            raise ConfigError(
                f"--method {method}: the adapter in {table['adapter']} is of {found.name}. Leave"
                " --method out."
            )
        method = method or found.name
        table = {field.name: getattr(filed, field.name) for field in fields(filed)} | table
    method = method or "lora"
    start = from_table(table, method)
    # Of a dict that is not empty tyro makes a flag per key, in place of the one.
    filled = {
        field.name: value
        for field in fields(start.settings)
        if isinstance(value := getattr(start.settings, field.name), dict) and value
    }
    bare = replace(start.settings, **{name: {} for name in filled})
    weights, start = start.weights, replace(start, weights={})
    kind: Any = RunConfig[method_named(method).Config]  # type: ignore[misc]
    config: RunConfig[Any] = parse(
        kind,
        own,
        prog,
        default=replace(start, settings=bare),
        description=ABOUT,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
    )
    back = {name: v for name, v in filled.items() if not getattr(config.settings, name)}
    config = replace(
        config,
        settings=_plain_name_is_a_name(replace(config.settings, **back)),
        weights=config.weights or weights,
    )
    if config.adapter is not None:
        for field in fields(filed):
            asked, there = getattr(config.settings, field.name), getattr(filed, field.name)
            if asked != there:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(
                    f"{flag} {asked}: the adapter in {config.adapter} has {there}. Leave it out."
                )
    return config


def parse(kind: Any, arguments: Sequence[str], prog: str, **more: Any) -> Any:
    """tyro.cli, a ConfigError of ours raised as it is.

    What tyro itself refuses it reports on stderr, and leaves by SystemExit 2; --help by 0.
    """
    kinds = [get_origin(kind) or kind, *(method.Config for method in METHODS.values())]
    lists = {f"--{name}" for one in kinds for name, its in declared(one).items() if is_list(its)}
    given = Counter(argument.partition("=")[0].replace("-", "_") for argument in arguments)
    for flag in sorted(lists):  # of a list the last would win, the others go in silence
        if given[flag.replace("-", "_")] > 1:
            shown = flag.replace("_", "-")
            raise ConfigError(f"{shown} is given twice. Write {shown} A B.")
    report = io.StringIO()
    try:
        with redirect_stderr(report):
            return tyro.cli(kind, args=list(arguments), prog=prog, **more)
    except SystemExit as stop:
        # tyro reports a ValueError of a field's value, ours among them, in a box of its own.
        behind: BaseException | None = stop
        while behind is not None and not isinstance(behind, ConfigError):
            behind = behind.__cause__ or behind.__context__
        if behind is not None:
            raise behind from None
        sys.stderr.write(report.getvalue())
        raise


def from_table(table: dict[str, Any], method: Any) -> RunConfig[Any]:
    """The configuration that a TOML table states for a method. Raises ConfigError."""
    kind = method_named(method).Config
    tables = table.get("methods", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError("methods must be tables: [methods.lora], [methods.full], ...")
    if strange := set(tables) - set(NAMES):
        raise ConfigError(
            f"[methods.{min(strange)}] is of no method. Found: {', '.join(sorted(NAMES))}."
        )
    values = {k: v for k, v in table.items() if k not in ("methods", "seeds")}
    values = NAMES[method][1] | values
    values |= tables.get(method, {}) | {"method": method}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    own = {field.name for field in fields(kind)}
    shared = {field.name for field in fields(RunConfig)} - {"settings"}
    unknown = [key for key in values if key not in own | shared]
    if unknown:
        near = difflib.get_close_matches(unknown[0], own | shared, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(own | shared))}."
        raise ConfigError(f"{unknown[0]} is no key of a {method} run. {hint}")
    for name in ("text_column", "pair_column", "label_column"):
        if isinstance(values.get(name), int):
            values[name] = str(values[name])
    if isinstance(values.get("data"), str):
        values["data"] = (values["data"],)
    for name in ("run_dir", "adapter"):
        if name in values:
            values[name] = Path(str(values[name]))
    settings = kind(**{k: v for k, v in values.items() if k in own})
    shared_values = {k: v for k, v in values.items() if k in shared}
    return RunConfig(settings=_plain_name_is_a_name(settings), **shared_values)


def named(source: str) -> tuple[str, str]:
    """The name and the place of one of --data: NAME=PLACE, or the place's last part."""
    name, sign, place = source.partition("=")
    if sign and place and re.fullmatch(r"[\w.-]+", name) and not Path(source).exists():
        return name, place
    return Path(source).stem if Path(source).suffix else Path(source).name, source


def placed(source: str) -> str:
    """The same with a file or folder by its whole path, so that it is found from anywhere."""
    _, place = named(source)
    if place in ("demo", "demo-lm") or not Path(place).exists():
        return source
    return source.removesuffix(place) + str(Path(place).resolve())


def split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file after --config, None without one, and the other arguments."""
    found, rest = take(arguments, "--config", "FILE.toml")
    return (None if found is None else Path(found)), rest


def take(arguments: Sequence[str], flag: str, what: str) -> tuple[str | None, list[str]]:
    """What follows a flag, None without it, and the other arguments."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        if argument == flag or argument.startswith(f"{flag}="):
            width = 1 if "=" in argument else 2
            found = argument.partition("=")[2] if width == 1 else "".join(rest[index + 1 :][:1])
            if not found or found.startswith("--"):
                raise ConfigError(f"{flag} names nothing. Pass {flag} {what}.")
            return found, rest[:index] + rest[index + width :]
    return None, rest


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    value = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def _plain_name_is_a_name(settings: MethodConfig) -> MethodConfig:
    """One plain word after --target-modules is a name; a string in the config is a pattern."""
    plain = {
        name: (value,)
        for name, kind in declared(type(settings)).items()
        if is_list(kind)
        and isinstance(value := getattr(settings, name), str)
        and re.fullmatch(r"[\w.]+", value)
    }
    return replace(settings, **plain)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises ConfigError where it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no TOML, or no UTF-8
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}. Mend it, or pass another.") from None


def to_table(config: RunConfig[Any]) -> dict[str, Any]:
    """The configuration as a TOML table that reads back to the same; None is left out."""
    table: dict[str, Any] = {}
    for source in (config, config.settings):
        for field in fields(source):
            value = getattr(source, field.name)
            if is_dataclass(value) or value is None or value in ((), "", {}):
                continue
            if isinstance(value, tuple):
                value = list(value)
            table[field.name] = str(value) if isinstance(value, Path) else value
    return table
