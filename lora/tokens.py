"""Token ids of a split: encoded once and cached, then batches of one length.

encode(...)     -> Encoded: all the split's tokens in a row
batches(...)    -> lists of row numbers, lengths together, a pure function of (seed, epoch)
collate(...)    -> tensors (batch, longest of the batch)
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

from lora.checkpoint import write_whole
from lora.data import Example

AT_ONCE = 10_000  # examples tokenised at a time: the ids of more would be held as Python's numbers
B = TypeVar("B")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the tokenizer's other fields, of every example of a split."""

    fields: dict[str, Tensor]  # (all tokens,) int32, one example after the other
    offsets: Tensor  # (examples + 1,) int64: where each example begins, and where the last ends
    targets: Tensor  # (examples,) int64 for classes, float32 for regression
    pad: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()


def encode(
    tokenizer: Any, examples: Sequence[Example], targets: Sequence[float], task: str, length: int
) -> Encoded:
    """Tokenise a split, or find it in the cache; a text longer than `length` tokens is cut."""
    path = _place(tokenizer, examples, length)
    with _alone(path) as writable:
        found = _read(path) if path is not None else None
        if found is None:
            found = _tokenise(tokenizer, examples, length)
            if path is not None and writable:
                _write(path, found)
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
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
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


def _place(tokenizer: Any, examples: Sequence[Example], length: int) -> Path | None:
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
def _alone(path: Path | None) -> Iterator[bool]:
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
        digest.update(f"{name} {tensors[name].dtype} {len(tensors[name])}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """What the file holds, None where it is not there or not whole."""
    if not os.path.isfile(path):  # False too where the folder may not be searched
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("digest")
        found = safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError):
        found, known = {}, None
    if known is None or _digest(found) != known:
        print(f"note: {path} was damaged: the texts are tokenised anew.", file=sys.stderr)
        return None
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_whole(path, safetensors.torch.save(tensors, {"digest": _digest(tensors)}))
    except OSError as error:
        reason = error.strerror or error
        print(f"note: {path} is not written: {reason}. Set LORA_CACHE.", file=sys.stderr)


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers in batches of similar length: a pure function of its arguments.

    The rows are shuffled, sorted by length within stretches of 32 batches, cut into batches, and
    the batches shuffled, so that order stays random where it matters and padding stays small.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    stretch = 32 * size
    found = []
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda row: lengths[row])
        found += [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(found)
    return found


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches by falling length: the order of evaluation."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[i : i + size] for i in range(0, len(order), size)]


def collate(encoded: Encoded, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """One batch (rows, longest of them), padded, without its targets."""
    picked = torch.tensor(rows)
    starts = encoded.offsets[picked]
    lengths = encoded.offsets[picked + 1] - starts
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]  # (rows, longest)
    places = torch.where(real, starts[:, None] + columns, 0)
    batch = {}
    for name, flat in encoded.fields.items():
        fill = encoded.pad if name == "input_ids" else 0
        found = torch.where(real, flat[places], fill).long()
        if device.type == "cuda":  # from pinned memory the copy goes on beside the computing
            found = found.pin_memory()
        batch[name] = found.to(device, non_blocking=True)
    return batch


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
