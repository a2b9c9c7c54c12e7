"""Checkpoints: the state of a training on disk, from which it resumes bit for bit.

    step-00000120/
      adapter/              the adapter of that step, in PEFT's format
      training.safetensors  all that training changes: parameters, AdamW's moments, buffers
      training.json         the step, random states, what methods remember, the base's fingerprint
      config.toml           the run's configuration
      manifest.json         size and SHA-256 of each file above

A checkpoint is written to a temporary folder, synced to disk and renamed, so no reader ever sees a
part of one. If it is damaged later, its manifest shows it.

The schedule and the position in the data are functions of the step (train.slope, train.batch_plan),
so they are not saved.

Every rank holds all trainable parameters. So rank 0 writes them, and any number of ranks can
resume. With another number of ranks only the dropout masks differ.
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
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

import safetensors
import safetensors.torch
import torch
from pydantic import AfterValidator, Field, TypeAdapter, create_model
from torch import Tensor, nn
from typing_extensions import TypedDict

from lora.adapter import Adapter
from lora.checkpoint import save as save_adapter
from lora.errors import CheckpointError
from lora.files import read_safetensors, readable, sync, writable, write_together
from lora.finetune import devices, distributed
from lora.finetune.devices import CPU
from lora.finetune.evaluate import device_of
from lora.finetune.record import Mark
from lora.identity import fingerprint, packed_layers, same_base
from lora.interop import documents
from lora.interop.documents import Count, Finite
from lora.inventory import injected
from lora.method import Scheduled

TENSORS_FILE, STATE_FILE, CONFIG_FILE, MANIFEST_FILE = (
    "training.safetensors", "training.json", "config.toml", "manifest.json"
)  # fmt: skip
REMOVED = ".removed"
ANEW = "Remove the folder: lora train --resume then resumes from the checkpoint before it."


@dataclass
class Training:
    """A model in training, its optimizer, and the steps done."""

    model: Any
    optimizer: torch.optim.Optimizer
    learning_rate: float  # the peak
    step: int = 0  # optimizer steps done
    scaler: torch.amp.GradScaler | None = None  # of the loss, in float16


Key = Annotated[int, Field(ge=0, lt=2**32)]
Legacy = tuple[
    Literal["MT19937"],
    Annotated[list[Key], Field(min_length=624, max_length=624)],
    Annotated[int, Field(ge=0, le=624)],
    Literal[0, 1],
    Finite,
]
"""numpy's state. numpy sets it unchecked: a position past the keys would read other memory."""


class RandomState(TypedDict):
    """The generators' states: torch's in hexadecimal, Python's, that of an accelerator with its
    kind, and numpy's if it is imported."""

    torch: str
    python: tuple[int, list[int], float | None]
    device: NotRequired[tuple[str, str]]
    numpy: NotRequired[Legacy]


