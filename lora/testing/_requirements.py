"""What a clause demands: each function raises ContractError if it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import ContractError
from lora.wrappers import AdaptedLayer, SavedModule


def require_same(found: Tensor, wanted: Tensor, what: str) -> None:
    if found.dtype != wanted.dtype or not torch.equal(found, wanted):
        raise ContractError(f"{what}: not bit-equal")


def require_near(found: Tensor, wanted: Tensor, what: str, k: float = 16) -> None:
    """Within k · eps(dtype) · max|wanted|."""
    found, wanted = found.detach(), wanted.detach()
    if found.shape != wanted.shape:
        raise ContractError(f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if found.numel() == 0:
        return
    bound = k * torch.finfo(found.dtype).eps * max(float(wanted.abs().max()), 1e-30)
    off = float((found - wanted).abs().max())
    if not off <= bound:
        raise ContractError(f"{what}: off by {off:.3g}, tolerance {bound:.3g}")


def require(good: bool, what: str) -> None:
    if not good:
        raise ContractError(what)


@contextmanager
def require_raise(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise ContractError(f"{what}: no {kind.__name__}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a failed operation must leave as it was: modules, bits, requires_grad, modes."""
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
    """Whether a snapshot still holds."""
    now = snapshot(model)
    bits, then = now.pop("bits"), before["bits"]
    if bits.keys() != then.keys() or any(now[key] != before[key] for key in now):
        return False
    return all(torch.equal(bits[key], then[key]) for key in bits)
