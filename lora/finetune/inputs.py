"""From a configuration's data to what a model is given: a corpus, and every split's token ids."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora.errors import ConfigError, DataError
from lora.finetune.config import RunConfig, named
from lora.finetune.data import conversations, tokens
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import Conversation, grouped
from lora.finetune.data.corpus import Corpus, examples_of, read_examples
from lora.finetune.data.encoding import encode, encode_pairs, prompt_ids, refuse
from lora.finetune.data.messages import Message
from lora.finetune.data.previews import preview
from lora.finetune.data.rows import SPLITS, BadRows
from lora.finetune.data.templates import Template, template_of
from lora.finetune.data.tokens import IGNORED, Encoded, batches, collate, drawn, layout
from lora.finetune.demo import tasks
from lora.finetune.methods import method_named
from lora.finetune.models import Base, check_ids, writing_parts
from lora.interop.export import Ends
from lora.method import Calibrated

MADE = "tasks/"  # before the name of a task of lora.finetune.demo.tasks


def read_corpus(config: RunConfig[Any]) -> Corpus:
    """The data set that a configuration asks for."""
    task = config.task
    named_so = asked(config) != Columns() or config.labels  # as of no text that is to be written
    if task == "auto" and not named_so and any(map(_conversational, config.data)):
        task = "text"
    if task == "text":
        return _texts(config)
    if len(config.data) > 1:
        raise ConfigError(f"--data takes one data set, {len(config.data)} are of --task text.")
    parts = config.labels, config.limit, config.skip_bad_lines
    return read_examples(config.data[0], asked(config), task, *parts)


def asked(config: Any) -> Columns:
    """What a configuration says of the columns."""
    return Columns(config.text_column, config.pair_column, config.label_column, config.header)


def _conversational(source: str) -> bool:
    _, place = named(source)
    if place == "demo" or place.startswith(MADE):
        return place != "demo"
    try:
        return conversations.holds_conversations(place)
    except DataError:  # which the reader of the other tasks says in its own words, or reads
        return False


def _texts(config: RunConfig[Any]) -> Corpus:
    """The conversations of every data set of a configuration, one after the other."""
    found: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    notes, names, bad = [], [], BadRows(config.skip_bad_lines)
    for source in config.data:
        name, place = named(source)
        splits, said = _read(place, name, bad)
        names.append(name)
        notes += said
        for split, some in splits.items():
            found[split] += some[: config.limit]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--data: two are called {twice}. Write NAME=SOURCE for one of them.")
    if strange := set(config.weights) - set(names):
        raise ConfigError(f"--weights {min(strange)}: no data of that name, of {', '.join(names)}.")
    train, dev, test = (tuple(found[split]) for split in ("train", "dev", "test"))
    return Corpus(
        " ".join(config.data), "text", (), train, dev, test, note="; ".join(notes),
        tasks=tuple(names), bad=bad,
    )  # fmt: skip


def read_texts(source: str, split: str | None, skip_bad_lines: int = 0) -> tuple[Corpus, str]:
    """Conversations to score a trained model on, as the corpus's split of the name returned."""
    name, place = named(source)
    bad = BadRows(skip_bad_lines)
    if place.startswith(MADE):
        splits, _ = _read(place, name, bad)
        there = split or "test"
        found = splits[there]
    else:
        found, there = conversations.read_one_split(place, name, split, bad)
    held = {one: tuple(found) if one == there else () for one in SPLITS}
    parts = held["train"], held["dev"], held["test"]
    return Corpus(source, "text", (), *parts, tasks=(name,), bad=bad), there


def _read(place: str, name: str, bad: BadRows) -> tuple[dict[str, list[Conversation]], list[str]]:
    if not place.startswith(MADE):
        return conversations.read_conversations(place, name, bad)
    made = place.removeprefix(MADE)
    splits = {}
    for split in SPLITS:
        pairs = tasks.generate(made, split)
        splits[split] = [
            Conversation(
                (Message("user", prompt), Message("assistant", answer)), (answer,), name,
                f"{place}, {split} {number}",
            )
            for number, (prompt, answer) in enumerate(pairs, 1)
        ]  # fmt: skip
    return splits, []


def made_metrics(config: RunConfig[Any]) -> dict[str, dict[str, Callable[[str, str], float]]]:
    """By its name the metrics of each data set that is made, (prediction, answer) -> 0 to 1."""
    found = {}
    for name, place in map(named, config.data):
        if place.startswith(MADE):
            metric = tasks.MADE_TASKS[place.removeprefix(MADE)].metric
            own = {} if metric is tasks.exact else {metric.__name__: metric}
            found[name] = {"exact_match": tasks.exact, **own}
    return found


@dataclass(frozen=True)
class Inputs:
    """What a model is given of a corpus."""

    corpus: Corpus  # less the rows that the template refuses
    splits: dict[str, Encoded]
    said: tuple[str, ...] = ()  # what the user is to know of it


