"""For every task: tokenizes a split once, caches the ids, and makes batches of similar length.

tokenize(...)   -> Encoded: the tokens of a split, concatenated
drawn(...)      -> the examples of an epoch; of several tasks, each with its share
batches(...)    -> lists of example indices; a pure function of its arguments
layout(...)     -> the rows of a batch: one example each, or, packed, as many as fit
collate(...)    -> padded tensors (rows, longest row), and the targets
ahead(...)      -> batches, each made while the one before it is in use

The cache has one file per split, tokenizer and settings, in the user's cache folder or in
$LORA_CACHE. All its files may be deleted. A file is used only if its digest is correct. A second
process waits for the one that writes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora.errors import DataError
from lora.files import locked, writable, write_whole
from lora.finetune import cache
from lora.finetune.data.corpus import Example

# Examples tokenized at a time. Their ids are Python integers, which take much memory.
EXAMPLES_AT_ONCE = 10_000
IGNORED = -100  # the label of a position that is not learned; PyTorch's default ignore_index
B = TypeVar("B")


@dataclass(frozen=True)
class Encoded:
    """Token ids and the tokenizer's other fields of a split, with all examples concatenated."""

    fields: dict[str, Tensor]  # input_ids and others, each (tokens,) int32
    offsets: Tensor  # (examples + 1,) int64: the start of each example, and the end of the last
    # Classification: (examples,) int64. Regression: (examples,) float32. Text: the labels of all
    # tokens, (label tokens,) int32, IGNORED if not learned.
    targets: Tensor
    pad: int  # the id of the padding token
    labels: Tensor | None = None  # text: the offsets of each example's labels, as `offsets`
    shown: Tensor | None = None  # (label tokens,) int32: the input ids of a separate decoder
    row: int | None = None  # packing: the most tokens in a row. None: one example per row
    tasks: tuple[int, ...] = ()  # the index of each example's task
    shares: tuple[float, ...] = ()  # the share of each task in an epoch; (): by its size

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return self.offsets.diff().tolist()

    @cached_property
    def counts(self) -> list[int]:
        """What each example adds to the divisor of the loss: 1, or its number of learned tokens."""
        if self.labels is None:
            return [1] * len(self.lengths)
        cumulative = torch.cat([torch.zeros(1, dtype=torch.long), (self.targets >= 0).cumsum(0)])
        return cumulative[self.labels].diff().tolist()


def tokenize(
    tokenizer: Any, examples: Sequence[Example], targets: Sequence[float], task: str, length: int
) -> Encoded:
    """Tokenizes a split, truncating to `length` tokens, or reads its ids from the cache."""
    path = _cache_file(tokenizer, examples, length)
    with _locked(path) as has_lock:
        tensors = _read_cache(path, len(examples)) if path is not None else None
        if tensors is None:
            tensors = _tokenize(tokenizer, examples, length)
            if path is not None and has_lock:
                _write_cache(path, tensors)
    return Encoded(
        fields={name: tensors[name] for name in tensors if name != "offsets"},
        offsets=tensors["offsets"],
        targets=torch.tensor(targets, dtype=torch.float32 if task == "regression" else torch.long),
        pad=tokenizer.pad_token_id,
    )


def _tokenize(tokenizer: Any, examples: Sequence[Example], length: int) -> dict[str, Tensor]:
    """Returns the tokenizer's fields of all examples, concatenated, int32; and offsets, int64."""
    paired = any(example.pair is not None for example in examples)
    parts: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        batch = examples[start : start + EXAMPLES_AT_ONCE]
        encoding = tokenizer(
            [example.text for example in batch],
            [example.pair or "" for example in batch] if paired else None,
            truncation=True,
            max_length=length,
            return_attention_mask=True,  # some tokenizers leave it out by default
        )
        lengths += map(len, encoding["input_ids"])
        for name, rows in encoding.items():
            flat = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int32)
            parts.setdefault(name, []).append(flat)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return {name: torch.cat(tensors) for name, tensors in parts.items()} | {"offsets": offsets}


