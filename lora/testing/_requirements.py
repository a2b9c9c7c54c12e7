"""The assertions of the contract: each function raises ContractError if its condition is false."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import ContractError
from lora.wrappers import AdaptedLayer, SavedModule


def require_same(actual: Tensor, expected: Tensor, name: str) -> None:
    """Require the same dtype and bits."""
    if actual.dtype != expected.dtype or not torch.equal(actual, expected):
        raise ContractError(f"{name}: not bit-equal")


def require_near(actual: Tensor, expected: Tensor, name: str, k: float = 16) -> None:
    """Require a difference of at most k · eps(dtype) · max|expected|."""
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape:
        raise ContractError(f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    bound = k * torch.finfo(actual.dtype).eps * max(float(expected.abs().max()), 1e-30)
    off = float((actual - expected).abs().max())
    if not off <= bound:  # true for NaN too
        raise ContractError(f"{name}: off by {off:.3g}, tolerance {bound:.3g}")


def require(condition: bool, message: str) -> None:
    """Require a condition. `message` says what is wrong if it is false."""
    if not condition:
        raise ContractError(message)


@contextmanager
def require_raise(error: type[Exception], name: str) -> Iterator[None]:
    """Require the block to raise an error of this type."""
    try:
        yield
    except error:
        return
    raise ContractError(f"{name}: no {error.__name__}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns everything that a failed operation must not change, to be compared by unchanged()."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "acting": [
            (module.active, module.enabled, getattr(module, "kept", None) is None)
            for module in model.modules()
            if isinstance(module, AdaptedLayer | SavedModule)
        ],
        "places": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "state": {k: str(v) for k, v in model.__dict__.items() if k not in nn.Module().__dict__},
    }


def unchanged(before: dict[str, Any], model: nn.Module) -> bool:
    """True if the model equals its snapshot."""
    now = snapshot(model)
    bits, old_bits = now.pop("bits"), before["bits"]
    if bits.keys() != old_bits.keys() or any(now[key] != before[key] for key in now):
        return False
    return all(torch.equal(bits[key], old_bits[key]) for key in bits)
