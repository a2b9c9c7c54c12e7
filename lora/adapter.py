"""Adapter: the parameters of one method on one layer, and the equation that they stand for.

    W' = W + s B A          a method states merged(W, b); everything else follows from it
    y  = x W'ᵀ + b'         the specification, without dropout
    y  = x Wᵀ + b + (m ∘ x)(W' − W)ᵀ + (b' − b)       in training, for the dropout mask m

A kernel may compute the same faster (lora.kernels). lora.testing proves values and gradients equal
to the specification.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.errors import MergeError
from lora.kernels.dropout import Mask, draw, drop
from lora.kernels.products import check_loaded
from lora.layers import HOOKS, View, apply
from lora.method import Method
from lora.settings import AdapterConfig


class Adapter(Method, nn.Module):
    """The parameters of one method on one layer.

    A method has eight names: `name`, `paper`, `Config` and `peft_type` (Method), and here `merged`,
    `fill`, `size` and `keys`. Initial values are a function of the seed and of `module`, the
    layer's name in the model.
    """

    keys: Mapping[str, str] = {}
    """Parameter name -> its key in PEFT's file, if the two differ."""
    additive: ClassVar[bool] = False
    """True if W' − W does not depend on W: several such adapters on one layer add up."""

    config: Any
    dropout: float = 0.0  # the probability of dropping an element of the adapter's input
    frozen: frozenset[str] = frozenset()  # names of parameters that are not trained

    def __init__(self, view: View, config: AdapterConfig, module: str) -> None:
        super().__init__()
        self.config = config
        self.module_name = module

    @abstractmethod
    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The equation: W' (out, in) and b' (out,) from W and b."""

    @abstractmethod
    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        """Fill every parameter with its initial values; `generator(parameter)` seeds one."""

    @classmethod
    @abstractmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        """The number of parameters on one layer, in closed form, without shared tensors."""

    def delta(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        """(m ∘ x)(W' − W)ᵀ + (b' − b): what the adapter adds to the base layer's output."""
        W, b = view.read()
        W1, b1 = self.merged(W, b)
        shift = None if b1 is None or b1 is b else b1 if b is None else b1 - b
        return apply(view, drop(x, mask), W1 - W, shift)

    def draw_mask(self, x: Tensor) -> Mask | None:
        """The dropout mask for x, or None. Ids have no elements to drop, here and in PEFT."""
        if not self.training or self.dropout == 0.0 or not x.is_floating_point():
            return None
        return draw(self.dropout, x)

    def new(self, view: View, *shape: int) -> nn.Parameter:
        """An unfilled parameter on the layer's device, in float32 at least."""
        weight, _ = view.parameters()
        # AdamW's small steps are lost in 16 bits: adapters are trained in float32.
        dtype = torch.promote_types(view.dtype, torch.float32)
        return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

    def parameters_by_key(self) -> dict[str, Tensor]:
        """The parameters by their keys in the file; a shared one's begins with `base_model.`."""
        return {self.keys.get(name, name): p for name, p in self.named_parameters()}

    def tensors_to_save(self) -> dict[str, Tensor]:
        """The tensors to write under those keys, usually the parameters themselves."""
        return self.parameters_by_key()


def specification(
    adapters: Sequence[Adapter], view: View, x: Tensor, masks: Sequence[Mask | None]
) -> Tensor:
    """The output of a layer under its adapters: x (..., in) -> y (..., out), dtype of the layer's.

    Slow, and by definition right: every kernel is proved equal to it. A hook on the layer sees the
    output without adapters, once.
    """
    W, b = view.read()
    hooked = any(map(vars(view.module).get, HOOKS))
    if hooked:
        check_loaded(adapters, view, x)
    if len(adapters) == 1 and masks[0] is None and not hooked:
        y = apply(view, x, *adapters[0].merged(W, b))
    else:
        y = view.module(x) if hooked else apply(view, x, W, b)
        for adapter, mask in zip(adapters, masks, strict=True):
            y = y + adapter.delta(view, x, mask)
    # Under autocast the output of a linear layer has autocast's dtype already.
    if x.is_meta or view.of_ids or not torch.is_autocast_enabled(x.device.type):
        y = y.to(W.dtype)
    return y


def trained(adapter: Adapter) -> list[nn.Parameter]:
    """The adapter's parameters that are not frozen."""
    return [p for name, p in adapter.named_parameters() if name not in adapter.frozen]


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping of keywords, a tuple of arguments, or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def seeded(seed: int, module: str, parameter: str) -> torch.Generator:
    """A CPU generator for one tensor, seeded by (seed, module, parameter)."""
    # A hash and not Python's hash(), which differs from process to process.
    digest = hashlib.sha256(f"{seed}\n{module}\n{parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(adapter: Adapter, view: View, seed: int) -> None:
    """Fill the adapter's parameters. No other random state of the process matters."""
    # One generator per tensor: to add or remove a layer changes no other layer's values.
    with torch.no_grad():
        adapter.fill(view, lambda parameter: seeded(seed, adapter.module_name, parameter))


def check_additive(names: tuple[str, ...], methods: Sequence[type[Method]]) -> None:
    """Raise MergeError if adapters of these methods cannot be active together."""
    alone = [m.name for m in methods if not getattr(m, "additive", False)]
    if len(names) > 1 and alone:
        raise MergeError(
            f"adapters {', '.join(names)} cannot be active together: the deltas of"
            f" {', '.join(sorted(set(alone)))} do not add up. Activate one of them."
        )
