"""Builds a trainable model from a configuration: the base, the added tokens, and the adapter.

build_base(config, ...)             the base as configured
resolve(config, corpus, base, ...)  the configuration with every "auto" and default decided
add_adapter(config, base, ...)      the base with a new adapter, or with one from a folder
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora.adapter_file import filed_labels, find_folder, read_tensors
from lora.card import heads_of, name_classes
from lora.checkpoint import load, rows_filed
from lora.errors import ConfigError, DataError, ModelError, RunError, command
from lora.finetune import distributed
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.included import (
    absolute_source,
    common_metrics,
    metrics_of_answers,
    recorded_source,
)
from lora.finetune.data.templates import TEMPLATES
from lora.finetune.flags import as_flag
from lora.finetune.inputs import asked_of
from lora.finetune.memory import pick_dtype
from lora.finetune.methods import method_named
from lora.finetune.metrics import METRICS, OF_TOKENS
from lora.finetune.models import Base, load_base, load_tokenizer
from lora.finetune.quantized import packable
from lora.injection import inject
from lora.interop.pretrained import read_tokenizer
from lora.layers import inside
from lora.method import Calibrated, Packs
from lora.report import Report
from lora.settings import PartialConfig
from lora.vocabulary import add_tokens, resize, rows_of


def build_base(
    config: RunConfig[Any],
    labels: tuple[str, ...],
    task: str,
    on_quantized: Callable[[int, int], None] = lambda done, layers: None,
    sharded: bool = False,
    adapter: Path | None = None,
) -> Base:
    """The base as configured, without an adapter.

    `on_quantized` is called after each layer that is quantized. With `sharded` each rank loads its
    part alone, if the configuration shards. `adapter` is the folder of an adapter whose tokens the
    base is to have.
    """
    quantize = "none" if quantizes_later(config) else config.quantize
    shards = sharded and (config.shard or config.offload)
    part = (distributed.rank(), distributed.size()) if shards else None
    base = load_base(
        config.base, len(labels) or 1, task, config.seed, quantize, config.dense, on_quantized, part
    )
    if labels:
        name_classes(base.model, labels, config.class_names)
    return with_tokens(base, config, task, adapter)


def starts_on_device(config: RunConfig[Any]) -> bool:
    """True if the initial values come from batches or from a decomposition of each weight. The base
    is then in float32 on the device, since the CPU would take minutes."""
    method = method_named(config.method)
    by_batches = issubclass(method, Calibrated) and method.needs_batches(config.settings)
    by_weights = issubclass(method, Packs) and method.takes_up(config.settings)
    return config.adapter is None and (by_batches or by_weights)


def quantizes_later(config: RunConfig[Any]) -> bool:
    """True if the base is quantized under the new adapter, whose start needs the full weights."""
    method = method_named(config.method)
    needs_full_base = issubclass(method, Packs) and method.takes_up(config.settings)
    return needs_full_base and config.quantize == "nf4"


def resolve(
    config: RunConfig[Any], corpus: Corpus, base: Base, device: torch.device
) -> tuple[RunConfig[Any], str]:
    """The configuration with everything decided, and a note for the user ("" if there is none).

    Paths become absolute, so that the run can be reopened from anywhere.
    """
    settings = _with_added_tokens(config.settings, config.method, base.added)
    settings, note = _with_new_head(settings, config, base)
    max_length = _max_length(config, corpus, base)
    _check_settings(config, corpus, base)
    if config.adapter is not None and not config.resize_embeddings:
        _check_tokenizer(config.adapter, base)
    template = _template(config, corpus, base)
    resolved = replace(
        config,
        learning_rate=config.learning_rate or method_named(config.method).learning_rate,
        task=corpus.task,
        labels=corpus.labels,
        text_column=corpus.columns.text,
        pair_column=corpus.columns.pair,
        label_column=corpus.columns.label,
        adapter=config.adapter.resolve() if config.adapter else None,
        settings=settings,
        max_length=max_length,
        base=absolute_source(config.base),
        data=tuple(map(recorded_source, config.data)),
        unrelated_text=config.unrelated_text and recorded_source(config.unrelated_text),
        template=template if template in TEMPLATES else absolute_source(template),
        dtype=pick_dtype(device) if config.dtype == "auto" else config.dtype,
    )
    return resolved, note


def _with_new_head(settings: Any, config: RunConfig[Any], base: Base) -> tuple[Any, str]:
    """The settings with a head of fresh weights in modules_to_save, under PEFT's names, so that
    PEFT reads the file; and a note about it."""
    if not isinstance(settings, PartialConfig) or config.adapter is not None or not base.new:
        return settings, ""
    heads = heads_of(base.model)
    others = [
        name
        for name in (*settings.modules_to_save, *base.new)
        if not any(inside(name, head) for head in heads)
    ]
    settings = replace(settings, modules_to_save=tuple(dict.fromkeys((*others, *heads))))
    names = ", ".join(settings.modules_to_save)
    return (
        settings,
        f"new head: {names} will be trained in full and saved with the adapter (modules_to_save)",
    )


def _max_length(config: RunConfig[Any], corpus: Corpus, base: Base) -> int:
    """--max-length, or its default: 1024 tokens of a text, 128 else, and no more than the base has
    positions. Raises ConfigError or ModelError if it does not fit."""
    length, special = config.max_length, 0
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if length is None:
        length = 1024 if corpus.task == "text" else 128
        length = length if positions is None else min(length, positions)
    if corpus.task != "text":
        special = base.tokenizer.num_special_tokens_to_add(corpus.train[0].pair is not None)
    if length <= special:
        raise ConfigError(
            f"max_length must leave room beside {special} special tokens, found {length}."
            " Set --max-length."
        )
    if positions is not None and length > positions:
        raise ModelError(
            f"--max-length {length}: {config.base} has {positions} positions. Lower it."
        )
    return length


def _template(config: RunConfig[Any], corpus: Corpus, base: Base) -> str:
    """--template; "auto" becomes "none" if the data is plain text, or single prompts and answers
    for an encoder-decoder without a chat template (T5, BART). Prompts of a later `lora generate`
    are then written in the same way."""
    if config.template != "auto" or corpus.task != "text":
        return config.template
    no_turns = base.model.config.is_encoder_decoder and not base.tokenizer.chat_template
    plain = all(row.raw or (no_turns and len(row.messages) < 3) for row in corpus.train)
    return "none" if plain else "auto"


def _check_settings(config: RunConfig[Any], corpus: Corpus, base: Base) -> None:
    """Raise ConfigError if a setting has no effect in this task, or with this method."""
    if config.baseline and not method_named(config.method).keeps_base:
        raise ConfigError(
            f"--baseline scores the base after training, and --method {config.method} changes it."
            " Remove it, or set another method; in a comparison, set baseline = true in"
            " [methods.NAME] of a method that has an adapter."
        )
    known = _metrics(config, corpus)
    if config.metric and config.metric not in known:
        raise ConfigError(
            f"--metric {config.metric}: this run's metrics are {', '.join(known)}. Pass one of"
            " them."
        )
    if corpus.task != "text":
        _check_defaults(config, f"--task {corpus.task}", {
            "template": "auto", "loss_on": "answers", "packing": False, "weights": {},
            "temperature": 1, "answered": None, "unrelated_text": None,
        })  # fmt: skip
    if corpus.task != "classification":
        _check_defaults(config, f"--task {corpus.task}", {
            "class_names": (), "class_weights": {}, "label_smoothing": 0,
        })  # fmt: skip
    if corpus.task != "text":
        return
    _check_defaults(config, "--task text", {
        "text_column": None, "pair_column": None, "label_column": None, "header": "auto",
        "labels": (),
    })  # fmt: skip
    if config.packing and base.model.config.is_encoder_decoder:
        raise ConfigError("--packing does not work with encoder-decoder models. Remove it.")
    if config.loss_on == "all" and base.model.config.is_encoder_decoder:
        raise ConfigError(
            "--loss-on all does not work with encoder-decoder models: an encoder predicts no text."
            " Remove it."
        )


def _metrics(config: RunConfig[Any], corpus: Corpus) -> list[str]:
    """Returns the metrics that the run will have on the held-out split."""
    if corpus.task != "text":
        return [*METRICS[corpus.task]]
    if not asked_of(config, corpus, corpus.held_out[1]):
        return [*OF_TOKENS]
    own = common_metrics(metrics_of_answers(config.data), corpus.tasks)
    return [*dict.fromkeys((*METRICS["text"], *OF_TOKENS, *own))]


def _check_defaults(config: RunConfig[Any], task: str, defaults: dict[str, Any]) -> None:
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ConfigError(f"{as_flag(name)} has no effect with {task}. Remove it.")


def resized_for(config: RunConfig[Any]) -> Path | None:
    """The folder of the adapter for whose tokens --resize-embeddings resizes the base, if any."""
    return config.adapter if config.resize_embeddings else None


def with_tokens(base: Base, config: RunConfig[Any], task: str, adapter: Path | None) -> Base:
    """The base with the tokens of the adapter in a folder (its embeddings resized, and with the
    adapter's tokenizer), and then with those of --add-tokens."""
    if adapter is not None:
        rows = rows_filed(base.model, adapter)
        if rows not in (None, rows_of(base.model)):
            resize(base.model, rows)
        folder = _tokenizer_for(adapter, config)
        if folder is not None:
            base = replace(base, tokenizer=load_tokenizer(str(folder), base.model, task))
    if config.add_tokens:
        whole = getattr(config.settings, "modules_to_save", ())
        added = add_tokens(base.model, base.tokenizer, config.add_tokens, whole)
        base = replace(base, added=added)
    return base


def _tokenizer_for(adapter: Path, config: RunConfig[Any]) -> Path | None:
    """The folder of an adapter's tokenizer, None if none was saved beside it.

    A checkpoint has none: it uses the tokenizer of the adapter that its run started from. Raises
    RunError if that adapter does not exist any more.
    """
    folder, start = _tokenizer_beside(adapter), resized_for(config)
    if folder is not None or start is None:
        return folder
    if not start.is_dir():
        raise RunError(
            f"{adapter} has no tokenizer beside it, and the adapter that its run started from,"
            f" {start}, does not exist any more. Restore it."
        )
    return _tokenizer_beside(start)


def _tokenizer_beside(adapter: Path) -> Path | None:
    folders = (find_folder(adapter), adapter)
    return next((path for path in folders if (path / "tokenizer_config.json").is_file()), None)


def _with_added_tokens(settings: Any, method: str, added: dict[str, list[int]]) -> Any:
    """A method's settings with the rows of the added tokens trainable. Raises ConfigError if the
    method cannot train single rows."""
    if not added or not method_named(method).keeps_base:  # without a frozen base all rows train
        return settings
    if not hasattr(settings, "trainable_token_indices"):
        raise ConfigError(
            f"--add-tokens: {method} trains no rows of embeddings. Set --method lora, dora or full."
        )
    result = replace(settings, trainable_token_indices=added)
    if settings.trainable_token_indices and settings != result:
        raise ConfigError(
            "--add-tokens cannot be combined with --trainable-token-indices. To train rows of known"
            " tokens too, name them in --add-tokens: a known token is not added again."
        )
    return result


def add_adapter(config: RunConfig[Any], base: Base, batches: Any = None) -> Report:
    """Put a new adapter on the base, or load the one of --adapter for further training.

    The base is quantized here if it had to wait for the adapter's initial values. `batches` are for
    those that need data.
    """
    if config.adapter is not None:
        return _load_adapter(config.adapter, config, base)
    layers = packable(base.model, config.dense) if quantizes_later(config) else ()
    return inject(base.model, config.settings, seed=config.seed, batches=batches, pack=layers)


def _load_adapter(folder: Path, config: RunConfig[Any], base: Base) -> Report:
    """Load an adapter to train it further. Raises ModelError or DataError if its head does not
    match the task."""
    report = load(base.model, folder, trainable=True, resize_embeddings=config.resize_embeddings)
    check_head(base, report, config.base, folder)
    labels = filed_labels(read_tensors(find_folder(folder))[1])
    if labels and config.labels and labels != config.labels:
        raise DataError(
            f"--adapter {folder} was trained on the labels {', '.join(labels)}, found"
            f" {', '.join(config.labels)}. Pass {command('--labels', *labels)}, or data with those"
            " labels."
        )
    return report


def check_head(base: Base, report: Report, base_name: str, folder: Path) -> None:
    """Raise ModelError if neither the base nor the adapter has weights for the head."""
    missing = [new for new in base.new if not any(inside(new, p) for p in report.plan.saved)]
    if missing and isinstance(report.plan.config, PartialConfig):
        raise ModelError(
            f"{folder}: the base {base_name} has no weights for {missing[0]}, and the adapter"
            " brings none. Pass a --base that has its head, or an adapter with modules_to_save."
        )


def _check_tokenizer(adapter: Path, base: Base) -> None:
    """Raise ConfigError if the tokenizer beside an adapter has tokens that its base's lacks: the
    adapter would be trained with other ids than it has learned."""
    folder = _tokenizer_beside(adapter)
    if folder is None:
        return
    known = base.tokenizer.get_vocab()
    vocabulary = read_tokenizer(str(folder)).get_vocab()
    other = [token for token, number in vocabulary.items() if known.get(token) != number]
    if other:
        shown = ", ".join(map(repr, sorted(other, key=vocabulary.__getitem__)[:5]))
        raise ConfigError(
            f"--adapter {adapter}: its tokenizer has {len(other)} tokens that the base's lacks or"
            f" numbers otherwise ({shown}). Pass --resize-embeddings to take the adapter's."
        )