def inputs_of(config: RunConfig[Any], corpus: Corpus, base: Base) -> Inputs:
    """Every split's token ids, for training.

    Raises DataError if more rows cannot be used than are to be skipped, or if a prompt that is to
    be answered afterwards leaves no room to.
    """
    splits = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
    found, said = {}, []
    for name, examples in splits.items():
        if examples:
            found[name], notes = encoded_of(config, corpus, base.tokenizer, base.model, examples)
            said += [f"{name}: {note}" for note in notes]
    if corpus.task == "text":
        corpus, skipped = screened(corpus)
        said = skipped + said
        found["train"] = _mixed(config, corpus, found["train"])
        if later := asked_of(config, corpus, corpus.held_out[1]):
            ids, _ = prompts_of(config, base.tokenizer, base.model, later)
            check_positions(base.model, ids, config.max_new_tokens)
    return Inputs(corpus, found, tuple(said))


def screened(corpus: Corpus) -> tuple[Corpus, list[str]]:
    """A corpus of texts, encoded once, without the rows that cannot be used; and a note of them.

    Raises DataError if they are more than are to be skipped, or all.
    """
    before = corpus.train, corpus.dev, corpus.test
    train, dev, test = (tuple(corpus.bad.usable(rows)) for rows in before)
    left = [bool(rows) for rows in (train, dev, test)] == [bool(rows) for rows in before]
    return replace(corpus, train=train, dev=dev, test=test), corpus.bad.judge(left)


def digest(encoded: Encoded) -> str:
    """SHA-256 of what is learned from: a template may write today's date."""
    found = hashlib.sha256()
    fields = [encoded.fields[name] for name in sorted(encoded.fields)]
    for tensor in (*fields, encoded.offsets, encoded.targets):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def encoded_of(
    config: RunConfig[Any],
    corpus: Corpus,
    tokenizer: Any,
    model: Any,
    examples: Sequence[Any],
    labelled: bool = True,
) -> tuple[Encoded, list[str]]:
    """The token ids of some examples, and what the user is to know of them; not `labelled`, with
    targets of no meaning."""
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
        found, counts = encode_pairs(template, examples, config.max_length, corpus.bad)
        found["attention_mask"] = torch.ones_like(found["input_ids"])  # it sees behind the end
    else:
        parts = config.max_length, config.loss_on, corpus.bad
        found, counts = encode(template, examples, *parts)
    for part in ("input_ids", "labels"):
        check_ids(model, tokenizer, found[part], corpus.source)
    numbers = {name: number for number, name in enumerate(corpus.tasks)}
    whole = Encoded(
        fields={name: found[name] for name in ("input_ids", "attention_mask") if name in found},
        offsets=found["offsets"],
        targets=found["labels"],
        pad=tokenizer.pad_token_id,
        labels=found.get("label_offsets", found["offsets"]),
        shown=_shown(model, found["labels"], found["label_offsets"]) if decoder else None,
        tasks=tuple(numbers[examples[row].task] for row in found["rows"].tolist()),
    )
    note = counts.note(config.max_length)
    return whole, [note] if note else []


def _shown(model: Any, labels: Tensor, offsets: Tensor) -> Tensor:
    """What a decoder is shown to predict the labels: those before, after the token it starts by."""
    shown = labels.roll(1)
    shown[offsets[:-1]] = decoder_start(model)
    return shown


def decoder_start(model: Any) -> int:
    """The token that a decoder of its own starts by."""
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return int(pad if start is None else start)


def _mixed(config: RunConfig[Any], corpus: Corpus, train: Encoded) -> Encoded:
    """The training split with its packing, and with the share that each data set has."""
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
        raise ConfigError(f"--weights leave {name} without an example in an epoch. Raise its own.")
    return mixed


