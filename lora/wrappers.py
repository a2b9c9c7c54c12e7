"""AdaptedLayer and SavedModule, which replace a layer; Selected, the base's trained parameters.

x ──┬── base layer: W x + b, frozen ──┐
    │                                 + ── y
    └── adapter: s B (A x) ───────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora import kernels
from lora.adapter import Adapter, specification
from lora.errors import MergeError
from lora.layers import View, views


class _StateDictUnlessMerged(nn.Module):
    """The state dict of a merged layer would hold W', to which the adapter beside it adds again."""

    kept: tuple[nn.Parameter, nn.Parameter | None] | None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_restored()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_restored()
        super()._load_from_state_dict(*args, **kwargs)

    def _check_restored(self) -> None:
        if self.kept is not None:
            raise MergeError(
                "a merged model has no state dict: it would hold W' and the adapter. Call"
                " lora.restore first, or lora.eject, which leaves the plain model with W'."
            )


class AdaptedLayer(_StateDictUnlessMerged):
    """A base layer and its named adapters, in the base layer's place.

    x (..., in) -> y (..., out), dtype of base_layer(x). Several active adapters add their deltas.
    Merging happens in lora.merge() only: never in train(), eval() or forward().
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict().train(base_layer.training)
        self.active: tuple[str, ...] = ()  # names of the adapters that act
        self.enabled = True  # False inside lora.disabled()
        # The base's W and b while it is merged
        self.kept = None
        self.forget_use()

    def forget_use(self) -> None:
        """Clears what training.Watch asks: did the model call the layer, did it read its weight?"""
        # nn.Module's own __setattr__ is slow, and torch.compile would guard on the flags.
        self.__dict__.update(was_called=False, was_read=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())  # nn.Linear names it input, Conv1D x
        if not torch.compiler.is_compiling():
            self.__dict__["was_called"] = True
        # Read from the dicts: nn.Module looks its children up in Python, at every call.
        inner: Any = self._modules
        if not self.active or not self.enabled or self.kept is not None:
            output: Tensor = inner["base_layer"](x)
            return output
        if not torch.is_grad_enabled() and (y := kernels.constant_output(self, x)) is not None:
            return y
        view, adapters = views(inner["base_layer"])[0], [inner["adapters"][n] for n in self.active]
        # Drawn here, so that a kernel and the specification drop the same elements.
        masks = [adapter.draw_mask(x) if adapter.dropout else None for adapter in adapters]
        y = kernels.attempt(adapters, view, x, masks)
        return specification(adapters, view, x, masks) if y is None else y

    @property
    def view(self) -> View:
        """The base layer's view: W (out, in) and b (out,), whatever kind of layer it is."""
        return views(self.base_layer)[0]

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name on this layer."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def __getattr__(self, name: str) -> Any:
        # What models read off their layers: weight, bias, in_features (T5: self.wo.weight.dtype).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            if name in ("in_features", "out_features"):  # which HF's Conv1D lacks
                return getattr(self.view, name)
            if name == "weight" and not torch.compiler.is_compiling():
                self.__dict__["was_read"] = True
            return getattr(self.base_layer, name)


class SavedModule(nn.Module):
    """A module trained as a whole: one copy per adapter, beside the frozen original."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.training = original_module.training
        self.original_module = original_module  # PEFT's name, which its readers look for
        self.copies = nn.ModuleDict().train(original_module.training)
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged = False

    @property
    def current(self) -> nn.Module:
        if not self.active or not self.enabled:
            return self.original_module
        return self.copies[self.active[-1]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    # Python looks these up on the class: a head that is a Sequential may be indexed and walked,
    # and one that is not is true, as every module is.
    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Any:
        return self.current[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)  # type: ignore[call-overload, no-any-return]

    def __len__(self) -> int:
        return len(self.current)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # weight, in_features and whatever else the model reads off the module itself
            if name in ("original_module", "copies"):
                raise
            return getattr(self.current, name)


class Selected:
    """Parameters of the base that train, by their names, and their frozen originals.

    The originals are on the CPU. While they act, the trained parameters are set aside and not
    overwritten, so that a later backward through them still finds their values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], keeps: bool) -> None:
        self.names = tuple(parameters)
        self.originals: dict[str, Tensor] = {}
        self.aside: dict[str, nn.Parameter] = {}
        if keeps:
            self.keep(parameters)
        self.active = True
        self.enabled = True
        self.merged = False

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the values that the parameters have now for the originals."""
        for name, parameter in parameters.items():
            device = "meta" if parameter.is_meta else "cpu"
            self.originals[name] = parameter.detach().to(device, copy=True)

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Reset the trained parameters to the originals, taken now if they had no values."""
        if any(original.is_meta for original in self.originals.values()):
            self.keep(parameters)
        for name, original in self.originals.items():
            parameters[name].data.copy_(original)

    def place(self, homes: Mapping[str, Sequence[tuple[nn.Module, str]]], acting: bool) -> None:
        """Let the trained values act, or the originals, at every module that holds them."""
        for name, original in self.originals.items():
            if acting == (name not in self.aside):
                continue
            module, leaf = homes[name][0]
            now = module._parameters[leaf]
            assert now is not None
            if acting:
                new = self.aside.pop(name)
                new.data = new.data.to(now.device, now.dtype)
            else:
                self.aside[name] = now
                new = nn.Parameter(original.to(now.device, now.dtype), requires_grad=False)
            for module, leaf in homes[name]:
                module._parameters[leaf] = new
