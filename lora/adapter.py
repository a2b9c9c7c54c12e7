"""A method states one equation; the layer around it does everything else.

    Method          name, paper, Config; every subclass that declares a name is in METHODS
    ├── Adapter     new parameters on one layer, and the equation `merged(W, b)`
    └── Selection   no new parameters: it trains some of those that exist
    AdaptedLayer    a base layer and its named adapters, in the base layer's place
    SavedModule     a module trained as a whole: a copy beside the frozen original
    Selected        parameters of the base that train, beside their frozen originals

Without dropout y = apply(view, x, *merged(W, b)). In training with dropout, for the mask m,
y = apply(view, x, W, b) + apply(view, m ∘ x, W' − W, b' − b). That is the specification; a method
overrides `compute` for speed only, and the contract (lora.testing) proves values and gradients
equal to it.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import EllipsisType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.declared import declared, fitted, words
from lora.declared import is_number as is_number
from lora.errors import ConfigError, MergeError, SettingError
from lora.kernels import fused
from lora.kernels.dropout import Mask, draw, drop
from lora.kernels.fused import Update, autocast_on, unseen, without_autocast
from lora.kernels.siblings import plain, reading_of
from lora.layers import View, apply, in_pieces, views
from lora.nf4 import NF4
from lora.patterns import BLOCKS, check_pattern

METHODS: dict[str, type[Method]] = {}

LARGEST = 2**31 - 1  # of a whole number in a setting: what counts or sizes can be
MOST_ENTRIES = 50_000  # of a list or a table of layers' names

SHORTHANDS = ("all-linear", "attention", "input-embedding")
"""Words that target_modules takes for layers' names; what they mean is targets.py's."""


def check(field: str, value: object, wanted: str, good: bool) -> None:
    """Raise ConfigError unless `good`."""
    if not good:
        raise SettingError(field, f"must be {wanted}, found {value!r}.")


def names_tuple(field: str, value: object) -> tuple[str, ...]:
    """A list or tuple of non-empty strings, as a tuple without repeats."""
    good = isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(entry, str) and entry for entry in value
    )
    check(field, value, "a list of module names", good)
    assert isinstance(value, list | tuple | set | frozenset)
    check_count(field, len(value))
    ordered = sorted(value) if isinstance(value, set | frozenset) else value
    return tuple(dict.fromkeys(ordered))


def check_count(field: str, count: int) -> None:
    """Raise ConfigError if a file lists more than any model has layers: each entry is compared with
    each layer's name."""
    if count > MOST_ENTRIES:
        raise ConfigError(f"{field} has {count:,} entries, at most {MOST_ENTRIES:,} are read.")


def whole_number(field: str, value: object, least: int = 1, most: int = LARGEST) -> None:
    """Raise ConfigError unless the value is an int from `least` to `most`."""
    good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    above = isinstance(value, int) and value > most
    limit = f", and at most {most:,}" if above else ""
    long = isinstance(value, int) and value.bit_length() > 64  # may have millions of digits
    shown = f"one of {value.bit_length()} bits" if long else value  # type: ignore[attr-defined]
    check(field, shown, f"a whole number of at least {least}{limit}", good)


def positive(field: str, value: object) -> None:
    """Raise ConfigError unless the value is a number above 0."""
    check(field, value, "a positive number", is_number(value) and value > 0)  # type: ignore[operator]


def strength(field: str, value: object) -> None:
    """Raise ConfigError unless the value can scale an update: beyond a million what it gives would
    leave the range of float32."""
    good = is_number(value) and 0 < value <= 1e6  # type: ignore[operator]
    check(field, value, "a positive number of a million at most", good)


