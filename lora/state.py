"""Training state on disk: checkpoints from which a training goes on, bit for bit.

    step-00000120/
      adapter/              in PEFT's format, for whoever wants the adapter of that step
      training.safetensors  what training changes, in full: values, AdamW's moments, buffers
      training.json         the step, random states, what methods remember, the base's fingerprint
      config.toml           the run's configuration
      manifest.json         size and SHA-256 of each file above

A checkpoint is written to a folder beside its place, every file and folder synced, and renamed: it
is there whole or not at all. One that is damaged all the same is known by its manifest.

The schedule and the position in the data are functions of the step (train.slope, train.plan_of),
and need no state of their own.

What trains is whole on every rank, so that rank 0 writes it, and any number of ranks goes on. With
another number than before the result is that of a run by so many but for the masks of dropout.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora import distributed, siblings
from lora.adapter import Adapter
from lora.checkpoint import fingerprint, json_object, write_together
from lora.checkpoint import save as save_adapter
from lora.errors import CheckpointError
from lora.injection import injected

TENSORS, STATE, CONFIG, MANIFEST = (
    "training.safetensors", "training.json", "config.toml", "manifest.json"
)  # fmt: skip
REMOVED = ".removed"


@dataclass
class Training:
    """A model in training, and how far it is."""

    model: Any
    optimizer: torch.optim.Optimizer
    learning_rate: float  # the peak
    step: int = 0  # optimiser steps done


def save(training: Training, folder: Path, config: bytes, more: dict[str, Any]) -> Path:
    """Write a checkpoint into `folder`, `more` (JSON's kinds) in its training.json. Every rank
    calls it, rank 0 writes.

    Raises CheckpointError, and what stood in the folder is untouched.
    """
    path = place(folder, training.step)
    state = {
        "step": training.step,
        "random": distributed.gather(random_state()),
        "methods": remembered(training.model),
        "read_together": siblings.groups(training.model),
        "base": bases(training.model),
        **more,
    }
    with distributed.alike():
        _write(training, path, state, config)
    return path


def _write(training: Training, path: Path, state: dict[str, Any], config: bytes) -> None:
    folder = path.parent
    making = folder / f".{path.name}.{secrets.token_hex(4)}"
    writes = distributed.rank() == 0
    try:
        save_adapter(training.model, making / "adapter", writes=writes)
        if not writes:
            return
        safetensors.torch.save_file(tensors(training), making / TENSORS)
        sync(making / TENSORS)
        write_together(making, {STATE: json.dumps(state).encode(), CONFIG: config})
        write_together(making, {MANIFEST: json.dumps(_contents(making), indent=2).encode()})
        for written in (making / "adapter", making):
            sync(written)
        if path.exists():  # a damaged one, which find() has passed over
            shutil.rmtree(path)
        making.rename(path)
        for names in (folder, folder.parent):
            sync(names)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. The"
            " checkpoints before it are whole."
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, whole or damaged, in order."""
    names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what to tell of those that were passed over."""
    said = [
        f"{path} was being written when the run stopped: passed over."
        for path in sorted(folder.glob(".step-*"))
        if path.suffix != REMOVED
    ]
    for step in reversed(steps(folder)):
        path = place(folder, step)
        wrong = damage(path)
        if not wrong:
            return path, said
        said.append(f"{path} is damaged, passed over: {wrong}.")
    return None, said


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, "" where nothing is."""
    try:
        stated = json_object((path / MANIFEST).read_bytes())
        found = _contents(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {getattr(error, 'strerror', None) or error}"
    for name in sorted(stated.keys() | found.keys()):
        if stated.get(name) != found.get(name):
            missing = "is missing" if name not in found else "is not as it was written"
            return f"{name} {missing if name in stated else 'is not of it'}"
    return ""


def prune(folder: Path, kept: Iterable[int]) -> None:
    """Remove the checkpoints of all other steps, and what was left of cut-off writing."""
    stay = set(kept)
    gone = [place(folder, step) for step in steps(folder) if step not in stay]
    for path in (*gone, *folder.glob(".step-*")):
        # Renamed first: what is half removed is not to be taken for a checkpoint.
        rest = path.with_name(f".{path.name.lstrip('.')}{REMOVED}")
        with suppress(OSError):
            path.rename(rest)
        shutil.rmtree(rest, ignore_errors=True)


def restore(training: Training, path: Path) -> dict[str, Any]:
    """Put a whole checkpoint into a model that is injected as it was; its training.json.

    Raises CheckpointError, the model untouched, where the two do not belong together.
    """
    state = json_object((path / STATE).read_bytes())
    stored = safetensors.torch.load((path / TENSORS).read_bytes())
    if state["base"] != bases(training.model):
        raise CheckpointError(
            f"{path} is of another base: its weights are not those that the training began on."
            " Bring back the files of --base as they were."
        )
    wanted, moments = values(training.model), {}
    for name, parameter in training.model.named_parameters():
        prefix = f"optimizer.{name}."
        own = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        if own:
            moments[parameter] = own
    strange = {k for k in stored if not k.startswith("optimizer.")} ^ wanted.keys()
    strange |= {k for k in wanted.keys() & stored.keys() if wanted[k].shape != stored[k].shape}
    if strange:
        raise CheckpointError(
            f"{path} does not fit the model: {len(strange)} tensors differ, {min(strange)} among"
            " them. Resume with the version of this package that began the run."
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    for parameter, own in moments.items():
        training.optimizer.state[parameter] = {
            key: tensor.to(parameter.device if tensor.dim() else tensor.device)
            for key, tensor in own.items()
        }
    for layer, remembering in adapters(training.model).items():
        for name in remembering.remembers:
            setattr(remembering, name, state["methods"][layer][name])
    siblings.set_groups(training.model, state["read_together"])
    rank = distributed.rank()
    if rank < len(state["random"]):
        set_random_state(state["random"][rank])
    else:
        torch.manual_seed(rank_seed(state["step"]))
    training.step = state["step"]
    return state


def tensors(training: Training) -> dict[str, Tensor]:
    """What training.safetensors holds: values(), and the optimiser's state under `optimizer.`."""
    found = dict(values(training.model))
    for name, parameter in training.model.named_parameters():
        for key, tensor in training.optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def values(model: nn.Module) -> dict[str, Tensor]:
    """What a training may change, by its names in the model: what requires a gradient, all of the
    adapters (a start away from zero follows from the base by way of LAPACK), and the buffers. What
    several modules share stands under the first of its names."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.requires_grad or isinstance(module, Adapter):
                found[name] = parameter
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    first = {id(tensor): name for name, tensor in reversed(found.items())}
    return {name: tensor for name, tensor in found.items() if first[id(tensor)] == name}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that remember more than tensors, by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Adapter) and module.remembers
    }


def remembered(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What they remember."""
    return {
        path: {name: getattr(adapter, name) for name in adapter.remembers}
        for path, adapter in adapters(model).items()
    }


def bases(model: nn.Module) -> dict[str, str]:
    """The base's fingerprint, where an adapter leaves a base to know."""
    plans = injected(model).values()
    if not all(plan.method.keeps_base for plan in plans):
        return {}
    return fingerprint(model, tuple(path for plan in plans for path in plan.saved))


def rank_seed(seed: int) -> int:
    """A seed of this rank's own; rank 0's is the seed itself."""
    rank = distributed.rank()
    return random.Random(f"{seed}:{rank}").getrandbits(63) if rank else seed


def random_state() -> dict[str, Any]:
    """Of torch's generators, Python's, and numpy's where a model has loaded it."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = [kind, keys.tolist(), *rest]
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Bring back what random_state() gave."""
    torch.set_rng_state(_bytes(state["torch"]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    if "numpy" in state:
        import numpy as np

        np.random.set_state(tuple(state["numpy"]))


def _bytes(state: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def _contents(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file but the manifest."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    return found


def sync(path: Path) -> None:
    """A file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
