"""The small test models of the contract, with two layers of one kind, and helpers for clauses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora.errors import MergeError, TargetError
from lora.injection import inject
from lora.inventory import injected, trained_parameters, wrappers_of
from lora.merging import merge
from lora.nf4 import NF4Linear, dequantize_layers
from lora.settings import MethodConfig
from lora.testing._requirements import require, require_raise, snapshot, unchanged


@dataclass(frozen=True)
class Case:
    """A kind of layer to adapt, in one dtype, on one device, with or without a bias."""

    kind: str  # Linear, Conv1D, Embedding or NF4Linear
    bias: bool
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        without = "" if self.bias or self.kind == "Embedding" else ", no bias"
        return f"{self.kind}{without}, {dtype}{'' if self.device == 'cpu' else f', {self.device}'}"


def cases(device: str = "cpu") -> list[Case]:
    """Returns every case on the device. Conv1D needs transformers, and is left out without it."""
    dtypes = (torch.float32, torch.bfloat16)
    result = [Case("Linear", bias, dtype) for bias in (True, False) for dtype in dtypes]
    result.append(Case("Linear", True, torch.float16))
    result += [Case("NF4Linear", bias, dtype) for bias, dtype in zip((True, False), dtypes)]
    result += [Case("Embedding", False, dtype) for dtype in dtypes]
    try:
        import transformers.pytorch_utils  # noqa: F401
    except ImportError:
        pass
    else:
        result += [Case("Conv1D", True, dtype) for dtype in dtypes]  # which always has a bias
    return [replace(case, device=device) for case in result]


class Toy(nn.Module):
    """Two layers of the case's kind and a norm that no method targets.

    The model is nearly linear. If it saturated, gradients would underflow to zero, and the clauses
    that require a gradient would fail for no fault of the method.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = layer_of(case, 12, 16)
        self.norm = nn.LayerNorm(16)
        self.second = layer_of(case, 16, 10)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                width = parameter.shape[0] ** 0.5
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, device="cpu") / width
                )
        if case.kind == "NF4Linear":
            for name in ("first", "second"):
                setattr(self, name, NF4Linear.of(getattr(self, name)))
        self.to(case.device, case.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + 0.1 * torch.sin(self.norm(h))
        # An embedding takes ids, not the other embedding's output.
        output: Tensor = self.second(h) if x.is_floating_point() else h[..., :10] + self.second(x)
        return output


def layer_of(case: Case, in_features: int, out_features: int) -> nn.Module:
    """Returns a layer of the case's kind; nn.Linear for NF4Linear, to be quantized later."""
    if case.kind == "Embedding":
        return nn.Embedding(in_features, out_features)
    if case.kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        module: nn.Module = Conv1D(out_features, in_features)
        return module
    return nn.Linear(in_features, out_features, bias=case.bias)


def input_of(case: Case, seed: int = 2) -> Tensor:
    """Returns an input of the toy: ids (3, 5), or values (3, 5, 12) in the case's dtype."""
    generator = torch.Generator().manual_seed(seed)
    if case.kind == "Embedding":
        return torch.randint(0, 12, (3, 5), generator=generator, device="cpu").to(case.device)
    x = torch.randn(3, 5, 12, generator=generator, device="cpu")
    return x.to(case.device, case.dtype)


def to_float32(x: Tensor) -> Tensor:
    """Returns x in float32, or x itself if it holds ids."""
    return x.float() if x.is_floating_point() else x


def injected_toy(config: MethodConfig, case: Case, moved: bool = False) -> Toy:
    """Returns a toy with an adapter, in eval mode; if `moved`, with perturbed parameters."""
    model = Toy(case)
    inject(model, config)
    if moved:
        perturb(model)
    return model.eval()


def perturb(model: nn.Module, name: str = "default", size: float = 0.3) -> None:
    """Add fixed random values of the given size to every trained parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model, name).values():
            shift = size * torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.add_(shift.to(parameter.device, parameter.dtype))


def make_mergeable(model: nn.Module) -> None:
    """Dequantize packed layers, and require that a merge is refused before that."""
    if any(layer.view.packed for layer in wrappers_of(model)[0].values()):
        before = snapshot(model)
        with require_raise(MergeError, "merging into a packed weight"):
            merge(model)
        require(unchanged(before, model), "the refused merge changed the model")
        dequantize_layers(model)


def trains(config: MethodConfig, case: Case) -> bool:
    """True if the method can train the case's layers. Requires a message that says so if not."""
    try:
        inject(Toy(case), config)
    except TargetError as error:
        require("cannot train" in str(error), f"refused for another reason: {error}")
        return False
    return True


def trains_base(model: nn.Module) -> bool:
    """True if the model's adapter trains parameters of the base."""
    return bool(injected(model)["default"].selected)
