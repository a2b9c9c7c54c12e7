"""The settings of methods, and how their values are checked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lora.declared import declared, fitted, is_number, words
from lora.errors import ConfigError, SettingError
from lora.patterns import BLOCKS, check_pattern

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
    # Python refuses to print an integer of more than 4,300 digits.
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
    """The settings of a method. Field names are those of PEFT's adapter_config.json."""

    training_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change what a saved adapter computes."""
    unsaved: ClassVar[frozenset[str]] = frozenset()
    """The training_only fields that PEFT's file has no key for."""
    written: ClassVar[frozenset[str]] = frozenset()
    """Fields that saving fills in; users do not set them."""

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
    """Modules to train in full and save with the adapter, such as a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save:
            names = names_tuple("modules_to_save", self.modules_to_save)
            object.__setattr__(self, "modules_to_save", names)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(PartialConfig):
    """The settings of a method that wraps layers."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers to adapt: names or the last parts of names (q_proj v_proj), a regular expression that
    matches whole names, all-linear (all linear layers but the output head and the routers of
    experts), attention (the attention projections of known architectures), or input-embedding."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers not to adapt, written as for --target-modules."""
    layers_to_transform: tuple[int, ...] = ()
    """Indices of the blocks to adapt, counted from 0. Not with a regular expression in
    --target-modules. Default: all."""
    layers_pattern: tuple[str, ...] = ()
    """With --layers-to-transform: names of the module lists that hold the blocks, such as layers or
    h. Default: any."""

    def __post_init__(self) -> None:
        for field in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, field)
            if isinstance(value, int | str):  # PEFT takes one without its list
                object.__setattr__(self, field, (value,))
        super().__post_init__()
        targets = layer_names("target_modules", self.target_modules, SHORTHANDS)
        object.__setattr__(self, "target_modules", targets)
        if self.exclude_modules is not None:
            excluded = layer_names("exclude_modules", self.exclude_modules, SHORTHANDS)
            object.__setattr__(self, "exclude_modules", excluded)
        if self.layers_to_transform or self.layers_pattern:
            self._check_blocks()

    def _check_blocks(self) -> None:
        """Check and tidy layers_to_transform and layers_pattern."""
        layers = tuple(dict.fromkeys(self.layers_to_transform))
        good = min(layers, default=0) >= 0
        check("layers_to_transform", layers, "numbers of blocks, from 0", good)
        object.__setattr__(self, "layers_to_transform", layers)
        patterns = names_tuple("layers_pattern", self.layers_pattern)
        object.__setattr__(self, "layers_pattern", patterns)
        for pattern in patterns:
            check_pattern("layers_pattern", pattern, BLOCKS)
        listed = self.target_modules in SHORTHANDS or not isinstance(self.target_modules, str)
        check("layers_to_transform", layers, "left out beside a pattern", listed or not layers)
        check("layers_pattern", patterns, "beside layers_to_transform", bool(layers))


def layer_names(
    field: str, value: str | Collection[str], words: Collection[str]
) -> str | tuple[str, ...]:
    """A regular expression or one of `words` as it is, or names as a tuple. Raises ConfigError."""
    if isinstance(value, str):
        if value not in words:
            check(field, value, f"a pattern, names, or one of {', '.join(words)}", bool(value))
            check_pattern(field, value)
        return value
    names = names_tuple(field, value)
    check(field, value, "at least one name", bool(names))
    # One name after a flag arrives as a tuple: it may be the word.
    return names[0] if len(names) == 1 and names[0] in words else names


def config_fields(config: MethodConfig) -> dict[str, Any]:
    """The fields by name, JSON's kinds only: tuples as lists."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
