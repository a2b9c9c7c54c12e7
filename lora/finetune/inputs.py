"""Reads the data of a run's configuration and makes the model's inputs: corpus and token ids."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora.errors import ConfigError, DataError
from lora.finetune.classes import check_names, class_weights
from lora.finetune.config import RunConfig
from lora.finetune.data import conversations, tokens
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import Conversation, grouped
from lora.finetune.data.corpus import Corpus, examples_of, read_examples
from lora.finetune.data.encoding import encode, encode_pairs, prompt_ids, refuse
from lora.finetune.data.included import (
    MADE,
    included_texts,
    is_included,
    named,
    resolved,
)
from lora.finetune.data.previews import preview
from lora.finetune.data.rows import SPLITS, BadRows
from lora.finetune.data.templates import Template, template_of
from lora.finetune.data.tokens import IGNORED, Encoded, batches, collate, drawn, layout
from lora.finetune.data.turns import text_around_turns
from lora.finetune.methods import method_named
from lora.finetune.models import Base, check_ids
from lora.interop.answers import AnswerFormat
from lora.method import Calibrated


def read_corpus(config: RunConfig[Any]) -> Corpus:
    """Returns the data set of a configuration. Raises DataError, ConfigError."""
    task = config.task
    # Column and label flags are for classification and regression, so they rule out --task text.
    has_columns = columns_in(config) != Columns() or config.labels
    if task == "auto" and not has_columns and any(map(_conversational, config.data)):
        task = "text"
    if task == "text":
        return _texts(config)
    if len(config.data) > 1:
        raise ConfigError(
            f"--data has {len(config.data)} data sets, but only --task text takes more than one."
            " Pass one, or set --task text."
        )
    parts = config.labels, row_limits(config), config.skip_bad_lines
    corpus = read_examples(config.data[0], columns_in(config), task, *parts)
    if corpus.task != "classification":
        return corpus
    check_names(config.class_names, corpus.labels)
    weights = class_weights(config, corpus)
    return replace(corpus, class_names=config.class_names, class_weights=weights)


def row_limits(config: RunConfig[Any]) -> dict[str, int | None]:
    """Returns the most rows of each split to use; None is all."""
    limits = {"train": None, "dev": config.dev_limit, "test": config.test_limit}
    return {split: config.limit if n is None else n for split, n in limits.items()}


def columns_in(config: Any) -> Columns:
    """Returns the column flags of a configuration."""
    return Columns(config.text_column, config.pair_column, config.label_column, config.header)


def _conversational(source: str) -> bool:
    """True if a source of --data holds conversations."""
    _, place = named(source)
    if is_included(place):
        return place.startswith(MADE)
    try:
        return conversations.holds_conversations(place)
    except DataError:  # the reader of labelled texts reads the source, or reports its own error
        return False


def _texts(config: RunConfig[Any]) -> Corpus:
    """Returns the conversations of all data sets of a configuration, concatenated."""
    joined: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    notes, names, bad = [], [], BadRows(config.skip_bad_lines)
    limits = row_limits(config)
    for source in map(resolved, config.data):
        name, place = named(source)
        # One `bad` for all, so that --skip-bad-lines counts over the whole of --data.
        splits, source_notes = _read(place, name, bad)
        names.append(name)
        notes += source_notes
        for split, rows in splits.items():
            joined[split] += rows[: limits[split]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--data: two are called {twice}. Write NAME=SOURCE for one of them.")
    if unknown := set(config.weights) - set(names):
        raise ConfigError(
            f"--weights {min(unknown)}: --data has no such name, found {', '.join(names)}."
        )
    train, dev, test = (tuple(joined[split]) for split in ("train", "dev", "test"))
    return Corpus(
        " ".join(config.data), "text", (), train, dev, test, notes=tuple(notes),
        tasks=tuple(names), bad=bad,
    )  # fmt: skip


def read_texts(source: str, split: str | None, skip_bad_lines: int = 0) -> tuple[Corpus, str]:
    """Returns a Corpus with one split of conversations to evaluate on, and the split's name.

    split: default is test, or else dev, or train.
    """
    name, place = named(resolved(source))
    bad = BadRows(skip_bad_lines)
    if is_included(place):
        splits, _ = _read(place, name, bad)
        chosen = split or "test"
        rows = splits[chosen]
    else:
        rows, chosen = conversations.read_one_split(place, name, split, bad)
    by_split = {each: tuple(rows) if each == chosen else () for each in SPLITS}
    parts = by_split["train"], by_split["dev"], by_split["test"]
    return Corpus(source, "text", (), *parts, tasks=(name,), bad=bad), chosen


def _read(place: str, name: str, bad: BadRows) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Returns the splits of one source, included or the user's, and notes for the user."""
    if is_included(place):
        return included_texts(place, name), []
    return conversations.read_conversations(place, name, bad)


