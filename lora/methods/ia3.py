"""(IA)³: trains one factor per feature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.adapter import Adapter
from lora.errors import TargetError
from lora.kernels import Fast
from lora.kernels.scale import ScaleKernel
from lora.layers import View, fits
from lora.method import ChecksTargets
from lora.patterns import check_pattern
from lora.settings import AdapterConfig, names_tuple


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Settings of (IA)³."""

    feedforward_modules: str | tuple[str, ...] = ()
    """Layers whose inputs are scaled instead of their outputs: names, the last parts of names, or a
    regular expression. Default: none. The paper takes the last layer of each feed-forward block,
    such as down_proj."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.feedforward_modules
        if isinstance(names, str):
            check_pattern("feedforward_modules", names)
        else:
            names = names_tuple("feedforward_modules", names)
            object.__setattr__(self, "feedforward_modules", names)


class IA3(ChecksTargets, Fast, Adapter):
    """W' = l ∘ W, b' = l ∘ b. For feed-forward layers W' = W ∘ l, b' = b.  (IA)³, Liu et al. 2022,
    arXiv:2205.05638, eq. 1 and 2.

    ia3_l (out, 1), or (1, in) for feed-forward layers; ones, so W' = W at step 0
    Cost: out (or in) parameters per layer; one multiplication per feature and token.
    """

    name = "ia3"
    paper = "arXiv:2205.05638"
    when = "With very little data, or thousands of tasks: the smallest files."
    Config = IA3Config
    peft_type = "IA3"
    learning_rate = 2e-2
    example: ClassVar = {"feedforward_modules": ("second",)}
    unfiled = frozenset({"layers_to_transform", "layers_pattern"})
    neutral: ClassVar = {"fan_in_fan_out": ..., "init_ia3_weights": ...}

    def __init__(self, view: View, config: IA3Config, module: str) -> None:
        super().__init__(view, config, module)
        self.feedforward = fits(module, config.feedforward_modules)
        self.ia3_l = self.new(
            view, *((1, view.in_features) if self.feedforward else (view.out_features, 1))
        )

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.ia3_l.fill_(1.0)

    @classmethod
    def check_targets(cls, config: IA3Config, targets: Sequence[str]) -> None:
        names = config.feedforward_modules
        for name in [names] if isinstance(names, str) else names:
            entry = name if isinstance(names, str) else (name,)
            if not any(fits(target, entry) for target in targets):
                raise TargetError(
                    f"feedforward_modules: {name!r} is none of the {len(targets)} layers that"
                    f" target_modules matches ({targets[0]}, ...). Name it in both."
                )

    @classmethod
    def size(cls, view: View, config: IA3Config, module: str) -> int:
        return view.in_features if fits(module, config.feedforward_modules) else view.out_features

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.ia3_l * W, b if b is None or self.feedforward else self.ia3_l[:, 0] * b

    def kernel(self, view: View) -> ScaleKernel | None:
        if view.of_ids and self.feedforward:  # ids cannot be scaled
            return None
        factor = self.ia3_l[0] if self.feedforward else self.ia3_l[:, 0]
        return ScaleKernel(view, factor, of_inputs=self.feedforward)

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        settings = super().file_settings(config, adapters)
        forward, targets = settings["feedforward_modules"], settings["target_modules"]
        # PEFT requires feedforward_modules to be a subset of target_modules, and matches endings
        # that do not begin at a dot. A regular expression of full names avoids both.
        part = isinstance(targets, list) and {*forward} <= {*targets}
        if forward and isinstance(forward, list) and not part:
            names = [n for n in adapters if fits(n, config.feedforward_modules)]
            settings["feedforward_modules"] = "|".join(map(re.escape, names))
        return settings
