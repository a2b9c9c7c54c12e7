"""Views: one interface to the weight (out, in) of every kind of layer that can have an adapter.

A method states its equation once, for a weight W (out, in) and a bias b (out,) or None. A view
says where a module keeps them and how it applies them, so that no method knows a layer's kind.

    kind           stored weight   W          x
    nn.Linear      (out, in)       weight     (..., in)
    HF Conv1D      (in, out)       weight.T   (..., in)   GPT-2's, transformers.pytorch_utils.Conv1D
    nn.Embedding   (vocab, dim)    weight.T   ids (...), which pick columns: in = vocab, out = dim
    NF4Linear      four bits       unpacked   (..., in)   nf4, which adds itself to VIEWS
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import TargetError
from lora.patterns import compiled


@dataclass(slots=True, eq=False)
class View:
    """Where `module` keeps one linear map x -> y (..., out), and its W (out, in) and b (out,)."""

    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool  # True if the module stores W as (in, out)
    of_ids: bool = False  # True if x is ids (...) and not (..., in)
    packed: ClassVar[bool] = False  # True if W is unpacked from what is stored at every use

    def parameters(self) -> tuple[Any, Any]:
        """The weight and the bias (or None) as the module stores them."""
        parameters = own_parameters(self.module)
        return parameters["weight"], parameters.get("bias")

    def read(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in), which shares the module's memory, and b (out,) or None."""
        module: Any = self.module
        weight, bias = module.weight, getattr(module, "bias", None)
        if hasattr(weight, "full_tensor"):  # sharded over several processes
            weight, bias = gathered(weight), gathered(bias)
        return (weight.T if self.transposed else weight), bias

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        dtype: torch.dtype = self.parameters()[0].dtype
        return dtype

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that W is made of, for backward to keep without a copy."""
        return (self.parameters()[0],)

    def unpacked(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """W (out, in) from what stored() gave, maybe in memory that the next call overwrites.

        A packed weight is unpacked in `dtype`; another one keeps its own.
        """
        (weight,) = stored
        return weight.t() if self.transposed else weight


def in_pieces(tensor: Any) -> bool:
    """True if a tensor is sharded over several processes: torch's DTensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Any:
    """The whole tensor, or None. Every process must call it to gather a sharded one."""
    return tensor.full_tensor() if in_pieces(tensor) else tensor


VIEWS: dict[type[nn.Module], type[View]] = {}  # further kinds of linear layer: nf4 adds its own


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's parameters by name, without its children's. torch.func puts tensors in their
    place, and replicas of nn.DataParallel keep tensors under another attribute."""
    # Not by getattr: nn.Module looks a missing name up in Python, for microseconds a call.
    # Replicas list no bias that is None.
    former = module.__dict__.get("_former_parameters")
    return {**module._parameters, **former} if former else module._parameters


def kind(module: nn.Module) -> str | None:
    """The name of the module's kind, or None if no view of it exists."""
    # Parametrized and weight-normed layers keep no plain weight and bias: not this way. Asked for
    # one by one, since torch.compile of torch 2.11 cannot compare a set with keys().
    plain = module._parameters
    if type(module) is nn.Linear and "weight" in plain and "bias" in plain:
        return "Linear"
    return type(module).__name__ if type(module) in VIEWS else _rare_kind(module)


def _rare_kind(module: nn.Module) -> str | None:
    """The kind of a module that is not plainly nn.Linear.

    A subclass of nn.Linear counts if its forward computes x Wᵀ + b and nothing else. A subclass of
    nn.Embedding may scale what it looks up: apply() calls its forward. torch's
    NonDynamicallyQuantizableLinear is never called: nn.MultiheadAttention reads its weight, and an
    adapter around it would do nothing.
    """
    parameters = own_parameters(module)
    weight = parameters.get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        return None  # parametrized, weight-normed or lazy: W is computed elsewhere, or not yet
    if isinstance(module, nn.Embedding):
        # max_norm writes to the weight at every look-up. Autograd cannot transpose the sparse
        # gradient of a factor.
        plain = module.max_norm is None and not module.sparse
        good = plain and _takes_ids_alone(type(module).forward)
        return "Embedding" if good else None
    if "bias" not in parameters:
        return None  # so is b
    if isinstance(module, nn.Linear):
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        return "Linear" if _is_linear(type(module), parameters["bias"] is not None) else None
    # By name: the core does not load transformers.
    if f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        return "Conv1D"
    return None