def _tried_state(state: RandomState) -> RandomState:
    """Returns the state. Raises ValueError if a generator rejects it, before the model changes."""
    try:
        torch.Generator().set_state(_bytes(state["torch"]))
        kind, accelerators = state.get("device", ("cpu", state["torch"]))
        if kind == "cpu" or torch.get_device_module(kind).is_available():
            torch.Generator(kind).set_state(_bytes(accelerators))
        version, keys, gauss = state["python"]
        random.Random().setstate((version, tuple(keys), gauss))
    except (RuntimeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return state


class LossScale(TypedDict):
    """The scale of the loss in float16, and the steps since it last changed."""

    scale: Annotated[Finite, Field(gt=0)]
    growth_tracker: Count


class State(TypedDict):
    """training.json."""

    step: Count
    random: Annotated[
        list[Annotated[RandomState, AfterValidator(_tried_state)]], Field(min_length=1)
    ]  # of each rank
    methods: dict[str, dict[str, Any]]  # what an adapter remembers, by its path
    base: dict[str, str]  # its fingerprint, and its layers in NF4
    recorded: Mark
    loss_scale: NotRequired[LossScale]


STATES = TypeAdapter(State)
CONTENTS = TypeAdapter(dict[str, tuple[Count, str]])
"""The manifest: size and SHA-256 of each file."""


def save_training(training: Training, folder: Path, config: bytes, recorded: Mark) -> Path:
    """Writes a checkpoint into `folder`. `recorded` is the mark of metrics.jsonl at this step.

    Every rank calls it; rank 0 writes. Raises CheckpointError, and leaves older checkpoints as
    they were.
    """
    path = checkpoint_folder(folder, training.step)
    state = {
        "step": training.step,
        "random": distributed.gather(random_state(device_of(training.model))),
        "methods": remembered(training.model),
        "base": bases(training.model),
        "recorded": recorded,
    }
    if training.scaler is not None:
        scaling = training.scaler.state_dict()
        tracker = scaling["_growth_tracker"]
        state["loss_scale"] = {"scale": scaling["scale"], "growth_tracker": tracker}
    with distributed.alike():
        _write_checkpoint(training, path, state, config)
    return path


def _write_checkpoint(training: Training, path: Path, state: dict[str, Any], config: bytes) -> None:
    folder = path.parent
    making = folder / f".{path.name}.{secrets.token_hex(4)}"
    writes = distributed.rank() == 0
    try:
        save_adapter(training.model, making / "adapter", writes=writes)
        if not writes:
            return
        with writable(path, CheckpointError, "The checkpoints before it are whole."):
            safetensors.torch.save_file(training_tensors(training), making / TENSORS_FILE)
            sync(making / TENSORS_FILE)
            write_together(making, {STATE_FILE: json.dumps(state).encode(), CONFIG_FILE: config})
            write_together(
                making, {MANIFEST_FILE: json.dumps(_contents(making), indent=2).encode()}
            )
            for written in (making / "adapter", making):
                sync(written)
            if path.exists():  # a damaged one, which find() skipped
                shutil.rmtree(path)
            making.rename(path)
            for names in (folder, folder.parent):
                sync(names)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return folder / f"step-{step:08}"


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, whole or damaged, in ascending order."""
    names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest whole checkpoint, and a note for each newer one that was skipped."""
    notes = [
        f"{path} was being written when the run stopped: skipped."
        for path in sorted(folder.glob(".step-*"))
        if path.suffix != REMOVED
    ]
    for step in reversed(steps(folder)):
        path = checkpoint_folder(folder, step)
        wrong = damage(path)
        if not wrong:
            return path, notes
        notes.append(f"{path} is damaged, skipped: {wrong}.")
    return None, notes


def damage(path: Path) -> str:
    """Returns what is wrong with a checkpoint's files, "" if they are as written."""
    try:
        stated = documents.read_document(path / MANIFEST_FILE, CONTENTS, CheckpointError, "")
        actual = _contents(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}{os.sep}").rstrip(". ")
    for name in sorted(stated.keys() | actual.keys()):
        if stated.get(name) != actual.get(name):
            if name not in stated:
                return f"{name} is not in its manifest"
            return f"{name} {'was changed' if name in actual else 'is missing'}"
    return ""


def prune(folder: Path, kept: Iterable[int]) -> None:
    """Removes the checkpoints of all other steps, and folders that were never completed."""
    kept = set(kept)
    outdated = [checkpoint_folder(folder, step) for step in steps(folder) if step not in kept]
    for path in (*outdated, *folder.glob(".step-*")):
        # Renamed first, so that a half removed folder is not taken for a checkpoint.
        renamed = path.with_name(f".{path.name.lstrip('.')}{REMOVED}")
        with suppress(OSError):
            path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def restore_training(training: Training, path: Path) -> State:
    """Loads a whole checkpoint into a model with the same adapters. Returns its training.json.

    Raises CheckpointError if they do not fit together. The model is then unchanged.
    """
    state = documents.read_document(path / STATE_FILE, STATES, CheckpointError, ANEW)
    tensors = read_safetensors(path / TENSORS_FILE, CheckpointError, ANEW)
    if not _is_base(training.model, state["base"]):
        raise CheckpointError(
            f"{path} is of another base: the weights of the base differ from those that the"
            " training began with. Restore the files of the base, or pass --base FOLDER."
        )
    expected, moments = values(training.model), {}
    saved = {key for key in tensors if not key.startswith("optimizer.")}
    misfits = saved ^ expected.keys()
    misfits |= {k for k in saved & expected.keys() if expected[k].shape != tensors[k].shape}
    misfits |= tensors.keys() - saved  # less those that fit a parameter, below
    for name, parameter in training.model.named_parameters():
        prefix = f"optimizer.{name}."
        moment = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        misfits -= {prefix + k for k, t in moment.items() if t.shape in ((), parameter.shape)}
        if moment:
            moments[parameter] = moment
    if misfits:
        raise CheckpointError(
            f"{path} does not fit the model: {len(misfits)} tensors differ, {min(misfits)} among"
            " them. Resume with the version of this package that began the run."
        )
    _check_remembered(training.model, state, path)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    for parameter, moment in moments.items():
        # All of it, since fused AdamW needs its step, a scalar, beside the parameter too.
        training.optimizer.state[parameter] = {
            key: tensor.to(parameter.device) for key, tensor in moment.items()
        }
    if training.scaler is not None and "loss_scale" in state:
        scale, tracker = state["loss_scale"]["scale"], state["loss_scale"]["growth_tracker"]
        scaling = {"scale": scale, "_growth_tracker": tracker}
        training.scaler.load_state_dict(training.scaler.state_dict() | scaling)
    for layer, adapter in adapters(training.model).items():
        for name in adapter.remembers:
            setattr(adapter, name, state["methods"][layer][name])
    rank = distributed.rank()
    if rank < len(state["random"]):
        set_random_state(state["random"][rank], device_of(training.model))
    else:  # more ranks than before: the new ones need masks that no other rank draws
        torch.manual_seed(rank_seed(state["step"]))
    training.step = state["step"]
    return state


def _check_remembered(model: nn.Module, state: State, path: Path) -> None:
    """Raises CheckpointError unless the methods' state in the file fits the model's layers."""
    layers = adapters(model)
    misfits = sorted(layers.keys() ^ state["methods"].keys())
    if misfits:
        where = "the model" if misfits[0] in layers else "the file"
        raise CheckpointError(
            f"{path / STATE_FILE} does not fit the model: only {where} has a state for"
            f" {misfits[0]}. {ANEW}"
        )
    for layer, adapter in layers.items():
        types = get_type_hints(type(adapter))
        fields: dict[str, Any] = {name: (types.get(name, Any), ...) for name in adapter.remembers}
        schema = TypeAdapter(create_model("Remembered", **fields))
        name = f"{path / STATE_FILE}, methods of {layer},"
        documents.validate(state["methods"][layer], schema, name, CheckpointError, ANEW)


def training_tensors(training: Training) -> dict[str, Tensor]:
    """Returns the tensors of training.safetensors: values(), and the optimizer's state under
    `optimizer.`."""
    tensors = dict(values(training.model))
    for name, parameter in training.model.named_parameters():
        for key, tensor in training.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Returns all tensors that a training may change, by name: trainable parameters, all parameters
    of the adapters, and the buffers. A tensor that modules share is listed under its first name."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            # Frozen adapter parameters too: an init that LAPACK computes from the base may differ
            # on another machine.
            if parameter.requires_grad or isinstance(module, Adapter):
                tensors[name] = parameter
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = buffer
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def adapters(model: nn.Module) -> dict[str, Any]:
    """Returns the adapters whose state is more than tensors, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Scheduled) and module.remembers
    }


def remembered(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the state of adapters() besides tensors, by path and attribute."""
    return {
        path: {name: getattr(adapter, name) for name in adapter.remembers}
        for path, adapter in adapters(model).items()
    }


def bases(model: nn.Module) -> dict[str, str]:
    """Returns what identifies the base, {} if the method trains the base itself."""
    if not _keeps_base(model):
        return {}
    packed = packed_layers(model)
    return fingerprint(model, _saved(model)) | ({"packed": json.dumps(packed)} if packed else {})


def _is_base(model: nn.Module, mark: dict[str, str]) -> bool:
    """True if the base is the one of which bases() gave the mark."""
    if not mark:
        return not _keeps_base(model)
    return _keeps_base(model) and same_base(model, _saved(model), mark)


def _keeps_base(model: nn.Module) -> bool:
    return all(plan.method.keeps_base for plan in injected(model).values())


def _saved(model: nn.Module) -> tuple[str, ...]:
    """Returns the modules that adapters train as a whole."""
    return tuple(path for plan in injected(model).values() for path in plan.saved)


def rank_seed(seed: int) -> int:
    """Returns this rank's seed. On rank 0 it is `seed` itself."""
    rank = distributed.rank()
    return random.Random(f"{seed}:{rank}").getrandbits(63) if rank else seed


def random_state(device: torch.device = CPU) -> RandomState:
    """Returns the state of every generator that a training on the device draws from."""
    version, keys, gauss = random.getstate()
    state: RandomState = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": (version, list(keys), gauss),
    }
    if (accelerators := devices.accelerator_state(device)) is not None:
        state["device"] = accelerators
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = kind, keys.tolist(), *rest
    return state


def set_random_state(state: RandomState, device: torch.device = CPU) -> None:
    """Sets the generators to a random_state(). One of another kind of device leaves this one's
    generator as train.begin() seeded it."""
    torch.set_rng_state(_bytes(state["torch"]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, accelerators = state.get("device", ("cpu", ""))
    if kind == device.type != "cpu":
        torch.get_device_module(kind).set_rng_state(_bytes(accelerators))
    if "numpy" in state:
        import numpy as np

        kind, numbers, position, cached, value = state["numpy"]
        np.random.set_state((kind, np.array(numbers, np.uint32), position, cached, value))


def _bytes(state: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def _contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Returns size and SHA-256 of every file except the manifest."""
    contents: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        with readable(path, CheckpointError, ""):
            if path.is_file() and path.name != MANIFEST_FILE:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                contents[path.relative_to(folder).as_posix()] = path.stat().st_size, digest
    return contents
