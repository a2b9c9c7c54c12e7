"""A run's configuration: one frozen dataclass, every field a flag and a key of a TOML file.

    lora train --config recipes/sst2.toml --method full --seed 1

A file gives the values that the command line starts from. It may hold a table per method,
`[methods.full]`, whose keys win over the file's own where that method is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model

from lora.adapter_config import method_and_config
from lora.adapter_file import find_folder, settings_in
from lora.card import BUILT_IN, base_in
from lora.declared import declared, is_list
from lora.errors import ConfigError, FileError, SettingError
from lora.files import readable
from lora.finetune.data.corpus import Task
from lora.finetune.data.templates import LossOn
from lora.finetune.flags import as_flag, hint
from lora.finetune.methods import (
    label,
    method_named,
    method_names,
    recordable,
    settings_brought,
)
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


Text = Annotated[str, Field(min_length=1)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Whole = Annotated[int, Field(ge=1, le=LARGEST)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Distinct = AfterValidator(_distinct)
ABOUT = "Train one method on one data set."
BEFORE = {
    "lora train": ("config", "resume", "nproc"),
    "lora plan": ("config", "nproc", "json"),
    "lora compare": ("config", "methods", "seeds", "dry_run"),
    "lora data preview": ("config", "count", "split"),
}
"""Flags that a verb takes besides those of a run."""
C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[C]):
    """One training run: a base, a data set, a method, and how long and fast."""

    base: Text = "demo"
    """Base model: demo (embedded), demo-lm (a small LLaMA without training, for texts), a local
    folder, or a name on the hub."""
    data: Annotated[tuple[Text, ...], Field(min_length=1), Distinct] = ("demo",)
    """Data: demo (embedded), a folder with train/dev/test files, one TSV, CSV, JSONL, JSON, Parquet
    or TXT file, a data set on the hub such as glue/sst2, or tasks/NAME, which is made (`lora data
    tasks`). Of texts several: SOURCE or NAME=SOURCE each."""
    weights: dict[str, Rate] = dataclasses.field(default_factory=dict)
    """Of several data sets, how much of each: NAME WEIGHT, times its size; 1 where not named."""
    temperature: Rate = 1.0
    """Of several data sets: shares are raised to 1 / temperature. 1: by their sizes; more: nearer
    to equal parts."""
    method: Text = "lora"
    """What trains: a name that `lora methods` lists, or a class in a file of yours,
    path/to/mine.py:MyMethod."""
    adapter: Path | None = None
    """Folder of an adapter, ours or PEFT's, that training goes on from. Its method and settings are
    those of its file, and its base is the one that the file states, unless --base is given."""
    resize_embeddings: bool = False
    """Of --adapter: if its base had more tokens or fewer, give this base as many."""
    add_tokens: Annotated[tuple[Text, ...], Distinct] = ()
    """Tokens to add to the tokenizer and to the base's embeddings. Their rows train with the
    adapter, and the tokenizer is saved beside it."""
    text_column: Text | None = None
    """Column of the text: a name, or a number from 0."""
    pair_column: Text | None = None
    """Column of the second text, for tasks on sentence pairs."""
    label_column: Text | None = None
    """Column of the label."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV or TSV file names its columns. auto: it is told from the rows
    below, and asked for if they leave it open."""
    task: Task = "auto"
    """auto: text where the data has prompts and answers or conversations, regression where the
    labels are fractional numbers. text: a language model learns to write."""
    template: Text = "auto"
    """How conversations become text: auto (the model's own, else plain), plain (User: ...
    Assistant: ...), none (prompt and answer as they stand), or a Jinja file."""
    loss_on: LossOn = "answers"
    """What a text is learned from: the answers, or all of it."""
    packing: bool = False
    """Texts share rows of --max-length tokens, without seeing one another: no padding, the same
    result."""
    skip_bad_lines: Number = 0
    """Rows of the data that may be unusable: they are left out, counted and listed."""
    max_new_tokens: Whole = 256
    """Tokens at most of an answer that is written on the held-out split."""
    answered: Number | None = None
    """Prompts of each held-out data set that are answered and scored by what is written. Default:
    all; 0: perplexity alone."""
    labels: Annotated[tuple[str, ...], Distinct] = ()
    """The classes in order. Default: those of the training split, sorted."""
    epochs: Whole = 3
    """Passes over the training split."""
    batch_size: Whole = 16
    """Examples per optimiser step, over all devices."""
    micro_batch_size: Whole | None = None
    """Rows computed at a time on a device, of an example each or packed, whose gradients add up to
    the step's. Less needs less memory and changes the result by rounding and the dropout's masks
    only. Default: its share of batch_size."""
    learning_rate: Rate | None = None
    """Peak rate of AdamW. Default: the method's own (`lora methods` shows it)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay of AdamW, on matrices only."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Share of the steps in which the rate rises to its peak."""
    schedule: Schedule = "linear"
    """Of the rate after that: down to 0 along a line or half a cosine, or constant."""
    max_grad_norm: Rate = 1.0
    """Norm that gradients are clipped to."""
    max_length: Whole | None = None
    """Tokens per example at most; longer texts are cut. Batches are padded to their longest.
    Default: 128; for language models 1,024, or what the model has."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: matrix products in it, and frozen matrices held in it; what trains, and the
    optimiser, in float32. auto: bfloat16 where the processor multiplies in it, else float32."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: hold the linear layers of the frozen base in four bits each (QLoRA)."""
    dense: tuple[Text, ...] = ()
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
    eval_steps: Whole | None = None
    """Optimiser steps from one evaluation on dev to the next. Default: an epoch."""
    save_steps: Whole | None = None
    """Optimiser steps from one checkpoint to the next, besides those of the evaluations."""
    keep_last: Number = 1
    """Newest checkpoints that stay; 0: one while the run is not complete."""
    keep_best: Number = 1
    """Best checkpoints on dev that stay, by the task's first metric and then by the loss."""
    early_stopping: Whole | None = None
    """Evaluations in a row without a better one after which training ends."""
    final: Final = "last"
    """Which adapter is scored on the held-out split and handed on."""
    baseline: bool = False
    """Score the held-out split with the adapter off, too."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Covers the new head, the adapter's start, dropout and the order of the data."""
    limit: Whole | None = None
    """Use only the first N rows of every split."""
    note: str = ""
    """A remark for the run's summary."""
    trackers: tuple[Text, ...] = ()
    """Show the metrics in tensorboard, wandb, mlflow or trackio too."""
    run_dir: Path | None = None
    """Where the run is recorded. Default: runs/TIME-METHOD."""
    settings: C
    """The method's own settings."""

    def __post_init__(self) -> None:
        values = {name: value for name, value in vars(self).items() if name != "settings"}
        try:
            _schema().model_validate(values, strict=True)
        except ValidationError as problem:
            error = problem.errors(include_url=False)[0]
            field, *inner = map(str, error["loc"])
            within = "".join(f"[{key}]" for key in inner)
            found = f"found {documents.shown(error['input'])}."
            raise SettingError(field, f"{within} {wanted(error)}, {found}".lstrip()) from None
        object.__setattr__(self, "method", recordable(self.method))
        if len(self.labels) == 1:
            raise SettingError("labels", f"must be two at least, found {self.labels!r}.")
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
    """The flags of lora train. Those that are no setting of a run are taken before the others are
    read; here they have their place in --help."""

    config: Path | None = None
    """A TOML file of flags, by their names with _ for -. What the command line says wins."""
    resume: Path | None = None
    """Resume a run that was interrupted, with its own settings. Only --base and --method go with
    it, to say where those files are now, and --nproc."""
    nproc: int | None = None
    """Train on so many processes of this machine; torchrun -m lora train on those of several."""


