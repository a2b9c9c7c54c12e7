"""Token ids of a split: encoded once and cached, then batches of one length.

encode(...)     -> Encoded: all the split's tokens, one example after the other
drawn(...)      -> the examples of an epoch, of several tasks by their shares
batches(...)    -> lists of their numbers, lengths together, a pure function of (seed, epoch)
layout(...)     -> the rows of a batch: an example each, or, packed, as many as fit
collate(...)    -> tensors (rows, longest row), and the targets
ahead(...)      -> each batch, made while the one before it computes

The cache is a file for each split, tokenizer and settings, in the user's cache folder or
$LORA_CACHE; any of it may be deleted. A file is believed only where its digest is right, and a
second process waits for the one that writes.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import filelock
import platformdirs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora.errors import DataError
from lora.files import writable, write_whole
from lora.finetune.data.corpus import Example

EXAMPLES_AT_ONCE = (
    10_000  # examples tokenised at a time: the ids of more would be held as Python's numbers
)
IGNORED = -100  # the label of a position that is not learned from
B = TypeVar("B")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the tokenizer's other fields, of every example of a split."""

    fields: dict[str, Tensor]  # (all tokens,) int32, one example after the other
    offsets: Tensor  # (examples + 1,) int64: where each example begins, and where the last ends
    targets: Tensor  # (examples,) int64 for classes, float32 for regression; of texts their labels
    pad: int
    labels: Tensor | None = (
        None  # as offsets, of texts' labels: (all,) int32, IGNORED where none is
    )
    shown: Tensor | None = None  # (all labels,) int32: what a decoder of its own is shown before
    row: int | None = None  # tokens at most of a row that examples share; None: a row each
    tasks: tuple[int, ...] = ()  # the number of each example's task, where there are several
    shares: tuple[float, ...] = ()  # of each task in an epoch; (): as many as it has

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()

    @cached_property
    def counts(self) -> list[int]:
        """What each example adds to its batch's divisor: itself, or its tokens with a label."""
        if self.labels is None:
            return [1] * len(self.lengths)
        there = torch.cat([torch.zeros(1, dtype=torch.long), (self.targets >= 0).cumsum(0)])
        return there[self.labels].diff().tolist()


def tokenize(
    tokenizer: Any, examples: Sequence[Example], targets: Sequence[float], task: str, length: int
) -> Encoded:
    """Tokenise a split, or find it in the cache; a text longer than `length` tokens is cut."""
    path = _cache_file(tokenizer, examples, length)
    with _locked(path) as writable:
        found = _read_cache(path, len(examples)) if path is not None else None
        if found is None:
            found = _tokenise(tokenizer, examples, length)
            if path is not None and writable:
                _write_cache(path, found)
    return Encoded(
        fields={name: found[name] for name in found if name != "offsets"},
        offsets=found["offsets"],
        targets=torch.tensor(targets, dtype=torch.float32 if task == "regression" else torch.long),
        pad=tokenizer.pad_token_id,
    )


def _tokenise(tokenizer: Any, examples: Sequence[Example], length: int) -> dict[str, Tensor]:
    paired = any(example.pair is not None for example in examples)
    parts: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        some = examples[start : start + EXAMPLES_AT_ONCE]
        found = tokenizer(
            [example.text for example in some],
            [example.pair or "" for example in some] if paired else None,
            truncation=True,
            max_length=length,
            return_attention_mask=True,  # some tokenizers leave it out unless asked
        )
        lengths += map(len, found["input_ids"])
        for name, rows in found.items():
            flat = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int32)
            parts.setdefault(name, []).append(flat)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return {name: torch.cat(some) for name, some in parts.items()} | {"offsets": offsets}