@dataclass(frozen=True)
class Inputs:
    """A corpus with its token ids."""

    corpus: Corpus  # without the rows that the template refuses
    splits: dict[str, Encoded]
    notes: tuple[str, ...] = ()  # for the user


def inputs_of(config: RunConfig[Any], corpus: Corpus, base: Base) -> Inputs:
    """Returns the token ids of all splits, for training.

    Raises DataError if more rows are unusable than --skip-bad-lines allows, or if a prompt to
    answer after training leaves no room for the answer: better now than when training is done.
    """
    splits = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
    encoded, lines = {}, []
    for name, examples in splits.items():
        if examples:
            encoded[name], notes = encoded_of(config, corpus, base.tokenizer, base.model, examples)
            lines += [f"{name}: {note}" for note in notes]
    if corpus.task == "text":
        corpus, skipped = screened(corpus)
        lines = skipped + lines
        encoded["train"] = _mixed(config, corpus, encoded["train"])
        if later := asked_of(config, corpus, corpus.held_out[1]):
            ids, _ = prompts_of(config, base.tokenizer, base.model, later)
            check_positions(base.model, ids, config.max_new_tokens)
    return Inputs(corpus, encoded, tuple(lines))


def screened(corpus: Corpus) -> tuple[Corpus, list[str]]:
    """Returns a corpus of texts without its unusable rows, and a note that lists them.

    Call it after encoding, which adds the rows that the template refuses. Raises DataError if they
    are more than --skip-bad-lines allows, or if a split has no other row.
    """
    before = corpus.train, corpus.dev, corpus.test
    train, dev, test = (tuple(corpus.bad.usable(rows)) for rows in before)
    left = [bool(rows) for rows in (train, dev, test)] == [bool(rows) for rows in before]
    return replace(corpus, train=train, dev=dev, test=test), corpus.bad.judge(left)


def digest(encoded: Encoded) -> str:
    """Returns the SHA-256 of ids and targets. A resumed run compares it.

    The same rows may have other ids: a template may write today's date.
    """
    sha = hashlib.sha256()
    fields = [encoded.fields[name] for name in sorted(encoded.fields)]
    for tensor in (*fields, encoded.offsets, encoded.targets):
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def encoded_of(
    config: RunConfig[Any],
    corpus: Corpus,
    tokenizer: Any,
    model: Any,
    examples: Sequence[Any],
    labelled: bool = True,
) -> tuple[Encoded, list[str]]:
    """Returns the token ids and targets of examples, and notes for the user.

    labelled=False: the examples have no labels, and all targets are 0.
    """
    assert config.max_length is not None
    if corpus.task != "text":
        targets = corpus.targets(examples) if labelled else [0.0] * len(examples)
        length = config.max_length
        encoded = tokens.tokenize(tokenizer, examples, targets, corpus.task, length)
        check_ids(model, tokenizer, encoded.fields["input_ids"], corpus.source)
        return encoded, []
    template = template_of(tokenizer, config.template)
    decoder = model.config.is_encoder_decoder
    if decoder:
        tensors, counts = encode_pairs(template, examples, config.max_length, corpus.bad)
        # An encoder attends in both directions, so its padding needs a mask. A causal model's
        # padding comes after the text, which never attends to it.
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    else:
        parts = config.max_length, config.loss_on, corpus.bad
        tensors, counts = encode(template, examples, *parts)
    for part in ("input_ids", "labels"):
        check_ids(model, tokenizer, tensors[part], corpus.source)
    numbers = {name: number for number, name in enumerate(corpus.tasks)}
    whole = Encoded(
        fields={name: tensors[name] for name in ("input_ids", "attention_mask") if name in tensors},
        offsets=tensors["offsets"],
        targets=tensors["labels"],
        pad=tokenizer.pad_token_id,
        labels=tensors.get("label_offsets", tensors["offsets"]),
        shown=_shown(model, tensors["labels"], tensors["label_offsets"]) if decoder else None,
        tasks=tuple(numbers[examples[row].task] for row in tensors["rows"].tolist()),
    )
    note = counts.note(config.max_length)
    return whole, [note] if note else []


