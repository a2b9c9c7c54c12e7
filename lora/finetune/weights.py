"""Checks the weights of a base: that they are finite, and fit the model that config.json states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor
from transformers.utils import cached_file

from lora.errors import ModelError
from lora.interop.gguf_file import gguf_in
from lora.interop.pretrained import skeleton_of

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors
LARGEST_NEW = 2**27  # parameters that a base's weights may lack: a head, a pooler


def another_shape(name: str, shape: Any, stated: Any) -> ModelError:
    return ModelError(
        f"{name} is {tuple(shape)} in its files and {tuple(stated)} in the model that config.json"
        " states. Pass the config.json that belongs to the weights."
    )


def check_config_size(base: str, config: Any, task: str) -> None:
    """Raise ModelError if the config states a model that is far larger than the files beside it.

    transformers would make in memory what the files lack, and only then say that it is missing.
    """
    config_file = transformers.utils.cached_file(base, "config.json", local_files_only=True)
    files = Path(config_file).parent.iterdir()
    size = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin"))
    if size:
        check_size(base, config, task, size)


def check_size(base: str, config: Any, task: str, size: int) -> None:
    """Raise ModelError if the config states a model that is far larger than `size` bytes."""
    stated = sum(parameter.numel() for parameter in skeleton_of(config, task).parameters())
    if stated > LARGEST_NEW + 4 * size:  # in four bits a parameter is half a byte
        raise ModelError(
            f"--base {base}: its config.json states {stated:,} parameters, and its weights are"
            f" {size:,} bytes. Pass the config.json that belongs to the weights."
        )


def check_weights_finite(base: str, model: Any, pieces: dict[str, Tensor]) -> None:
    """Raise ModelError if a weight that was read is not finite, or a buffer is NaN. Of a sharded
    base it checks this rank's `pieces`."""
    weights = {**dict(model.named_parameters()), **pieces}
    for name, tensor in (*weights.items(), *model.named_buffers()):
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(tensor.detach().aminmax())  # NaN if any value is
        if bool((ends.isfinite() if name in weights else ~ends.isnan()).all()):
            continue
        raise not_finite(base, name, tensor)


def not_finite(base: str, name: str, tensor: Tensor) -> ModelError:
    off = int((~tensor.detach().isfinite()).sum())
    return ModelError(
        f"--base {base}: {name} holds NaN or infinity, {off:,} of {tensor.numel():,} values"
        f"{_damaged_file(base)}. Copy or download its files again, or pass another base."
    )


def _damaged_file(base: str) -> str:
    """Returns " (KEY in FILE)" for the first tensor of the files that is not finite, or ""."""
    if gguf_in(base) is not None:
        return ""
    try:
        config = transformers.utils.cached_file(base, "config.json", local_files_only=True)
        for path in sorted(Path(str(config)).parent.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no iteration over the file itself)
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        return f" ({key} in {path})"
    except (OSError, safetensors.SafetensorError):  # files in another format cannot be searched
        pass
    return ""


def dtype_of_files(base: str) -> torch.dtype:
    """Returns the dtype of the first floating weight in a model's files, float32 without any."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        if path is not None and name.endswith(".json"):
            first = next(iter(json.loads(Path(path).read_bytes())["weight_map"].values()))
            path = cached_file(base, first)
        if path is not None:
            with safetensors.safe_open(path, framework="pt") as file:
                dtypes = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
                return next((FLOATS[dtype] for dtype in dtypes if dtype in FLOATS), torch.float32)
    return torch.float32