def _cache_file(tokenizer: Any, examples: Sequence[Example], length: int) -> Path | None:
    """Returns the cache file of these texts; None if a digest cannot cover the tokenizer.

    The name is a digest of all that the ids depend on. A tokenizer without a fast backend, or with
    code from outside transformers, may depend on anything.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None
    backend.no_truncation()  # left over from the tokenizer's last call; each call sets its own
    backend.no_padding()
    settings = {
        "tokenizer": backend.to_str(),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "special": str(tokenizer.special_tokens_map),
        "fields": list(tokenizer.model_input_names),
        "split": tokenizer.split_special_tokens,
        "side": tokenizer.truncation_side,
        "length": length,
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        for text in (example.text, example.pair):
            # The length separates texts: ("ab", "c") and ("a", "bc") have different digests.
            digest.update(b"-" if text is None else f"{len(text)}:{text}".encode())
    return cache.folder() / f"{digest.hexdigest()}.safetensors"


@contextmanager
def _locked(path: Path | None) -> Iterator[bool]:
    """Locks the cache file for this process. Yields False if there can be no cache.

    Two processes that start together would else tokenize the same texts twice.
    """
    descriptor = None
    with ExitStack() as stack:
        if path is not None:
            with suppress(OSError):  # a read-only or full disk, or no home: do without
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = stack.enter_context(locked(path.with_suffix(".lock"), wait=True))
        yield descriptor is not None


def _digest(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _is_complete(tensors: dict[str, Tensor], examples: int) -> bool:
    """True if the tensors have the names, dtypes and sizes that _tokenize() returns."""
    for name, tensor in tensors.items():
        if tensor.dtype != (torch.int64 if name == "offsets" else torch.int32) or tensor.dim() != 1:
            return False
    if not {"offsets", "input_ids"} <= tensors.keys() or len(tensors["offsets"]) != examples + 1:
        return False
    begins, ends = int(tensors["offsets"][0]), int(tensors["offsets"][-1])
    lengths = {len(tensor) for name, tensor in tensors.items() if name != "offsets"}
    return begins == 0 and lengths == {ends} and bool((tensors["offsets"].diff() >= 0).all())


def _read_cache(path: Path, examples: int) -> dict[str, Tensor] | None:
    """Returns the tensors of a cache file, None if it does not exist or is damaged."""
    if not os.path.isfile(path):  # Path.is_file() raises if the folder may not be searched
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):  # KeyError: unknown dtype
        tensors, digest = {}, None
    if digest is None or not _is_complete(tensors, examples) or _digest(tensors) != digest:
        print(f"note: {path} was damaged: the texts are tokenized again.", file=sys.stderr)
        return None
    return tensors


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a cache file. If that fails, prints a note: the cache is optional."""
    try:
        with writable(path, DataError, "Set LORA_CACHE."):
            write_whole(path, safetensors.torch.save(tensors, {"digest": _digest(tensors)}))
    except DataError as error:
        print(f"note: {error}", file=sys.stderr)


def drawn(encoded: Encoded, seed: int, epoch: int) -> list[int]:
    """Returns the example indices of an epoch, as many as the split has.

    With several tasks, each task has its share. It repeats its examples in laps, each in a new
    order, so that no example occurs twice before all have occurred once. A lap may end in the
    middle of an epoch; the next epoch continues it.
    """
    if not encoded.shares:
        return list(range(len(encoded.lengths)))
    indices: list[int] = []
    for task, count in enumerate(parts_of(len(encoded.tasks), encoded.shares)):
        members = [index for index, number in enumerate(encoded.tasks) if number == task]
        begin, end = epoch * count, (epoch + 1) * count  # positions in all laps of this task
        for lap in range(begin // len(members), -(-end // len(members))):
            order = members.copy()
            random.Random(f"{seed}:{task}:{lap}").shuffle(order)
            indices += order[max(0, begin - lap * len(members)) : end - lap * len(members)]
    return indices


def parts_of(total: int, shares: Sequence[float]) -> list[int]:
    """Divides `total` into integers by shares: rounded down, the rest to the largest remainders."""
    exact = [share * total for share in shares]
    parts = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def batches(
    lengths: Sequence[int], size: int, seed: int, epoch: int, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Returns example indices in batches of similar length. A pure function of its arguments.

    The rows (default: all) are shuffled; every 32 batches of them are sorted by length and divided
    into batches; then the batches are shuffled. So padding is small, and batches are still random.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)) if rows is None else rows)
    rng.shuffle(order)
    pool = 32 * size
    batch_list = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda row: lengths[row])
        batch_list += [by_length[i : i + size] for i in range(0, len(by_length), size)]
    rng.shuffle(batch_list)
    return batch_list