@functools.cache
def _schema() -> type[BaseModel]:
    """What pydantic holds the fields to, as they are annotated."""
    hints = get_type_hints(RunConfig, include_extras=True)
    kinds: dict[str, Any] = {name: (kind, ...) for name, kind in hints.items()}
    del kinds["settings"]  # its own class sees to it
    return create_model("RunFields", **kinds)


def config_of_method(name: Any) -> type[MethodConfig]:
    """The Config of the method that --method means. Raises ConfigError if one of its fields is
    called as a flag that every run has."""
    kind = method_named(name).Config
    if both := {*declared(kind)} & ({*declared(TrainFlags)} - {"settings"}):
        raise ConfigError(
            f"{kind.__name__} has a field {min(both)}, which is a flag of every run. Rename the"
            " field."
        )
    return kind


def field_names() -> set[str]:
    """The names of all fields that are flags of a run, of any method."""
    kinds: list[Any] = [RunConfig, *(method.Config for method in METHODS.values())]
    names = {field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)}
    return names - {"settings"}


def parse_run(arguments: Sequence[str], prog: str = "lora train") -> RunConfig[Any]:
    """The configuration that a command line, with `--config FILE` in it, asks for.

    Raises ConfigError if a flag or a file is refused.
    """
    path, rest = split_config(arguments)
    table = read_toml(path) if path else {}
    if folder := value_of(rest, "--adapter"):
        table["adapter"] = folder
    with stated_in(path):
        method = table.get("method")
        if method is not None:
            method_named(method)
    method = value_of(rest, "--method") or method
    if method is not None:
        method_named(method)  # first: an adapter's file may be of a method in a file of the user's
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
    """The method of the adapter that training starts from, its settings, and the table with both
    and with its base. What the table states itself stays. Raises ConfigError."""
    folder = str(table["adapter"])
    adapter_method, filed = method_and_config(folder)
    filed = _plain_name_is_a_name(filed)
    if method is not None and method_named(method) is not adapter_method:
        raise ConfigError(
            f"--method {method}: the adapter in {folder} is of {adapter_method.name}. Leave"
            " --method out."
        )
    base = base_in(settings_in(find_folder(folder)))
    settings = {field.name: getattr(filed, field.name) for field in fields(filed)}
    known = ({"base": base} if base else {}) | settings
    return method or adapter_method.name, filed, known | table