_READ = {"weight", "bias", "T", "mT", "t", "transpose", "matmul", "addmm", "linear"}
_READ |= {"F", "nn", "torch", "functional"}
_LINEAR: dict[tuple[type[nn.Linear], bool], bool] = {}  # a dict, since torch.compile reads it too


def _is_linear(kind: type[nn.Linear], bias: bool) -> bool:
    """True if the class's forward computes x Wᵀ + b of its weight and bias, as FalconLinear's does.

    It may name nothing but those two and the operations of a linear map, so that neither training
    nor another attribute changes what it does; what it gives for small tensors then decides.
    """
    if kind.forward is nn.Linear.forward:
        return True
    if (kind, bias) not in _LINEAR:
        code = getattr(kind.forward, "__code__", None)
        plain = code is not None and not code.co_freevars and _READ.issuperset(code.co_names)
        with torch.utils._python_dispatch._disable_current_modes():
            _LINEAR[kind, bias] = plain and _tried(kind, bias)
    return _LINEAR[kind, bias]


def _tried(kind: type[nn.Linear], bias: bool) -> bool:
    """True if a layer of the class, 3 -> 2, gives x Wᵀ + b."""
    x = torch.arange(12.0, dtype=torch.float64, device="cpu").reshape(2, 2, 3).sin()
    W, b = x[0].cos(), x[1, :, 0] if bias else None
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    try:
        layer.register_parameter("weight", nn.Parameter(W, requires_grad=False))
        layer.register_parameter("bias", None if b is None else nn.Parameter(b, False))
        y = layer.forward(x)
    except Exception:  # its forward takes other arguments or shapes
        return False
    good = isinstance(y, Tensor) and y.shape == (2, 2, 2)
    return good and torch.allclose(y, F.linear(x, W, b), rtol=0, atol=1e-12)


@functools.cache
def _takes_ids_alone(forward: Callable[..., Any]) -> bool:
    """True if forward takes only ids. OPT's position embedding also takes a mask."""
    return len(inspect.signature(forward).parameters) == 2  # self and the ids


def views(module: nn.Module) -> list[View]:
    """The module's views. Raises TargetError if it has none."""
    plain = module._parameters
    if type(module) is nn.Linear and "weight" in plain and "bias" in plain:
        rows, columns = module.weight.shape
        return [View(module, rows, columns, transposed=False)]
    return [_rare_view(module)]


def _rare_view(layer: Any) -> View:
    """The view of a module that is not plainly nn.Linear."""
    name = kind(layer)
    if name is None:
        raise TargetError(
            f"no view for {type(layer).__name__}: adapters work on nn.Linear, nn.Embedding and HF"
            " Conv1D."
        )
    if type(layer) in VIEWS:
        return VIEWS[type(layer)](layer, layer.out_features, layer.in_features, False)
    rows, columns = layer.weight.shape
    if name == "Linear":
        return View(layer, rows, columns, transposed=False)
    return View(layer, columns, rows, transposed=True, of_ids=name == "Embedding")


def apply(view: View, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """The module's map with W (out, in) and b (out,), in W's dtype, without the module's hooks.
    `out` may be any size."""
    if view.of_ids:  # the module's own forward: it may scale
        module = view.module if plain_call(view.module) else _without_hooks(view.module)
        y: Tensor = torch.func.functional_call(module, {"weight": W.T}, (x,))
        return y if b is None else y + b
    return F.linear(x.to(W.dtype), W, None if b is None else b.to(W.dtype))


# accelerate patches `forward` to fetch an offloaded weight.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "forward",
)
"""Attributes of a module by which a call of it does more than its class's forward."""


def plain_call(module: nn.Module) -> bool:
    """True if the module has no hooks and no patched `forward`."""
    # A kernel reads the layer's weight and does not call it: hooks would not run.
    return not any(map(vars(module).get, HOOKS))


def _without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy of the module whose call is its class's forward and nothing else."""
    bare = copy.copy(module)
    vars(bare).update({name: {} for name in HOOKS}, _parameters=dict(own_parameters(module)))
    del vars(bare)["forward"]
    return bare


def backbone(model: nn.Module) -> str:
    """The path of the pretrained part, "" if that is the whole model. The rest are heads."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in model._modules else ""


def inside(name: str, whole: str) -> bool:
    """True if a dotted name is `whole`, or the name of something inside it."""
    return not whole or name == whole or name.startswith(whole + ".")


def fits(name: str, entries: str | tuple[str, ...]) -> bool:
    """True if a name fits a regular expression as a whole, or equals an entry or ends in one."""
    if isinstance(entries, str):
        return compiled(entries).fullmatch(name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in entries)