def probability(field: str, value: object) -> None:
    """Raise ConfigError unless the value is a dropout's probability."""
    check(field, value, "a number with 0 <= p < 1", is_number(value) and 0 <= value < 1)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The settings of a method. Fields bear the names of PEFT's adapter_config.json."""

    training_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change what a saved adapter computes."""
    unsaved: ClassVar[frozenset[str]] = frozenset()
    """Those of them that PEFT's file does not know."""
    written: ClassVar[frozenset[str]] = frozenset()
    """Fields that a save fills, and no user."""

    def __post_init__(self) -> None:
        for name, kind in declared(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, fitted(value, kind))
            except TypeError:
                check(name, value, words(kind), False)


@dataclass(frozen=True, kw_only=True)
class PartialConfig(MethodConfig):
    """The settings of a method that leaves most of the base frozen."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained as a whole and saved with the adapter, such as a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "modules_to_save", names_tuple("modules_to_save", self.modules_to_save)
        )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(PartialConfig):
    """The settings of a method that wraps layers."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers to adapt: names or their dotted endings, a regular expression, all-linear,
    attention (its projections, of the architectures that are known), or input-embedding."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers to leave alone, in the same forms."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers of the blocks to adapt, from 0; for names in target_modules. Default: all."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the lists that the blocks are numbered in, such as layers or h. Default: any."""

    def __post_init__(self) -> None:
        for field in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, field)
            if isinstance(value, int | str):  # PEFT takes one without its list
                object.__setattr__(self, field, (value,))
        super().__post_init__()
        for field in ("target_modules", "exclude_modules"):
            value = getattr(self, field)
            if value is None and field == "exclude_modules":
                continue
            if isinstance(value, str):
                words_for = ", ".join(SHORTHANDS)
                check(field, value, f"a pattern, names, or one of {words_for}", bool(value))
                check_pattern(field, value)
            else:
                names = names_tuple(field, value)
                check(field, value, "at least one name", bool(names))
                # One name after a flag arrives as a tuple; the word and not the name is meant.
                short = len(names) == 1 and names[0] in SHORTHANDS
                object.__setattr__(self, field, names[0] if short else names)
        layers = tuple(dict.fromkeys(self.layers_to_transform))
        good = min(layers, default=0) >= 0
        check("layers_to_transform", layers, "numbers of blocks, from 0", good)
        object.__setattr__(self, "layers_to_transform", layers)
        lists = names_tuple("layers_pattern", self.layers_pattern)
        object.__setattr__(self, "layers_pattern", lists)
        for one in lists:
            check_pattern("layers_pattern", one, BLOCKS)
        listed = self.target_modules in SHORTHANDS or not isinstance(self.target_modules, str)
        check("layers_to_transform", layers, "left out beside a pattern", listed or not layers)
        check("layers_pattern", lists, "beside layers_to_transform", bool(layers) or not lists)


class Method(ABC):
    """What every method declares. A subclass with a `name` of its own is registered."""

    name: ClassVar[str]
    paper: ClassVar[str]
    when: ClassVar[str] = ""
    """When to choose it, in a line."""
    Config: ClassVar[type[MethodConfig]]
    peft_type: ClassVar[str]
    in_peft: ClassVar[bool] = True
    """Whether PEFT has the method, under peft_type."""
    learning_rate: ClassVar[float] = 1e-3
    """The peak rate that `lora train` takes where none is given."""
    states: ClassVar[Mapping[str, bool]] = {}
    """Keys of PEFT's file that tell apart the methods of one peft_type; an absent key is False."""
    neutral: ClassVar[Mapping[str, object | EllipsisType]] = {}
    """Keys of PEFT's file that are no field here, with the value under which the mathematics
    stays as it is here; ... means under any. Empty values (None, False, [], {}) always are."""
    keeps_base: ClassVar[bool] = True
    """Whether the base can be had back: disabled(), merge and restore need it."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Settings under which the contract is checked, where the defaults would hide a fault: a
    factor that is 1, a term that is 0."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further settings under which it is checked, by name."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Clauses of the contract that do not apply, each with the reason."""

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        """The reason why a clause does not apply to a layer, with or without bias, as set."""
        return cls.exempt.get(clause)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = METHODS.get(cls.name)
            # The same class defined anew is a notebook's cell run twice.
            same = ("__module__", "__qualname__")
            if known is not None and any(getattr(known, k) != getattr(cls, k) for k in same):
                raise ConfigError(
                    f"two methods are named {cls.name!r}: {known}, {cls}. Rename one."
                )
            for other in METHODS.values():
                if other is not known and other.Config is cls.Config:
                    raise ConfigError(f"{cls} and {other} share one Config. Give each its own.")
            METHODS[cls.name] = cls

    @classmethod
    def matches(cls, adapter_config: Mapping[str, Any]) -> bool:
        """Whether a file's adapter_config.json states this method's equation."""
        same = all(bool(adapter_config.get(k)) == value for k, value in cls.states.items())
        return same and adapter_config.get("peft_type") == cls.peft_type

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """The settings as adapter_config.json states them; `adapters` by the layers' names."""
        settings = {k: v for k, v in config_fields(config).items() if k not in config.unsaved}
        fixed = {key: value for key, value in cls.neutral.items() if isinstance(value, str)}
        return settings | fixed | dict(cls.states)

    @classmethod
    def read_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A file's settings as Config takes them. Raises ConfigError where they cannot be had."""
        return dict(settings)


