"""What a method declares: its names, optional class attributes, and traits that it may inherit.

    Method          name, paper, Config, peft_type; a subclass with a name is registered in METHODS
    ├── Adapter     (adapter.py) new parameters on a layer: merged, fill, size, keys
    └── Selection   no new parameters: some of the base's are trained

An Adapter has eight names. It inherits a trait below only if it needs one:

    Calibrated      computes initial values from data                 EVA, LoRA-GA
    Packs           is initialized together with the quantized base   LoftQ, QPiSSA
    Scheduled       acts on the loss and after optimizer steps        AdaLoRA
    Shares          has frozen tensors that all its layers share      VeRA
    Follows         puts adapters on layers beside its targets        trainable tokens
    TrainsBase      trains parameters of the base beside its own      bias="all"
    ChecksTargets   has settings that name layers                     rank_pattern
    Rates           trains at several learning rates                  LoRA+
    Fast            (kernels) has a kernel
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, ClassVar

from torch import Tensor, nn

from lora.errors import ConfigError
from lora.layers import View
from lora.nf4 import NF4
from lora.settings import MethodConfig, config_fields

METHODS: dict[str, type[Method]] = {}


class Described:
    """What `lora methods` says of a method."""

    when: ClassVar[str] = ""
    """When to choose it, in one line."""
    learning_rate: ClassVar[float] = 1e-3
    """The peak learning rate of `lora train` if none is given."""


class Filed:
    """How a method's settings are written in PEFT's adapter_config.json."""

    in_peft: ClassVar[bool] = True
    """False if PEFT has no such method, or refuses its files."""
    states: ClassVar[Mapping[str, bool]] = {}
    """PEFT keys that tell apart the methods of one peft_type; a missing key means False."""
    neutral: ClassVar[Mapping[str, object | EllipsisType]] = {}
    """PEFT keys we do not implement, mapped to the values for which ignoring them changes nothing;
    ... means any value. Empty values (None, False, [], {}) never change anything."""
    unfiled: ClassVar[frozenset[str]] = frozenset()
    """Fields of Config that PEFT's type lacks: the file then lists the adapted layers by name."""
    peft_type: ClassVar[str]

    @classmethod
    def matches(cls, adapter_config: Mapping[str, Any]) -> bool:
        """True if a file's adapter_config.json states this method's equation."""
        same = all(bool(adapter_config.get(k)) == value for k, value in cls.states.items())
        return same and adapter_config.get("peft_type") == cls.peft_type

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """The settings for adapter_config.json; `adapters` by the names of their layers."""
        settings = {k: v for k, v in config_fields(config).items() if k not in config.unsaved}
        if any(settings[name] for name in cls.unfiled):
            settings["target_modules"] = "all-linear"  # replaced by the layers' names
        for name in {"layers_to_transform", "layers_pattern"} & settings.keys():
            settings[name] = settings[name] or None
        fixed = {key: value for key, value in cls.neutral.items() if isinstance(value, str)}
        settings |= fixed | dict(cls.states)
        return {key: value for key, value in settings.items() if key not in cls.unfiled}

    @classmethod
    def read_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A file's settings as Config takes them. Raises ConfigError if it cannot."""
        return dict(settings)


class Tested:
    """How lora.testing checks a method."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Settings for the contract, if the defaults would hide a fault: a factor of 1, a term of 0."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further settings for it, by name."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Clauses that do not apply, each with the reason."""

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        """The reason why a clause does not apply to a layer with or without bias, or None."""
        return cls.exempt.get(clause)


class Method(Described, Filed, Tested, ABC):
    """A way to train a model. A subclass that sets `name` is registered in METHODS."""

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    peft_type: ClassVar[str]
    keeps_base: ClassVar[bool] = True
    """False if the base's own values are lost: disabled(), merge and restore are refused."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        known = METHODS.get(cls.name)
        # A notebook cell that runs twice defines the same class again: the newer one counts.
        same = ("__module__", "__qualname__")
        if known is not None and any(getattr(known, k) != getattr(cls, k) for k in same):
            raise ConfigError(f"two methods are named {cls.name!r}: {known}, {cls}. Rename one.")
        # method_of() finds the method by its Config.
        for other in METHODS.values():
            if other is not known and other.Config is cls.Config:
                raise ConfigError(f"{cls} and {other} share one Config. Give each its own.")
        METHODS[cls.name] = cls


class Selection(Method):
    """A method that wraps nothing: it trains parameters of the base, and saves those.

    The originals are kept for disabled(), restore() and eject(). A method for which that costs too
    much sets keeps_base = False.
    """

    @classmethod
    @abstractmethod
    def selects(cls, name: str, model: nn.Module, config: Any) -> bool:
        """True if the model's parameter of this name is trained."""

    @classmethod
    def check_model(cls, model: nn.Module, layers: tuple[str, ...], config: Any) -> None:
        """Raise TargetError if a setting names no layer; `layers` are those with parameters."""

    @classmethod
    def key(cls, name: str) -> str:
        """The key in PEFT's file, without the prefix, of a parameter that it selects."""
        return name


