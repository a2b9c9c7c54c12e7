"""LN tuning: trains the normalization layers and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora.errors import TargetError
from lora.layers import fits
from lora.method import Selection
from lora.settings import PartialConfig, layer_names


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(PartialConfig):
    """Settings of LN tuning."""

    target_modules: str | tuple[str, ...] = "all-norms"
    """Layers to train: names or the last parts of names, a regular expression, or all-norms."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers to exclude: names, the last parts of names, or a regular expression."""

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = layer_names("target_modules", self.target_modules, ("all-norms",))
        object.__setattr__(self, "target_modules", targets)
        if self.exclude_modules is not None:
            excluded = layer_names("exclude_modules", self.exclude_modules, ())
            object.__setattr__(self, "exclude_modules", excluded)


class LNTuning(Selection):
    """Trains the gain g and the bias b of normalization layers.  LN tuning, Zhao et al. 2024,
    arXiv:2312.11420, section 2.

    target_modules="all-norms" selects the layers whose class name ends in Norm, as in torch and
    transformers, and that have no running statistics. PEFT trains a copy of each layer; here the
    layer itself is trained. The file is the same.
    """

    name = "ln_tuning"
    paper = "arXiv:2312.11420"
    when = "The smallest files for a decoder, which has few or no biases for bitfit."
    Config = LNTuningConfig
    peft_type = "LN_TUNING"
    learning_rate = 4e-3
    example: ClassVar = {"target_modules": ("second",)}
    COPY = "ln_tuning_layers"

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: LNTuningConfig) -> bool:
        path = name.rpartition(".")[0]
        excluded = config.exclude_modules
        if not path or (excluded is not None and fits(path, excluded)):
            return False
        if config.target_modules != "all-norms":
            return fits(path, config.target_modules)
        layer = model.get_submodule(path)
        # Running statistics are buffers. Training would change them, and the file has none.
        return "Norm" in type(layer).__name__ and next(layer.buffers(), None) is None

    @classmethod
    def check_model(cls, model: nn.Module, layers: tuple[str, ...], config: LNTuningConfig) -> None:
        for field in ("target_modules", "exclude_modules"):
            value = getattr(config, field)
            for entry in (value,) if isinstance(value, str) else value or ():
                pattern = entry if isinstance(value, str) else (entry,)
                if entry != "all-norms" and not any(fits(name, pattern) for name in layers):
                    flag = "--" + field.replace("_", "-")
                    raise TargetError(
                        f"no layer with parameters matches {field}={entry!r}. Set {flag}: layers of"
                        f" {type(model).__name__} are {', '.join(layers[:4])}, ..."
                    )

    @classmethod
    def key(cls, name: str) -> str:
        path, _, leaf = name.rpartition(".")
        return f"{path}.{cls.COPY}.{leaf}"
