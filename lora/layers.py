"""Views: one (out, in) face for every kind of layer that an adapter can sit on.

A method states its equation once, for a weight W (out, in) and a bias b (out,) or None. A view
says where a module keeps them and how it applies them, so that no method knows a layer's kind.

    kind        stored weight   face
    nn.Linear   (out, in)       weight
    HF Conv1D   (in, out)       weight.T     GPT-2's layer, transformers.pytorch_utils.Conv1D
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import TargetError


@dataclass(frozen=True)
class View:
    """Where `module` keeps one linear map x (..., in) -> y (..., out)."""

    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool  # True where the module stores (in, out)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in), sharing the module's storage, and b (out,) or None."""
        weight, bias = self.parameters()
        return (weight.T if self.transposed else weight), bias

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The weight and the bias as the module stores them."""
        weight = self.module.weight
        bias = self.module.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        return weight, bias


def kind(module: nn.Module) -> str | None:
    """The name of the module's kind, None where no view exists.

    A subclass with a forward of its own is no plain linear map. torch's
    NonDynamicallyQuantizableLinear is never called at all: nn.MultiheadAttention reads its
    weight, so that an adapter around it would be dead.
    """
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        return None  # parametrized, weight-normed or lazy: W is computed elsewhere, or not yet
    if "bias" not in module._parameters:
        return None  # and so is b
    if isinstance(module, nn.Linear):
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        return "Linear" if type(module).forward is nn.Linear.forward else None
    # By name: the core does not load transformers.
    if f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        return "Conv1D"
    return None


def views(module: nn.Module) -> list[View]:
    """The module's views. Raises TargetError where it has none."""
    found = kind(module)
    if found is None:
        raise TargetError(
            f"no view for {type(module).__name__}: adapters sit on nn.Linear and HF Conv1D."
        )
    rows, columns = module.weight.shape  # type: ignore[misc]
    if found == "Conv1D":
        return [View(module, int(columns), int(rows), transposed=True)]
    return [View(module, int(rows), int(columns), transposed=False)]


def apply(view: View, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, in W's dtype: the module's map with W (out, in), b (out,) for its own."""
    return F.linear(x.to(W.dtype), W, None if b is None else b.to(W.dtype))