def _shown(model: Any, labels: Tensor, offsets: Tensor) -> Tensor:
    """Returns the decoder's input ids: the labels shifted right, after its start token."""
    # roll() brings the last label of one example to the start of the next, where the start token
    # then replaces it.
    shown = labels.roll(1)
    shown[offsets[:-1]] = decoder_start(model)
    return shown


def decoder_start(model: Any) -> int:
    """Returns the id that the decoder of an encoder-decoder model starts with."""
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return int(pad if start is None else start)


def _mixed(config: RunConfig[Any], corpus: Corpus, train: Encoded) -> Encoded:
    """Returns the train split with its packing and the share of each data set.

    The shares are proportional to (weight · size) ^ (1 / temperature). Raises ConfigError if a data
    set gets no example in an epoch.
    """
    if config.packing:
        train = replace(train, row=config.max_length)
    if not config.weights and config.temperature == 1:
        return train
    sizes = [train.tasks.count(number) for number in range(len(corpus.tasks))]
    raised = [
        (config.weights.get(name, 1.0) * size) ** (1 / config.temperature)
        for name, size in zip(corpus.tasks, sizes, strict=True)
    ]
    mixed = replace(train, shares=tuple(weight / sum(raised) for weight in raised))
    least, name = min(zip(tokens.parts_of(sum(sizes), mixed.shares), corpus.tasks, strict=True))
    if least < 1:
        raise ConfigError(
            f"--weights leave {name} without an example in an epoch. Raise its weight."
        )
    return mixed