def _check_as_filed(config: RunConfig[Any], filed: MethodConfig) -> None:
    """Raise ConfigError if a flag asks for another setting than the adapter's file states."""
    for field in fields(filed):
        asked, stated = getattr(config.settings, field.name), getattr(filed, field.name)
        if asked != stated:
            raise ConfigError(
                f"{as_flag(field.name)} {asked}: the adapter in {config.adapter} has {stated}."
                " Remove it."
            )


def _with_flags(start: RunConfig[Any], arguments: Sequence[str], prog: str) -> RunConfig[Any]:
    """The configuration with what the command line's flags change in it."""
    # For a dict that is not empty tyro makes a flag per key instead of one flag.
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
    """tyro.cli, a ConfigError of ours raised as it is; a list's flag may be given several times.

    What tyro itself refuses it reports on stderr, and leaves by SystemExit 2; --help by 0.
    """
    kinds = [get_origin(kind) or kind, *get_args(kind)]
    known = {name: its for one in kinds for name, its in declared(one).items()}
    known.pop("settings", None)
    if not more.get("return_unknown_args"):
        _check_flags(arguments, known, prog)
    several = {name for name, its in known.items() if is_list(its) or get_origin(its) is dict}
    given = _joined(arguments, several)
    report = io.StringIO()
    try:
        with redirect_stderr(report):
            return tyro.cli(kind, args=given, prog=prog, **more)
    except SystemExit as stop:
        # tyro reports a ValueError of a field's value, ours among them, in a box of its own.
        behind: BaseException | None = stop
        while behind is not None and not isinstance(behind, ConfigError):
            behind = behind.__cause__ or behind.__context__
        if behind is not None:
            raise behind from None
        sys.stderr.write(report.getvalue())
        raise


def _flag(argument: str) -> str | None:
    """The field that an argument is the flag of, None if it is a value."""
    found = re.match(r"--?([A-Za-z][^=]*)", argument)
    return found[1].replace("-", "_") if found else None