def sorted_batches(lengths: Sequence[int], size: int, tokens: int = sys.maxsize) -> list[list[int]]:
    """Returns example indices in batches, the longest first: the order of evaluation.

    A batch has at most `size` examples and at most `tokens` tokens with padding, but at least one
    example. The longest batch comes first, so that too little memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batch_list: list[list[int]] = []
    while order:
        count = max(1, min(size, tokens // max(1, lengths[order[0]])))
        batch_list.append(order[:count])
        del order[:count]
    return batch_list


def layout(encoded: Encoded, rows: Sequence[int]) -> list[list[int]]:
    """Returns the examples of each row of a batch: one per row, or, packed, as many as fit.

    First-fit decreasing finds a small number of rows: each example, the longest first, goes into
    the first row with room. Then the examples are spread evenly over that number of rows, since the
    longest row decides the padding. If they do not fit that way, the first-fit rows are used.
    """
    if encoded.row is None:
        return [[example] for example in rows]
    order = sorted(rows, key=lambda example: -encoded.lengths[example])
    first_fit: list[list[int]] = []
    for example in order:
        target = next((row for row in first_fit if _fits(encoded, row, example)), None)
        if target is None:
            first_fit.append([example])
        else:
            target.append(example)
    spread: list[list[int]] = [[] for _ in first_fit]
    for example in order:
        shortest = min(spread, key=lambda row: sum(encoded.lengths[other] for other in row))
        if not _fits(encoded, shortest, example):
            return first_fit
        shortest.append(example)
    return spread


def _fits(encoded: Encoded, row: Sequence[int], example: int) -> bool:
    """True if a packed row has room for one more example."""
    assert encoded.row is not None
    return sum(encoded.lengths[other] for other in (*row, example)) <= encoded.row


def collate(
    encoded: Encoded, laid: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns one batch, padded: the model's inputs (rows, longest row), and the targets.

    laid: the examples of each row, from layout().
    targets, as losses.batch_loss takes them: (examples,) for classes and values; for text
    (2, tokens), the position in the flattened batch and the label of each learned token.
    Packed rows have no mask: position_ids restart at 0 with each example, and transformers then
    keeps their attention apart.
    """
    source = _token_map(encoded.offsets, laid)
    batch = {
        name: source.put(flat[source.token], encoded.pad if name == "input_ids" else 0)
        for name, flat in encoded.fields.items()
    }
    if encoded.row is not None:
        batch["position_ids"] = source.put(source.position, 0)
    if encoded.labels is None:
        targets = encoded.targets[[example for row in laid for example in row]]
    else:
        # A causal model has a label per token; a separate decoder has labels of another length.
        if encoded.labels is not encoded.offsets:
            source = _token_map(encoded.labels, laid)
        if encoded.shown is not None:
            batch["decoder_input_ids"] = source.put(encoded.shown[source.token], encoded.pad)
        labels = encoded.targets[source.token].long()
        learned = labels != IGNORED
        positions = source.row * source.shape[1] + source.column
        targets = torch.stack([positions[learned], labels[learned]])
    inputs = {name: _to_device(tensor, device) for name, tensor in batch.items()}
    return inputs, _to_device(targets, device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor; to CUDA from pinned memory, so that the copy overlaps with computation."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class _TokenMap:
    """Maps the tokens of a split to a batch. All tensors are (tokens,) int64."""

    token: Tensor  # the index in the split's concatenated tokens
    position: Tensor  # the index in the token's example
    row: Tensor
    column: Tensor
    shape: tuple[int, int]  # (rows, longest row)

    def put(self, values: Tensor, fill: int) -> Tensor:
        """Returns the values of the tokens as (rows, longest row) int64, padded with `fill`."""
        padded = torch.full(self.shape, fill, dtype=torch.long)
        padded[self.row, self.column] = values.long()
        return padded


def _token_map(offsets: Tensor, laid: Sequence[Sequence[int]]) -> _TokenMap:
    """Returns the map for the examples of each row, without a loop over tokens."""
    examples = torch.tensor([example for row in laid for example in row])
    rows = torch.tensor([number for number, row in enumerate(laid) for _ in row])
    starts = offsets[examples]
    lengths = offsets[examples + 1] - starts
    ends = lengths.cumsum(0)
    totals = torch.zeros(len(laid), dtype=torch.long).index_add_(0, rows, lengths)
    begins = ends - lengths  # the start of each example among the batch's tokens
    position = torch.arange(int(ends[-1])) - begins.repeat_interleave(lengths)
    # The start of each example in its row: its start in the batch less that of its row.
    column = (begins - (totals.cumsum(0) - totals)[rows]).repeat_interleave(lengths)
    return _TokenMap(
        token=starts.repeat_interleave(lengths) + position,
        position=position,
        row=rows.repeat_interleave(lengths),
        column=column + position,
        shape=(len(laid), int(totals.max())),
    )


def ahead(plan: Iterable[Any], make: Callable[[Any], B]) -> Iterator[B]:
    """Yields make(entry) of each entry. A thread makes the next one while this one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        current = None
        for entry in plan:
            following = worker.submit(make, entry)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