def calibration(
    config: RunConfig[Any], encoded: Encoded, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """Returns the first 8 train batches, with labels as the model's own forward takes them.

    None if the method does not initialise from data.
    """
    method = method_named(config.method)
    if not issubclass(method, Calibrated) or not method.needs_batches(config.settings):
        return None
    # The batches of epoch 0, so that an init sees what the first steps will see.
    rows = drawn(encoded, config.seed, 0)
    order = batches(encoded.lengths, config.batch_size, config.seed, 0, rows)[:8]
    with_labels = []
    for rows in order:
        batch, targets = collate(encoded, layout(encoded, rows), device)
        with_labels.append({**batch, "labels": _model_labels(encoded, batch, targets)})
    return with_labels


def _model_labels(encoded: Encoded, batch: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Returns labels in transformers' form: (rows, length), IGNORED where nothing is learned."""
    if encoded.labels is None:
        return targets
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    labels = torch.full_like(ids, IGNORED).flatten()
    labels[targets[0]] = targets[1]
    labels = labels.view_as(ids)
    # Our labels are shifted by one already. transformers' causal models shift them themselves, so
    # shift them back.
    return labels if encoded.shown is not None else labels.roll(1, dims=-1)


def prompts_of(
    config: RunConfig[Any], tokenizer: Any, model: Any, asked: Sequence[Conversation]
) -> tuple[list[list[int]], tuple[int | str, ...]]:
    """Returns the prompt ids of each conversation, and what ends an answer: ids, and a text if the
    template ends a turn in words."""
    template = template_of(tokenizer, config.template)
    has_encoder: bool = model.config.is_encoder_decoder
    prompts = prompt_ids(template, asked, has_encoder)
    for conversation, ids in zip(asked, prompts, strict=True):
        check_ids(model, tokenizer, ids, conversation.place)
    words = [template.stop_text] if template.stop_text else []
    return prompts, (*ends_of(template, model.generation_config), *words)


def thought_end(config: RunConfig[Any], tokenizer: Any) -> str:
    """Returns the text between a model's reasoning and its answer; "" if the template has none."""
    return template_of(tokenizer, config.template).thought_end


def ends_of(template: Template, base: Any) -> tuple[int, ...]:
    """Returns the ids that end an answer: the template's, then those of the generation config."""
    return tuple(dict.fromkeys((*template.stops, *_eos_ids(base))))


def _eos_ids(generation: Any) -> list[int]:
    """Returns eos_token_id of a generation config as a list; it may be a number, a list or None."""
    ids = generation.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else [*ids]


def set_answer_format(config: RunConfig[Any], tokenizer: Any, model: Any) -> None:
    """Sets the run's template and end tokens in the tokenizer and the model's generation config.

    Then generate() and apply_chat_template() of transformers do the same as the run.
    """
    template = template_of(tokenizer, config.template)
    model.generation_config.eos_token_id = [*ends_of(template, model.generation_config)]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if template.jinja is not None:
        tokenizer.chat_template = template.jinja


def answer_format(config: RunConfig[Any], tokenizer: Any, generation: Any) -> AnswerFormat:
    """Returns what another engine must know to answer as a run does.

    tokenizer, generation: the base's tokenizer and generation config.
    """
    template, base_template = template_of(tokenizer, config.template), tokenizer.chat_template
    ids = ends_of(template, generation)
    known = {tokenizer.eos_token_id, *_eos_ids(generation)}
    return AnswerFormat(
        end_tokens=dict(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)),
        new_end_token=next((token for token in template.stops if token not in known), None),
        generation={**generation.to_diff_dict(), "eos_token_id": [*ids]},
        template=None if template.jinja == base_template else template.jinja,
        turns=text_around_turns(template),
        max_new_tokens=config.max_new_tokens,
        stop_text=template.stop_text,
    )


def asked_of(
    config: RunConfig[Any], corpus: Corpus, examples: Sequence[Conversation]
) -> list[Conversation]:
    """Returns the prompts of a split to answer: the first `config.answered` of each data set."""
    prompts: list[Conversation] = []
    for name in corpus.tasks:
        merged = grouped(c for c in examples if c.task == name and c.references)
        prompts += merged[: config.answered]
    return prompts


def check_positions(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raises DataError if a prompt has no token, or prompt and answer exceed the model's positions.

    new: the most tokens of an answer. An encoder and its decoder each have all positions.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    lengths = [len(ids) for ids in prompts]
    if not min(lengths):
        raise DataError("a prompt is empty, so there is nothing to continue. Fill it in.")
    if most is None:
        return
    longest = max(lengths)
    left = most if model.config.is_encoder_decoder else most - longest
    if longest > most or new > left:
        advice = "Shorten it; in training, --answered N answers only the first N prompts, 0 none."
        if longest <= most and left:
            advice = f"Set --max-new-tokens {left}, or shorten it."
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for {new} new ones in the model's {most}"
            f" positions. {advice}"
        )


def corpus_to_show(config: RunConfig[Any]) -> Corpus:
    """Returns the data set of a configuration to print. Texts without labels imply --task text."""
    try:
        return read_corpus(config)
    except DataError:
        # The base demo labels texts only, so the error about the labels is the one that helps.
        if config.task != "auto" or len(config.data) > 1 or config.base == "demo":
            raise
        # If neither reading works, the first error is the better one.
        with suppress(DataError):
            corpus = read_corpus(replace(config, task="text"))
            if not corpus.bad.count:
                advice = "to train on these texts, set --task text"
                return replace(corpus, notes=(advice, *corpus.notes))
        raise


def show_labelled(corpus: Corpus, split: str, count: int) -> None:
    """Prints the columns in use, the rows of each class, and the first examples."""
    for line in corpus.summary:
        print(f"data: {line}")
    for line in corpus.notes:
        print(f"note: {line}")
    for example in examples_of(corpus, split)[:count]:
        pair = "" if example.pair is None else f" | {example.pair}"
        print(f"{example.place}: {example.label}: {example.text}{pair}")


def show(config: RunConfig[Any], corpus: Corpus, base: Base, split: str, count: int) -> None:
    """Prints the first examples of each data set token by token. The config must be resolved."""
    assert config.max_length is not None
    template = template_of(base.tokenizer, config.template)
    for name in SPLITS:
        refuse(template, getattr(corpus, name), config.loss_on, corpus.bad)
    corpus, notes = screened(corpus)
    for line in (*corpus.notes, *notes):
        print(f"note: {line}", file=sys.stderr)
    examples = examples_of(corpus, split)
    for name in corpus.tasks:
        if rows := [conversation for conversation in examples if conversation.task == name]:
            preview(template, rows, config.max_length, config.loss_on, count)