def _check_flags(arguments: Sequence[str], known: Mapping[str, Any], prog: str) -> None:
    """Raise ConfigError at a flag that the verb does not have."""
    for argument in arguments:
        name = _flag(argument)
        if name is None or argument in ("-h", "--help") or (name in known and argument[1] == "-"):
            continue
        if name.startswith("no_") and known.get(name[3:]) is bool and argument[1] == "-":
            continue
        flag, names = argument.partition("=")[0], {*known, *BEFORE.get(prog, ())}
        having = [m for m, method in METHODS.items() if name in declared(method.Config)]
        if having and "method" in known:
            said = f"It is of --method {', '.join(having)}. Pass one of them, or remove it."
        elif name in known:
            said = f"Did you mean {as_flag(name)}?"
        else:
            said = hint(name.lower(), names, as_flag)
        raise ConfigError(f"{flag} is no flag of {prog}. {said} See {prog} --help.")


def _joined(arguments: Sequence[str], several: Collection[str]) -> list[str]:
    """The arguments, the flag of a list that is given several times given once, with all values."""
    counts = Counter(filter(None, map(_flag, arguments)))
    values: dict[str, list[str]] = {n: [] for n in several if counts[n] > 1}
    rest: list[str] = []
    into = rest
    for argument in arguments:
        name = _flag(argument)
        if name is not None:
            into = values.get(name, rest)
        if into is rest or name is None:
            into.append(argument)
        elif "=" in argument:
            into.append(argument.partition("=")[2])
    return [*rest, *(one for name, found in values.items() for one in (as_flag(name), *found))]


@contextmanager
def stated_in(path: Path | None) -> Iterator[None]:
    """Within, what is wrong with a configuration is said of the file that states it."""
    try:
        yield
    except ConfigError as error:
        raise (error if path is None else FileError(f"{path}: {error}")) from None


def from_table(table: dict[str, Any], method: Any) -> RunConfig[Any]:
    """The configuration that a TOML table states for a method. Raises ConfigError."""
    kind = config_of_method(method)
    tables = table.get("methods", {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError(
            f"methods must be tables, found {tables!r}. Write [methods.lora], [methods.full], ..."
        )
    tables = {label(name): its for name, its in tables.items()}
    if strange := set(tables) - set(method_names()):
        raise ConfigError(
            f"[methods.{min(strange)}] is of no method. Found: {', '.join(method_names())}."
        )
    values = {k: v for k, v in table.items() if k not in ("methods", "seeds")}
    values = settings_brought(method) | values
    values |= tables.get(label(method), {}) | {"method": method}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    own = {field.name for field in fields(kind)}
    shared = {field.name for field in fields(RunConfig)} - {"settings"}
    unknown = [key for key in values if key not in own | shared]
    if unknown:
        said = hint(unknown[0], own | shared, str)
        raise ConfigError(f"{unknown[0]} is no key of a {method} run. {said}")
    for name in ("text_column", "pair_column", "label_column"):
        if type(values.get(name)) is int:
            values[name] = str(values[name])
    if isinstance(values.get("data"), str):
        values["data"] = (values["data"],)
    for name in ("run_dir", "adapter"):
        if isinstance(values.get(name), str):
            values[name] = Path(values[name])
    settings = kind(**{k: v for k, v in values.items() if k in own})
    shared_values = {k: v for k, v in values.items() if k in shared}
    return RunConfig(settings=_plain_name_is_a_name(settings), **shared_values)


def named(source: str) -> tuple[str, str]:
    """The name and the place of one of --data: NAME=PLACE, or the place's last part."""
    name, sign, place = source.partition("=")
    if sign and place and re.fullmatch(r"[\w.-]+", name) and not os.path.exists(source):
        return name, place
    return Path(source).stem if Path(source).suffix else Path(source).name, source


def placed(source: str) -> str:
    """The same with a file or folder by its whole path, so that it is found from anywhere."""
    _, place = named(source)
    if place in BUILT_IN or not os.path.exists(place):
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
    """Returns the table of a TOML file. Raises ConfigError."""
    with readable(path, ConfigError):
        text = path.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits too
        raise ConfigError(f"{path} cannot be read: {error}. Mend it, or pass another.") from None


def to_table(config: RunConfig[Any]) -> dict[str, Any]:
    """The configuration as a TOML table that reads back to the same; None is left out."""
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