class Calibrated:
    """A method whose initial values are computed from batches of data."""

    @classmethod
    def needs_batches(cls, config: Any) -> bool:
        """True if calibrate() has to run, as set."""
        raise NotImplementedError

    @classmethod
    def calibrate(
        cls, adapters: Sequence[tuple[Any, View]], model: nn.Module, batches: Iterable[Any]
    ) -> None:
        """Fill what needs data, in each adapter with its view. The model is as it was before the
        injection, and must be so again afterwards. call_model() passes a batch through it."""
        raise NotImplementedError


class Packs:
    """A method that replaces the weight under it when the base is quantized together with it."""

    @classmethod
    def takes_up(cls, config: Any) -> bool:
        """True if its initial values correct the quantization of W: pack() needs the full W."""
        raise NotImplementedError

    @classmethod
    def needs_packing(cls, config: Any) -> bool:
        """True if its initial values need a base that is quantized together with them."""
        return False

    def pack(self, W: Tensor, quantize: Callable[[Tensor], NF4]) -> NF4:
        """Returns the quantized weight to install under this adapter. Called after `fill`."""
        raise NotImplementedError


class Scheduled:
    """A method that adds to the loss, or acts after optimizer steps."""

    remembers: ClassVar[tuple[str, ...]] = ()
    """Attributes besides tensors that training changes, in JSON's types; checkpoints save them."""

    @classmethod
    def penalty(cls, adapters: Sequence[Any], config: Any) -> Tensor | None:
        """A term to add to the loss."""
        return None

    @classmethod
    def check_steps(cls, config: Any, total: int) -> None:
        """Raise ConfigError if the method cannot train for so many steps."""

    @classmethod
    def after_step(cls, adapters: Sequence[Any], config: Any, step: int, total: int) -> None:
        """Called after optimizer.step() number `step` of `total`, from 1, before zero_grad()."""


class Shares:
    """A method with frozen tensors that all adapters of one injection share."""

    @classmethod
    def shared(cls, views: Sequence[View], config: Any) -> dict[str, Tensor]:
        """Those tensors, by parameter name."""
        raise NotImplementedError

    @classmethod
    def saves_shared(cls, config: Any) -> bool:
        """True if the file holds them, under their names at its root."""
        return True


class Follows:
    """A method that adapts further layers, some of them with the parameters of another adapter."""

    @classmethod
    def further(
        cls,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: Any,
        targets: Sequence[str],
    ) -> Mapping[str, Callable[[View, Any, str], Any]]:
        """The layers to adapt besides `targets`, and what makes the adapter of each."""
        return {}


class Follower:
    """An adapter that uses the parameters of the adapter on a layer tied to its own."""

    leader: str | None = None
    """The name of that layer; None if the adapter has parameters of its own."""

    def follow(self, leader: Any) -> None:
        """Take the parameters of the leader's adapter."""
        raise NotImplementedError


class TrainsBase:
    """A method that trains parameters of the base beside its own."""

    @classmethod
    def selects(cls, name: str, targeted: bool, config: Any) -> bool:
        """True if the base's parameter of this name is trained; `targeted` if its layer is."""
        raise NotImplementedError


class ChecksTargets:
    """A method with settings that name layers among its targets."""

    @classmethod
    def check_targets(cls, config: Any, targets: Sequence[str]) -> None:
        """Raise TargetError if a setting names a layer that is none of the targets."""
        raise NotImplementedError


class Rates:
    """A method whose parameters train at several learning rates."""

    def param_groups(self) -> dict[float, list[nn.Parameter]]:
        """Trainable parameters by the multiple of the learning rate that they train at."""
        raise NotImplementedError


def method_of(config: MethodConfig) -> type[Method]:
    """The method whose Config this is."""
    for method in METHODS.values():
        if method.Config is type(config):
            return method
    raise ConfigError(
        f"{type(config).__name__} belongs to no method. Found: {', '.join(sorted(METHODS))}."
    )
