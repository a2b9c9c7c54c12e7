"""The folder of a saved adapter, in PEFT's format.

    adapter_config.json         the config, with PEFT's keys, sorted (adapter_config.py)
    adapter_model.safetensors   the tensors, keys `base_model.model.` + path + parameter
    README.md                   a card (card.py)

The metadata of the safetensors file has an additional entry, `lora_from_scratch`, the mark. It is a
JSON object of strings: a digest of the config and a fingerprint of the base (identity.py), the
names of a classifier's classes, the layers that were packed in NF4, and the rows of resized
embeddings. PEFT ignores it. A file that PEFT wrote has no mark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from lora.card import card
from lora.errors import CheckpointError
from lora.files import json_object, read_json, readable
from lora.method import Method

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
ROOT = "base_model."
PREFIX = ROOT + "model."
MARK = "lora_from_scratch"
COPY_AGAIN = "Copy it again from where it was saved."


def adapter_files(
    stored: dict[str, Tensor],
    metadata: dict[str, str],
    settings: dict[str, Any],
    method: type[Method],
    arguments: Mapping[str, Any] = {},
) -> dict[str, bytes]:
    """Returns the bytes of an adapter's three files by name.

    `stored` maps whole_key() to the tensors. `arguments` come from card.arguments_of().
    """
    # PEFT always writes these keys.
    unstated = dict.fromkeys(("base_model_name_or_path", "task_type", "auto_mapping"))
    settings = unstated | settings | {"peft_type": method.peft_type, "inference_mode": True}
    return {
        WEIGHTS: in_one_order(safetensors.torch.save(stored, metadata)),
        CONFIG: json.dumps(whole_numbers(settings), indent=2, sort_keys=True).encode(),
        CARD: card(method.name, method.in_peft, settings, arguments).encode(),
    }


def in_one_order(payload: bytes) -> bytes:
    """Returns a safetensors file with the keys of its header sorted."""
    # The library writes metadata in random order, and the same adapter must give the same bytes.
    length = int.from_bytes(payload[:8], "little")
    header = json.dumps(json.loads(payload[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload[8 + length :]


def whole_key(key: str) -> str:
    """Returns a tensor's key in the file. The keys of shared tensors are complete already."""
    return key if key.startswith(ROOT) else PREFIX + key


def whole_numbers(value: Any, key: str = "") -> Any:
    """Returns the settings with whole floats as ints, as PEFT writes them: alpha 8, not 8.0."""
    if isinstance(value, dict):
        return {inner: whole_numbers(v, key or inner) for inner, v in value.items()}
    whole = isinstance(value, float) and value.is_integer() and "dropout" not in key
    return int(value) if whole else value


def find_folder(directory: str | os.PathLike[str], name: str = "default") -> Path:
    """Returns the folder that holds adapter `name`: `directory`, or its subfolder `name`.

    Raises CheckpointError if neither has both files.
    """
    with readable(directory, CheckpointError, "Pass the folder that lora.save, or PEFT, wrote."):
        inner = Path(directory) / name
        places = (Path(directory), inner) if name == "default" else (inner, Path(directory))
        folder = next((place for place in places if (place / CONFIG).is_file()), None)
        if folder is None:
            raise _no_config(Path(directory))
        if not (folder / WEIGHTS).is_file():
            raise _no_weights(folder)
        return folder


def _no_config(folder: Path) -> CheckpointError:
    if folder.is_dir():
        contents = f"found {sorted(path.name for path in folder.iterdir())[:8] or 'nothing'}."
    else:
        contents = "the folder does not exist."
    adapters = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if adapters:
        advice = f"It has adapters {', '.join(adapters)}: load one of those folders."
    else:
        advice = "Pass the folder that lora.save, or PEFT, wrote."
    return CheckpointError(f"no {CONFIG} in {folder}: {contents} {advice}")


def _no_weights(folder: Path) -> CheckpointError:
    pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        return CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded: refused. If you trust"
            " it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True),"
            f" {WEIGHTS!r})."
        )
    return CheckpointError(f"no {WEIGHTS} in {folder}. Copy it beside {CONFIG}.")


def settings_in(folder: Path) -> dict[str, Any]:
    """Returns what a folder's adapter_config.json states. Raises CheckpointError."""
    return read_json(folder / CONFIG, CheckpointError, COPY_AGAIN)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the file's tensors by key without the prefix, and the mark, {} if PEFT wrote it."""
    path = folder / WEIGHTS
    stored, metadata = _read_safetensors(path)
    mark: dict[str, str] = {}
    if MARK in metadata:
        with suppress(ValueError):
            mark = json_object(metadata[MARK])
        if "config" not in mark or not all(isinstance(value, str) for value in mark.values()):
            raise CheckpointError(
                f"{path}: the metadata {MARK!r} is damaged. Copy the file again, or save it again."
            )
    for key in stored:
        if not key.startswith(PREFIX) and key.removeprefix(ROOT).count("."):
            raise CheckpointError(
                f"{path}: {key} does not begin with {PREFIX!r}, as PEFT's keys do. Rename the"
                " keys, or save the adapter from the unwrapped model."
            )
    # Shared tensors have no prefix, and keep their whole key.
    return {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}, mark


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the file's tensors by key, and its metadata."""
    with readable(path, CheckpointError, COPY_AGAIN):
        with path.open("rb") as raw:
            start, size = raw.read(4), path.stat().st_size
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                # safe_open objects cannot be iterated over.
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return stored, file.metadata() or {}
        except safetensors.SafetensorError as error:
            if start == b"PK\x03\x04" or start[:1] == b"\x80":
                raise CheckpointError(
                    f"{path} is a pickle under a safetensors name, refused. If you trust it,"
                    " convert it: safetensors.torch.save_file("
                    "torch.load(path, weights_only=True), path)."
                ) from None
            raise CheckpointError(
                f"{path} ({size:,} bytes) is not a whole safetensors file: {error}. {COPY_AGAIN}"
            ) from None


def filed_labels(
    mark: Mapping[str, str], key: Literal["labels", "class_names"] = "labels"
) -> tuple[str, ...]:
    """Returns the labels of a classifier's classes that the mark holds, or the names that are shown
    for them; () if it has none."""
    try:
        labels = json.loads(mark.get(key, "[]"))
    except (ValueError, RecursionError):
        return ()
    good = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return tuple(labels) if good else ()
