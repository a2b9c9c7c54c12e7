"""AdaLoRA: distributes a fixed number of ranks among the layers while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.adapter import Adapter
from lora.declared import is_number
from lora.errors import ConfigError, TargetError
from lora.kernels import Fast
from lora.kernels.lowrank import LowRankKernel
from lora.layers import View
from lora.method import ChecksTargets, Scheduled
from lora.settings import AdapterConfig, check, probability, strength, whole_number


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Settings of AdaLoRA. Steps are optimizer steps."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
            "lora_dropout",
        }
    )  # fmt: skip
    written: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})

    init_r: int = 12
    """Rank of every layer at the start."""
    target_r: int = 8
    """Mean rank of the layers at the end."""
    lora_alpha: float = 8.0
    """Numerator of the scaling lora_alpha / init_r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training, 0 <= p < 1."""
    tinit: int | None = None
    """Steps before the first rank is pruned. Default: a tenth of all steps."""
    tfinal: int | None = None
    """Steps that remain after the last rank is pruned. Default: three tenths of all steps."""
    deltaT: int = 1  # noqa: N815  (PEFT's name)
    """Steps from one choice of the ranks to keep to the next."""
    beta1: float = 0.85
    """Decay of the running mean of each parameter's sensitivity, |value times gradient|, from 0 to
    1."""
    beta2: float = 0.85
    """Decay of the running mean of how much the sensitivity varies, from 0 to 1."""
    orth_reg_weight: float = 0.5
    """Weight of the loss term that keeps A and B close to orthogonal."""
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)
    """The ranks that each layer has kept: `LAYER.lora_E`, then true or false for each rank. A
    save of a trained adapter writes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_r", "target_r", "deltaT"):
            whole_number(name, getattr(self, name))
        good = self.target_r <= self.init_r
        check("target_r", self.target_r, f"at most init_r ({self.init_r})", good)
        for name in ("tinit", "tfinal"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=0)
        strength("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            check(name, beta, "a number with 0 < beta < 1", is_number(beta) and 0 < beta < 1)
        weight = self.orth_reg_weight
        check(
            "orth_reg_weight", weight, "a number of at least 0", is_number(weight) and weight >= 0
        )

    def schedule(self, total: int) -> tuple[int, int]:
        """Returns the last step before pruning begins, and the step at which it is complete.

        Raises ConfigError if there is no step between them.
        """
        first = total // 10 if self.tinit is None else self.tinit
        last = total - (3 * total // 10 if self.tfinal is None else self.tfinal)
        if first + 1 >= last:
            raise ConfigError(
                f"adalora has no steps to allocate ranks in: tinit is {first}, tfinal"
                f" {total - last}, the training has {total}. Train longer, or set --tinit and"
                " --tfinal lower."
            )
        return first, last


class AdaLoRA(Scheduled, ChecksTargets, Fast, Adapter):
    """W' = W + (lora_alpha / init_r) B (E ∘ A).  AdaLoRA, Zhang et al. 2023, arXiv:2303.10512,
    eq. 3.

    lora_A (r, in), lora_B (out, r)  N(0, 0.02²), penalty() keeps them near orthogonal
    lora_E (r, 1)                    zeros, so W' = W at step 0
    The divisor is init_r + 1e-5, as in PEFT. after_step() scores the (A, E, B) triplets of all
    layers by smoothed sensitivity times uncertainty, eq. 7 to 11. The best triplets up to the
    budget stay; the others are pruned: their E is set to 0.
    """

    name = "adalora"
    paper = "arXiv:2303.10512"
    when = "If you have a budget of parameters and do not know which layers need them most."
    Config = AdaLoRAConfig
    peft_type = "ADALORA"
    learning_rate = 5e-3
    additive = True
    example: ClassVar = {"init_r": 3, "target_r": 1, "lora_alpha": 7.0}
    variants: ClassVar = {
        "allocated": {
            "init_r": 3, "target_r": 1, "lora_alpha": 7.0,
            "rank_pattern": {
                "first.lora_E": [True, False, True], "second.lora_E": [False, False, True]
            },
        }
    }  # fmt: skip
    neutral: ClassVar = {
        "bias": "none",
        "r": ...,
        "fan_in_fan_out": ...,
        "qalora_group_size": ...,
        "init_lora_weights": True,
        "megatron_core": ...,
        "total_step": ...,
    }

    remembers = ("pattern", "total")
    pattern: list[bool] | None
    cleared: tuple[list[bool], Tensor] | None = None  # a pattern, and its pruned ranks (r, 1)
    total: int

    config: AdaLoRAConfig

    def __init__(self, view: View, config: AdaLoRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.key = f"{module}.lora_E"
        self.pattern = config.rank_pattern.get(self.key)
        r = config.init_r if self.pattern is None else sum(self.pattern)
        self.scaling = config.lora_alpha / (config.init_r + 1e-5)
        self.dropout = config.lora_dropout
        self.total = 0  # the steps of the training; 0 before the first step
        self.lora_A = self.new(view, r, view.in_features)
        self.lora_E = self.new(view, r, 1)
        self.lora_B = self.new(view, view.out_features, r)
        # Running means: the sensitivity of each parameter, and the uncertainty of the sensitivity
        for name, parameter in list(self.named_parameters()):
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name[-1]}", torch.zeros_like(parameter))

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        for name in ("lora_A", "lora_B"):
            start = torch.empty(getattr(self, name).shape, dtype=torch.float32, device="cpu")
            getattr(self, name).copy_(start.normal_(std=0.02, generator=generator(name)))
        self.lora_E.zero_()
        self.pattern, self.total = self.config.rank_pattern.get(self.key), 0
        for buffer in self.buffers():
            buffer.zero_()

    @classmethod
    def check_targets(cls, config: AdaLoRAConfig, targets: Sequence[str]) -> None:
        unknown = set(config.rank_pattern) - {f"{target}.lora_E" for target in targets}
        if unknown:
            raise TargetError(
                f"rank_pattern: {min(unknown)!r} belongs to none of the {len(targets)} layers that"
                " target_modules matches. Remove it: a save writes rank_pattern."
            )

    @classmethod
    def size(cls, view: View, config: AdaLoRAConfig, module: str) -> int:
        kept = config.rank_pattern.get(f"{module}.lora_E")
        r = config.init_r if kept is None else sum(kept)
        return r * (view.in_features + 1 + view.out_features)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.scaling * (self.lora_B @ (self.lora_E * self.lora_A)), b

    def kernel(self, view: View) -> LowRankKernel:
        return LowRankKernel(view, self.lora_E * self.lora_A, self.lora_B, self.scaling)

    @classmethod
    def penalty(cls, adapters: Sequence[AdaLoRA], config: AdaLoRAConfig) -> Tensor | None:
        """Returns orth_reg_weight times the mean of ‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖ over all adapters.

        The norms are Frobenius norms.
        """
        norms = []
        for adapter in adapters:
            for P in (adapter.lora_A, adapter.lora_B.T):
                identity = torch.eye(len(P), dtype=P.dtype, device=P.device)
                norms.append(torch.linalg.matrix_norm(P @ P.T - identity))
        return config.orth_reg_weight * torch.stack(norms).mean()

    @classmethod
    def check_steps(cls, config: AdaLoRAConfig, total: int) -> None:
        if not config.rank_pattern:
            config.schedule(total)

    @classmethod
    @torch.no_grad()
    def after_step(
        cls, adapters: Sequence[AdaLoRA], config: AdaLoRAConfig, step: int, total: int
    ) -> None:
        if config.rank_pattern:
            return  # the adapter was loaded, and its ranks are allocated already
        first, last = config.schedule(total)
        for adapter in adapters:
            adapter.total = total
        if step < last:
            for adapter in adapters:
                adapter.observe()
        if step > last:  # the optimizer moves pruned E too, so they are cleared after every step
            for adapter in adapters:
                adapter.clear()
            return
        most, least = (r * len(adapters) for r in (config.init_r, config.target_r))
        # The budget falls from `most` to `least` along a cubic curve (section 3.3).
        left = 1 - (step - first) / (last - first)
        budget = most if step <= first else int((most - least) * left**3 + least)
        if budget < most and (step == last or step % config.deltaT == 0):
            scores = [adapter.scores().cpu() for adapter in adapters]
            kept = torch.zeros(most, dtype=torch.bool)
            kept[torch.cat(scores).topk(budget).indices] = True
            for adapter, pattern in zip(adapters, kept.view(len(adapters), -1), strict=True):
                adapter.pattern = pattern.tolist()
                adapter.clear()

    def observe(self) -> None:
        """Update the running means with the gradients of this step, eq. 9 and 10."""
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            mean = getattr(self, f"sensitivity_{name[-1]}")
            uncertainty = getattr(self, f"uncertainty_{name[-1]}")
            sensitivity = (parameter * parameter.grad).abs()
            mean.mul_(self.config.beta1).add_((1 - self.config.beta1) * sensitivity)
            deviation = (sensitivity - mean).abs()
            uncertainty.mul_(self.config.beta2).add_((1 - self.config.beta2) * deviation)

    def scores(self) -> Tensor:
        """Returns the importance of each triplet, (r,), eq. 7 and 11."""
        A, E, B = (
            getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
            for name in "AEB"
        )
        return E[:, 0] + A.mean(dim=1) + B.mean(dim=0)  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Set E of the pruned ranks to 0."""
        if self.pattern is not None:
            # Made once for a pattern: every copy to a GPU makes the CPU wait for it.
            device = self.lora_E.device
            pattern, pruned = self.cleared or (None, torch.empty(0))
            if pattern is not self.pattern or pruned.device != device:
                pruned = ~torch.tensor(self.pattern, device=device)[:, None]
                self.cleared = self.pattern, pruned
            self.lora_E.masked_fill_(pruned, 0.0)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Returns the tensors without the pruned ranks."""
        tensors = super().tensors_to_save()
        if self.pattern is not None and len(self.pattern) == len(self.lora_E):
            kept = torch.tensor(self.pattern, device=self.lora_E.device)
            tensors = {
                key: tensor[:, kept] if key == "lora_B" else tensor[kept]
                for key, tensor in tensors.items()
            }
        return tensors

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        settings = super().file_settings(config, adapters)
        # Trained tokens beside AdaLoRA are adapters of another class.
        ours = {name: a for name, a in adapters.items() if isinstance(a, AdaLoRA)}
        kept = {f"{name}.lora_E": a.pattern for name, a in ours.items() if a.pattern is not None}
        settings["rank_pattern"] = kept or None
        # PEFT refuses a file without a valid schedule, even if the adapter was never trained.
        total = next((a.total for a in ours.values()), 0)
        if total:
            first, last = config.schedule(total)
        else:
            first, final = config.tinit or 0, config.tfinal or 0
            total, last = first + 1 + final, first + 1
        return settings | {"total_step": total, "tinit": first, "tfinal": total - last}

    @classmethod
    def read_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read_settings(settings)
        values["rank_pattern"] = values.get("rank_pattern") or {}
        return values