def calibration(
    config: RunConfig[Any], encoded: Encoded, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """The first 8 batches of the training, with the labels that the model's own forward takes,
    where the method starts from data."""
    method = method_named(config.method)
    if not issubclass(method, Calibrated) or not method.needs_batches(config.settings):
        return None
    rows = drawn(encoded, config.seed, 0)
    order = batches(encoded.lengths, config.batch_size, config.seed, 0, rows)[:8]
    found = []
    for some in order:
        batch, targets = collate(encoded, layout(encoded, some), device)
        found.append({**batch, "labels": _own_labels(encoded, batch, targets)})
    return found


def _own_labels(encoded: Encoded, batch: dict[str, Tensor], targets: Tensor) -> Tensor:
    """As transformers' models take them: a causal one predicts each from the position before."""
    if encoded.labels is None:
        return targets
    shape = batch.get("decoder_input_ids", batch["input_ids"])
    labels = torch.full_like(shape, IGNORED).flatten()
    labels[targets[0]] = targets[1]
    labels = labels.view_as(shape)
    return labels if encoded.shown is not None else labels.roll(1, dims=-1)


def prompts_of(
    config: RunConfig[Any], tokenizer: Any, model: Any, asked: Sequence[Conversation]
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The ids that a model goes on from to answer each conversation, and those that end an
    answer."""
    template = template_of(tokenizer, config.template)
    encodes: bool = model.config.is_encoder_decoder
    found = prompt_ids(template, asked, encodes)
    for one, ids in zip(asked, found, strict=True):
        check_ids(model, tokenizer, ids, one.place)
    return found, ends_of(template, model.generation_config)


def thought_end(config: RunConfig[Any], tokenizer: Any) -> str:
    """What a model writes between its reasoning and its answer; "" if it is to write none."""
    return template_of(tokenizer, config.template).thought_end


def ends_of(template: Template, base: Any) -> tuple[int, ...]:
    """The ids that end an answer: of the template, and of the base's own generation config."""
    return tuple(dict.fromkeys((*template.stops, *_named(base))))


def _named(generation: Any) -> list[int]:
    """The ids that a generation config names as ends."""
    own = generation.eos_token_id
    return [] if own is None else [own] if isinstance(own, int) else [*own]


def hand_on(config: RunConfig[Any], tokenizer: Any, model: Any) -> None:
    """Give a model and its tokenizer what makes their own generate() and apply_chat_template() do
    as the run does: its template, and all tokens that end an answer."""
    template = template_of(tokenizer, config.template)
    model.generation_config.eos_token_id = [*ends_of(template, model.generation_config)]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if template.jinja is not None:
        tokenizer.chat_template = template.jinja


def export_ends(config: RunConfig[Any], base: str) -> Ends:
    """What ends an answer of a run that writes texts, for those who read its adapter on a base."""
    tokenizer, generation = writing_parts(base)
    template, own = template_of(tokenizer, config.template), tokenizer.chat_template
    ids = ends_of(template, generation)
    known = {tokenizer.eos_token_id, *_named(generation)}
    return Ends(
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        turn=next((token for token in template.stops if token not in known), None),
        generation={**generation.to_diff_dict(), "eos_token_id": [*ids]},
        template=None if template.jinja == own else template.jinja,
    )


def asked_of(
    config: RunConfig[Any], corpus: Corpus, examples: Sequence[Conversation]
) -> list[Conversation]:
    """The prompts of a split that are answered: of each data set the first `config.answered`."""
    found: list[Conversation] = []
    for name in corpus.tasks:
        own = grouped(one for one in examples if one.task == name and one.references)
        found += own[: config.answered]
    return found


def check_positions(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raise DataError where a prompt is of no token, or it and an answer of `new` tokens need more
    positions than the model has; an encoder and its decoder have as many each."""
    most = getattr(model.config, "max_position_embeddings", None)
    lengths = [len(ids) for ids in prompts]
    if not min(lengths):
        raise DataError("a prompt is empty: there is nothing to go on from. Write one.")
    if most is None:
        return
    longest = max(lengths)
    left = most if model.config.is_encoder_decoder else most - longest
    if longest > most or new > left:
        way = "Shorten it; in training, --answered N answers the first N prompts alone, 0 none."
        if longest <= most and left:
            way = f"Set --max-new-tokens {left}, or shorten it."
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for {new} new ones in the model's {most}"
            f" positions. {way}"
        )


def corpus_to_show(config: RunConfig[Any]) -> Corpus:
    """The data set that a configuration asks for; texts without a label are those of --task text,
    also if it does not say so."""
    try:
        return read_corpus(config)
    except DataError:
        if config.task != "auto" or len(config.data) > 1:
            raise
        with suppress(DataError):
            corpus = read_corpus(replace(config, task="text"))
            if not corpus.bad.count:
                return corpus
        raise


def show_labelled(corpus: Corpus, split: str, count: int) -> None:
    """Print what was taken for what, the rows of each class, and the first examples."""
    for line in corpus.said:
        print(f"data: {line}")
    for line in filter(None, [corpus.note]):
        print(f"note: {line}")
    for one in examples_of(corpus, split)[:count]:
        pair = "" if one.pair is None else f" | {one.pair}"
        print(f"{one.place}: {one.label}: {one.text}{pair}")


def show(config: RunConfig[Any], corpus: Corpus, base: Base, split: str, count: int) -> None:
    """Print the first examples of each data set token by token, of a configuration as resolved."""
    assert config.max_length is not None
    template = template_of(base.tokenizer, config.template)
    for name in SPLITS:
        refuse(template, getattr(corpus, name), config.loss_on, corpus.bad)
    corpus, notes = screened(corpus)
    for line in filter(None, (corpus.note, *notes)):
        print(f"note: {line}", file=sys.stderr)
    there = examples_of(corpus, split)
    for name in corpus.tasks:
        if some := [one for one in there if one.task == name]:
            preview(template, some, config.max_length, config.loss_on, count)