def _cache_file(tokenizer: Any, examples: Sequence[Example], length: int) -> Path | None:
    """The cache's file for these texts; None where the tokenizer does not say all that it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None  # code of somebody's own may do anything
    state = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # set by the last call
        state.pop(name, None)
    settings = {
        "tokenizer": state,
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
            digest.update(b"-" if text is None else f"{len(text)}:{text}".encode())
    return folder() / f"{digest.hexdigest()}.safetensors"


def folder() -> Path:
    """Where the cache lies."""
    given = os.environ.get("LORA_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("lora-from-scratch")


@contextmanager
def _locked(path: Path | None) -> Iterator[bool]:
    """The cache's file to oneself; False where there can be no cache."""
    lock = None
    if path is not None:
        with suppress(OSError):  # read-only, full, or no home: the texts are tokenised each time
            path.parent.mkdir(parents=True, exist_ok=True)
            found = filelock.FileLock(path.with_suffix(".lock"))
            found.acquire()
            lock = found
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _laid_out(tensors: dict[str, Tensor], examples: int) -> bool:
    """Whether a file holds what _tokenise() gives for so many examples."""
    for name, tensor in tensors.items():
        if tensor.dtype != (torch.int64 if name == "offsets" else torch.int32) or tensor.dim() != 1:
            return False
    if not {"offsets", "input_ids"} <= tensors.keys() or len(tensors["offsets"]) != examples + 1:
        return False
    begins, ends = int(tensors["offsets"][0]), int(tensors["offsets"][-1])
    lengths = {len(tensor) for name, tensor in tensors.items() if name != "offsets"}
    return begins == 0 and lengths == {ends} and bool((tensors["offsets"].diff() >= 0).all())


def _read_cache(path: Path, examples: int) -> dict[str, Tensor] | None:
    """What the file holds, None if it is not there or not whole."""
    if not os.path.isfile(path):  # False too where the folder may not be searched
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("digest")
        found = safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):  # KeyError: a dtype
        found, known = {}, None
    if known is None or not _laid_out(found, examples) or _digest(found) != known:
        print(f"note: {path} was damaged: the texts are tokenised anew.", file=sys.stderr)
        return None
    return found


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with writable(path, DataError, "Set LORA_CACHE."):
            write_whole(path, safetensors.torch.save(tensors, {"digest": _digest(tensors)}))
    except DataError as error:
        print(f"note: {error}", file=sys.stderr)


def drawn(encoded: Encoded, seed: int, epoch: int) -> list[int]:
    """The examples of an epoch, as many as there are. Of several tasks each has its share, and goes
    through its own again and again, each time in another order: none comes twice before all have
    come."""
    if not encoded.shares:
        return list(range(len(encoded.lengths)))
    found: list[int] = []
    for task, count in enumerate(parts_of(len(encoded.tasks), encoded.shares)):
        own = [row for row, of in enumerate(encoded.tasks) if of == task]
        begin, end = epoch * count, (epoch + 1) * count
        for lap in range(begin // len(own), -(-end // len(own))):
            order = own.copy()
            random.Random(f"{seed}:{task}:{lap}").shuffle(order)
            found += order[max(0, begin - lap * len(own)) : end - lap * len(own)]
    return found


def parts_of(total: int, shares: Sequence[float]) -> list[int]:
    """Whole parts of `total` as near to the shares as can be, by the largest remainders."""
    exact = [share * total for share in shares]
    found = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for index in order[: total - sum(found)]:
        found[index] += 1
    return found


def batches(
    lengths: Sequence[int], size: int, seed: int, epoch: int, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Numbers of examples in batches of similar length: a pure function of its arguments.

    The rows (default: all) are shuffled, sorted by length within stretches of 32 batches, cut into
    batches, and the batches shuffled, so that order stays random where it matters and padding stays
    small.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)) if rows is None else rows)
    rng.shuffle(order)
    stretch = 32 * size
    found = []
    for start in range(0, len(order), stretch):
        some = sorted(order[start : start + stretch], key=lambda row: lengths[row])
        found += [some[i : i + size] for i in range(0, len(some), size)]
    rng.shuffle(found)
    return found


