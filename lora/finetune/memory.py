"""Saves memory: frozen weights in 16 bits, and activation checkpointing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.errors import ConfigError, ModelError
from lora.finetune import devices
from lora.inventory import adapter_parts, injected
from lora.layers import kind
from lora.nf4 import NF4Linear


def bfloat16_here(device: torch.device) -> bool:
    """True if the device has bfloat16 matrix multiplication: AVX512-BF16, AMX, CUDA from 8.0 on.

    LORA_BFLOAT16=1 or 0 in the environment overrides it. Raises ConfigError for any other value.
    """
    forced = os.environ.get("LORA_BFLOAT16", "")
    if forced:
        if forced not in ("0", "1"):
            raise ConfigError(
                f"LORA_BFLOAT16 is {forced!r} in the environment. Set it to 1 or 0, or unset it."
            )
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def pick_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Returns the dtype that --dtype auto means on the device."""
    return "bfloat16" if bfloat16_here(device) else "float32"


def auto_dtype_note(device: torch.device) -> str:
    """Returns a line for the user: what --dtype auto means on the device, and why."""
    dtype, name = pick_dtype(device), devices.name_of(device)
    name = "this processor" if device.type == "cpu" else name
    if os.environ.get("LORA_BFLOAT16"):
        reason = f"since LORA_BFLOAT16={os.environ['LORA_BFLOAT16']} is in the environment"
    elif dtype == "bfloat16":
        reason = f"since {name} has bfloat16 matrix multiplication"
    else:
        reason = f"since {name} has no bfloat16 matrix multiplication"
        if device.type == "cuda":
            reason += "; --dtype float16 is faster"
    return f"dtype: {dtype}, {reason}"


def set_dtype(model: Any, dtype: str, device: torch.device | None = None) -> None:
    """Convert frozen weights to `dtype`, and run each forward under autocast. Call it before the
    model goes to `device`, so that the device needs no room for the weights in float32.

    What an adapter trains stays in float32. On a CPU (the default) and in float16 only the weights
    of linear layers are converted: embeddings, norms and biases are few, and activations between
    the layers may overflow in float16. In bfloat16 on an accelerator all of the base is: one
    float32 embedding or norm would make every activation after it float32. The parts that
    generate() or a user calls directly, a backbone or an encoder, run under autocast too. Raises
    ModelError if a weight is too large for float16.
    """
    if dtype == "float32":
        return
    half: torch.dtype = getattr(torch, dtype)
    everything = dtype == "bfloat16" and device is not None and device.type != "cpu"
    trained = {
        id(parameter)  # also if it was loaded, and does not train now
        for name, plan in injected(model).items()
        for parameter in adapter_parts(model, name).trained(plan)
    }
    for path, module in model.named_modules():
        weights: list[nn.Parameter] = []
        if kind(module) in ("Linear", "Conv1D"):
            weights = [module.weight]
        elif everything and not isinstance(module, Adapter | NF4Linear):
            parameters = module.parameters(recurse=False)
            weights = [p for p in parameters if p.is_floating_point() and id(p) not in trained]
        for weight in weights:
            if not weight.requires_grad:
                weight.data = _converted(weight.data, half, path)
        if isinstance(module, transformers.PreTrainedModel):
            # A partial, which deepcopy binds to the copy, as it would not a closure.
            forward = functools.partial(_under_autocast, half, module.forward)
            module.forward = functools.update_wrapper(forward, module.forward)
    model.lora_dtype = half


def _converted(weight: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    converted = weight.to(dtype)
    if dtype == torch.float16 and not weight.is_meta and not bool(converted.isfinite().all()):
        raise ModelError(
            f"--dtype float16: {path} has weights up to {float(weight.abs().max()):.3g}, past"
            " 65,504, the largest number of float16. Set --dtype float32 or bfloat16."
        )
    return converted


def _under_autocast(
    dtype: torch.dtype, forward: Callable[..., Any], *args: Any, **named: Any
) -> Any:
    tensors = (value for value in (*args, *named.values()) if isinstance(value, Tensor))
    with torch.autocast(next(tensors, torch.empty(0)).device.type, dtype):
        return forward(*args, **named)


def checkpoint_activations(model: Any) -> None:
    """Let each block keep only its input, and compute the rest again in the backward pass.

    The same dropout masks are drawn again, so that only time is lost. Raises ModelError if
    transformers does not support it for the architecture.
    """
    # transformers 5.17 has the older name alone, and 5.23 warns of it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"--activation-checkpointing: transformers has none for {type(model).__name__}. Leave"
            " it out, and lower --batch-size or --max-length."
        ) from None
    model.disable_input_require_grads()  # on for reentrant checkpointing, which needs it