class Selection(Method):
    """A method that wraps nothing: it trains parameters that exist, and saves those.

    The originals are kept, so that disabled(), restore() and eject() find the base again; a
    method for which that costs too much declares keeps_base = False.
    """

    @classmethod
    @abstractmethod
    def selects(cls, name: str, model: nn.Module, config: Any) -> bool:
        """Whether the model's parameter of this name trains."""

    @classmethod
    def check_model(cls, model: nn.Module, layers: tuple[str, ...], config: Any) -> None:
        """Raise TargetError if a setting names what is none of the layers with parameters."""

    @classmethod
    def key(cls, name: str) -> str:
        """The key in PEFT's file, less the prefix, of a parameter that it selects."""
        return name


class Adapter(Method, nn.Module):
    """The parameters of one method on one layer, and its equation.

    `module` is the layer's name in the model: with the seed it determines the initial values.
    """

    additive: ClassVar[bool] = False
    """W' − W does not depend on W, so that several adapters on a layer sum."""

    unfiled: ClassVar[frozenset[str]] = frozenset()
    """Fields of AdapterConfig that PEFT's type lacks: the layers that they leave are named."""

    config: Any
    dropout: float = 0.0
    """The probability of dropping an element of the adapter's input in training."""
    keys: Mapping[str, str] = {}
    """Parameter -> its key in PEFT's file, where the two differ."""
    frozen: frozenset[str] = frozenset()
    """Parameters that do not train."""
    leader: str | None = None
    """The layer whose adapter's parameters it takes, since its own is tied to that."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Attributes besides tensors that training changes, of JSON's kinds."""

    def __init__(self, view: View, config: AdapterConfig, module: str) -> None:
        super().__init__()
        self.config = config
        self.module_name = module

    @abstractmethod
    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The equation: W' (out, in) and b' (out,) from W and b."""

    @abstractmethod
    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        """Fill every parameter with its initial values; `generator(parameter)` is its own."""

    @classmethod
    @abstractmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        """The parameters on one layer, in closed form; what `shared` gives is not counted."""

    @classmethod
    def shared(cls, views: Sequence[View], config: Any) -> dict[str, Tensor]:
        """Frozen tensors that all the adapters of one injection share, by parameter name."""
        return {}

    @classmethod
    def saves_shared(cls, config: Any) -> bool:
        """Whether the file holds them, under their names at its root."""
        return True

    @classmethod
    def selects(cls, name: str, targeted: bool, config: Any) -> bool:
        """Whether the base's parameter of this name, of an adapted layer or not, trains too."""
        return False

    @classmethod
    def check_targets(cls, config: Any, targets: Sequence[str]) -> None:
        """Raise TargetError where a setting names layers that are none of the targets."""

    @classmethod
    def further(
        cls,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: Any,
        targets: Sequence[str],
    ) -> Mapping[str, Callable[[View, Any, str], Adapter]]:
        """Layers adapted besides `targets`, those of target_modules, and what makes the adapter of
        each."""
        return {}

    def follow(self, leader: Any) -> None:
        """Take the parameters of the adapter on a layer whose weight is tied to this one's; only
        asked of what further() makes."""
        raise NotImplementedError

    @classmethod
    def needs_batches(cls, config: Any) -> bool:
        """Whether calibrate() has to run."""
        return False

    @classmethod
    def calibrate(
        cls, placed: Sequence[tuple[Any, View]], model: nn.Module, batches: Iterable[Any]
    ) -> None:
        """Fill what needs data: each adapter with its view in the model, which is as it was
        before the injection and has to be so again. forward() passes a batch through it."""
        raise NotImplementedError

    @classmethod
    def takes_up(cls, config: Any) -> bool:
        """Whether its start takes up what packing the base leaves: pack() needs W as it was."""
        return False

    @classmethod
    def needs_packing(cls, config: Any) -> bool:
        """Whether its start is of no meaning on a base that is not packed with it."""
        return False

    def pack(self, W: Tensor, quantize: Callable[[Tensor], NF4]) -> NF4:
        """What is to lie beneath it in W's place, once its parameters are filled."""
        return quantize(W)

    def param_groups(self) -> dict[float, list[nn.Parameter]]:
        """What trains, by the multiple of the learning rate that it trains at."""
        trained = [p for name, p in self.named_parameters() if name not in self.frozen]
        return {1.0: trained}

    @classmethod
    def penalty(cls, adapters: Sequence[Any], config: Any) -> Tensor | None:
        """A term to add to the loss."""
        return None

    @classmethod
    def check_steps(cls, config: Any, total: int) -> None:
        """Raise ConfigError where a training of so many steps cannot be."""

    @classmethod
    def after_step(cls, adapters: Sequence[Any], config: Any, step: int, total: int) -> None:
        """Runs after optimizer.step() number `step` of `total`, from 1, before zero_grad()."""

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        settings = super().file_settings(config, adapters)
        if any(settings[name] for name in cls.unfiled):
            settings["target_modules"] = "all-linear"  # to be named one by one
        for name in ("layers_to_transform", "layers_pattern"):
            settings[name] = settings[name] or None
        return {key: value for key, value in settings.items() if key not in cls.unfiled}

    def placed(self) -> dict[str, Tensor]:
        """The parameters by their keys in the file; of what is shared it begins `base_model.`."""
        return {self.keys.get(name, name): p for name, p in self.named_parameters()}

    def stored(self) -> dict[str, Tensor]:
        """What the file holds of them, where that is something else."""
        return self.placed()

    def own_size(self) -> int:
        """How many parameters are its own."""
        return sum(
            p.numel() for key, p in self.placed().items() if not key.startswith("base_model.")
        )

    def new(self, view: View, *shape: int) -> nn.Parameter:
        """An unfilled parameter where the layer is, in float32 at least, whatever its dtype."""
        weight, _ = view.parameters()
        dtype = torch.promote_types(view.dtype, torch.float32)
        return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

    def draw_mask(self, x: Tensor) -> Mask | None:
        """The dropout mask for x; None where nothing is dropped.

        Ids have no element to drop: on an Embedding dropout does nothing, as in PEFT.
        """
        if not self.training or self.dropout == 0.0 or not x.is_floating_point():
            return None
        return draw(self.dropout, x)

    def delta(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        """(W' − W)(m ∘ x) + b' − b: what an additive method adds to the base layer's output."""
        W, b = view.read()
        W1, b1 = self.merged(W, b)
        shift = None if b1 is None or b1 is b else b1 if b is None else b1 - b
        return apply(view, drop(x, mask), W1 - W, shift)

    def reference(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        """The specification, dtype of the base layer's output."""
        W, b = view.read()
        if mask is None:
            y = apply(view, x, *self.merged(W, b))
        else:
            y = apply(view, x, W, b) + Adapter.delta(self, view, x, mask)
        # Autocast has chosen a linear layer's dtype already, as it does for the base layer.
        return y if autocast_on(x) and not view.of_ids else y.to(W.dtype)

    def low_rank(self, view: View) -> Update | None:
        """B, A where the method only adds scaling · (B A − B₀ A₀) to W, which the fused path then
        computes; None of any other."""
        return None

    def compute(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        """The adapted layer's output y (..., out): of an additive method the base layer's plus
        delta(). Override for speed, never for another result."""
        update = self.low_rank(view) if fused.possible(view, x) else None
        if update is not None:
            return fused.low_rank(x, [update], mask)[0]
        if not self.additive or in_pieces(view.parameters()[0]):
            return self.reference(view, x, mask)
        y: Tensor = view.module(x)
        return (y + self.delta(view, x, mask)).to(y.dtype)


class AdaptedLayer(nn.Module):
    """A base layer and its named adapters: what takes the base layer's place in the model.

    x (..., in) -> y (..., out), dtype of base_layer(x). Several active adapters add their deltas.
    Nothing merges in train(), eval() or forward().
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict().train(base_layer.training)
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.watch()
        # the base's own, while merged
        self.kept: tuple[nn.Parameter, nn.Parameter | None] | None = None

    def watch(self) -> None:
        """Note anew whether the model calls the layer, and whether it reads its weight itself.
        Compiled code does not tell."""
        self.__dict__.update(was_called=False, was_read=False)

    @property
    def view(self) -> View:
        (view,) = views(self.base_layer)
        return view

    def adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())  # nn.Linear names it input, Conv1D x
        if not torch.compiler.is_compiling():
            self.__dict__["was_called"] = True
        if not self.active or not self.enabled or self.kept is not None:
            output: Tensor = self.base_layer(x)
            return output
        if len(self.active) == 1:
            return self._alone(x)
        output = self.base_layer(x)
        y = output
        for name in self.active:
            adapter = self.adapter(name)
            y = y + adapter.delta(self.view, x, adapter.draw_mask(x))
        return y.to(output.dtype)

    def _alone(self, x: Tensor) -> Tensor:
        """y under the one active adapter; made with those of its siblings, where that can be."""
        (name,), reading = self.active, reading_of(self)
        adapter, view = self.adapter(name), self.view
        possible = reading is not None and fused.possible(view, x)
        y = reading.take(self, x) if reading is not None and possible else None
        if y is not None:
            return y
        mask = adapter.draw_mask(x)
        if reading is not None and not reading.begun:
            reading.begun = True
            shares = possible and plain(x) and (torch.is_grad_enabled() or mask is None)
            group = {self: view}
            if shares and unseen(self):
                group |= self._alike(reading.layers, x)
            updates = [layer.adapter(name).low_rank(its) for layer, its in group.items()]
            found = [update for update in updates if update is not None]
            one_kind = len({update.start is None for update in found}) == 1
            if one_kind and len(group) == len(found) > 1:
                own, *others = fused.low_rank(x, found, mask)
                reading.put(x, list(zip([*group][1:], others, strict=True)))
                return own
        return adapter.compute(view, x, mask)

    def _alike(self, layers: Sequence[nn.Module], x: Tensor) -> dict[AdaptedLayer, View]:
        """Those of the layers, and their views, that do now what this one does."""
        (name,), found = self.active, {}
        own = self.adapter(name)
        settings = (type(own), own.training, own.dropout, self.in_features)
        for layer in layers:
            if (
                isinstance(layer, AdaptedLayer)
                and layer.active == self.active
                and layer is not self
            ):
                other, its = layer.adapter(name), layer.view
                if (
                    settings == (type(other), other.training, other.dropout, its.in_features)
                    and layer.enabled
                    and layer.kept is None
                    and unseen(layer)
                    and fused.possible(its, x)
                ):
                    found[layer] = its
        return found

    def merged(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """W' and b' of the active adapters as the layer stores them, in the base's dtype, computed
        in float32 at least."""
        view = self.view
        weight, bias = view.parameters()
        W, b = view.read()
        wide = torch.promote_types(W.dtype, torch.float32)
        with torch.no_grad(), without_autocast(W):
            W1, b1 = W.to(wide), None if b is None else b.to(wide)
            for name in self.active:
                # Active together are additive ones only, so the order does not matter.
                W1, b1 = copy.deepcopy(self.adapter(name)).to(wide).merged(W1, b1)
            W1 = (W1.T if view.transposed else W1).to(W.dtype, copy=True).contiguous()
            b1 = None if b1 is None else b1.to(W.dtype if b is None else b.dtype, copy=True)
        needs = bias is not None and bias.requires_grad
        return (
            nn.Parameter(W1, requires_grad=weight.requires_grad),
            None if b1 is None else nn.Parameter(b1, requires_grad=needs),
        )

    def merge(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """Put W', b' where W, b were, as parameters of their own: what is tied to W is not moved.

        The base's own are kept, not copied.
        """
        module = self.base_layer
        self.kept = self.view.parameters()
        module._parameters["weight"] = weight
        if bias is not None:
            module._parameters["bias"] = bias

    def restore(self) -> None:
        """Bring the kept parameters back, to the device and dtype that the layer has now."""
        if self.kept is None:
            return
        module, (weight, bias) = self.base_layer, self.kept
        for kept, name in ((weight, "weight"), (bias, "bias")):
            if kept is not None:
                now = module._parameters[name]
                assert now is not None
                kept.data = kept.data.to(now.device, now.dtype)
                module._parameters[name] = kept
        self.kept = None

    @property
    def in_features(self) -> int:
        return self.view.in_features

    @property
    def out_features(self) -> int:
        return self.view.out_features

    def __getattr__(self, name: str) -> Any:
        # What models read off their own layers: weight, bias, nf (T5: self.wo.weight.dtype).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            if name == "weight" and not torch.compiler.is_compiling():
                self.__dict__["was_read"] = True
            return getattr(self.base_layer, name)


class SavedModule(nn.Module):
    """A module trained as a whole: one copy per adapter, beside the frozen original."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.training = original_module.training
        self.original_module = original_module
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

    The originals lie on the CPU. While they act the trained ones lie aside, so that a backward
    through either is right whatever stands in the model by then.
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
            where = "meta" if parameter.is_meta else "cpu"
            self.originals[name] = parameter.detach().to(where, copy=True)

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set what trains to the originals; where those had no values yet, it has them now."""
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


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: keywords as a mapping, arguments as a tuple, or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def seeded(seed: int, module: str, parameter: str) -> torch.Generator:
    """A CPU generator of its own for one tensor: a pure function of (seed, module, parameter)."""
    digest = hashlib.sha256(f"{seed}\n{module}\n{parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(adapter: Adapter, view: View, seed: int) -> None:
    """Fill the adapter's parameters; nothing that happened before in the process matters."""
    with torch.no_grad():
        adapter.fill(view, lambda parameter: seeded(seed, adapter.module_name, parameter))


def method_of(config: MethodConfig) -> type[Method]:
    """The method whose Config this is."""
    for method in METHODS.values():
        if method.Config is type(config):
            return method
    raise ConfigError(
        f"{type(config).__name__} belongs to no method. Found: {', '.join(sorted(METHODS))}."
    )


def config_fields(config: MethodConfig) -> dict[str, Any]:
    """The fields by name, JSON's kinds only: tuples as lists."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check_additive(names: tuple[str, ...], methods: list[type[Method]]) -> None:
    """Raise MergeError where adapters of several names cannot be active together."""
    alone = [m.name for m in methods if not getattr(m, "additive", False)]
    if len(names) > 1 and alone:
        raise MergeError(
            f"adapters {', '.join(names)} cannot be active together: the deltas of"
            f" {', '.join(sorted(set(alone)))} do not add up. Activate one of them."
        )