def sorted_batches(lengths: Sequence[int], size: int, tokens: int = sys.maxsize) -> list[list[int]]:
    """Numbers of examples in batches by falling length, at most so many, and so many tokens with
    their padding (but one example): the order of evaluation."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    while order:
        most = max(1, min(size, tokens // max(1, lengths[order[0]])))
        found.append(order[:most])
        del order[:most]
    return found


def layout(encoded: Encoded, rows: Sequence[int]) -> list[list[int]]:
    """The examples of each row of a batch: one, or, packed, the longest first, in as few rows as
    the first with room for each would make, spread over them so that none is the longest by far."""
    if encoded.row is None:
        return [[row] for row in rows]
    order = sorted(rows, key=lambda row: -encoded.lengths[row])
    first: list[list[int]] = []
    for row in order:
        place = next((some for some in first if _fits(encoded, some, row)), None)
        if place is None:
            first.append([row])
        else:
            place.append(row)
    spread: list[list[int]] = [[] for _ in first]
    for row in order:
        place = min(spread, key=lambda some: sum(encoded.lengths[other] for other in some))
        if not _fits(encoded, place, row):
            return first
        place.append(row)
    return spread


def _fits(encoded: Encoded, some: Sequence[int], row: int) -> bool:
    """Whether a row has room for one more example."""
    assert encoded.row is not None
    return sum(encoded.lengths[other] for other in (*some, row)) <= encoded.row


def collate(
    encoded: Encoded, laid: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """One batch of a layout(), padded: inputs (rows, longest row), and the targets, of classes and
    quantities (examples,), of texts (2, tokens), as lora.finetune.losses.batch_loss takes them.

    Packed rows have no mask: positions begin anew with each example, from which transformers tells
    them apart.
    """
    places = _placed(encoded.offsets, laid)
    batch = {
        name: places.put(flat[places.found], encoded.pad if name == "input_ids" else 0)
        for name, flat in encoded.fields.items()
    }
    if encoded.row is not None:
        batch["position_ids"] = places.put(places.within, 0)
    if encoded.labels is None:
        targets = encoded.targets[[row for some in laid for row in some]]
    else:
        at = places if encoded.labels is encoded.offsets else _placed(encoded.labels, laid)
        if encoded.shown is not None:
            batch["decoder_input_ids"] = at.put(encoded.shown[at.found], encoded.pad)
        labels = encoded.targets[at.found].long()
        kept = labels != IGNORED
        targets = torch.stack([(at.row * at.shape[1] + at.column)[kept], labels[kept]])
    there = {name: _to_device(tensor, device) for name, tensor in batch.items()}
    return there, _to_device(targets, device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On CUDA from pinned memory: the copy goes on beside the computing."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Gather:
    """Where each token of a batch is found, and where it goes."""

    found: Tensor  # (tokens,) in the split's tokens
    within: Tensor  # (tokens,) of its example
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    def put(self, values: Tensor, fill: int) -> Tensor:
        """Values of the tokens, (rows, longest row)."""
        whole = torch.full(self.shape, fill, dtype=torch.long)
        whole[self.row, self.column] = values.long()
        return whole


def _placed(offsets: Tensor, laid: Sequence[Sequence[int]]) -> _Gather:
    examples = torch.tensor([example for row in laid for example in row])
    rows = torch.tensor([number for number, row in enumerate(laid) for _ in row])
    starts = offsets[examples]
    lengths = offsets[examples + 1] - starts
    ends = lengths.cumsum(0)
    totals = torch.zeros(len(laid), dtype=torch.long).index_add_(0, rows, lengths)
    begins = ends - lengths  # of each example among the batch's tokens
    inside = torch.arange(int(ends[-1])) - begins.repeat_interleave(lengths)
    before = (begins - (totals.cumsum(0) - totals)[rows]).repeat_interleave(lengths)
    return _Gather(
        found=starts.repeat_interleave(lengths) + inside,
        within=inside,
        row=rows.repeat_interleave(lengths),
        column=before + inside,
        shape=(len(laid), int(totals.max())),
    )


def ahead(plan: Iterable[Any], make: Callable[[Any], B]) -> Iterator[B]:
    """make(entry) of each entry, one entry ahead of what is asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        waiting = None
        for entry in plan:
            following = worker.submit(make, entry)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
