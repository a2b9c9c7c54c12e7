"""The options of low-rank methods: initial values, patterns, biases, tokens, LoRA+, PEFT's file.

Nothing here changes the equation. LowRank inherits it, so that its own file shows B A alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.adapter import call_model, trained
from lora.errors import ConfigError, TargetError
from lora.layers import View
from lora.method import Calibrated, ChecksTargets, Filed, Follows, Packs, Rates, Tested, TrainsBase
from lora.methods._starts import decompose, from_gradients, from_inputs, wide
from lora.methods._tokens import Make, token_layers
from lora.nf4 import NF4, dequantize
from lora.patterns import ENDING, compiled
from lora.settings import check


def pick(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a layer's name: of the first key that fits it, or a dotted ending of it."""
    for key, value in pattern.items():
        if compiled(key, ENDING).match(module):
            return value
    return default


def by_layer(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern that gives every other layer its own; by layers' names."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {"^" + re.escape(n): value for n, value in values.items() if value != most}


class _File(Filed):
    """How a low-rank update is written in PEFT's file."""

    peft_type = "LORA"
    neutral: ClassVar = {
        "fan_in_fan_out": ...,  # follows from the layer's kind
        "qalora_group_size": ...,  # read under use_qalora only
        "loftq_config": ...,  # settings of inits
        "eva_config": ...,
        "corda_config": ...,
        "lora_ga_config": ...,
        "megatron_core": ...,  # read under megatron_config only
        "ensure_weight_tying": ...,  # foreign.check_tying
    }

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Any]) -> dict[str, Any]:
        settings = super().file_settings(config, adapters)
        settings["init_lora_weights"] = True  # the file holds the plain update
        filed: dict[str, tuple[int, float]] = {}  # r and lora_alpha by layer
        for name, adapter in adapters.items():
            if isinstance(adapter, LowRankOptions):
                away = adapter.starts_away
                more = (math.sqrt(2) if config.use_rslora else 2) if away else 1
                filed[name] = (2 if away else 1) * adapter.r, more * adapter.alpha
        for index, (key, pattern) in enumerate(
            (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        ):
            wanted = {name: pair[index] for name, pair in filed.items()}
            # A file's keys are sorted. If that changes which fits first, name each layer.
            patterns = dict(sorted(settings[pattern].items()))
            if any(pick(patterns, n, settings[key]) != value for n, value in wanted.items()):
                settings[key], patterns = by_layer(wanted)
            settings[pattern] = patterns
        tokens = settings["trainable_token_indices"] or None
        if isinstance(tokens, dict):
            tokens = {name: list(ids) for name, ids in tokens.items()}
        return settings | {"trainable_token_indices": tokens}

    @classmethod
    def read_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        result = super().read_settings(settings)
        result |= {
            k: {} for k in ("rank_pattern", "alpha_pattern") if k in result and not result[k]
        }
        result["trainable_token_indices"] = result.get("trainable_token_indices") or ()
        init = result.get("init_lora_weights")
        if init in (None, False, "gaussian", "orthogonal", "eva"):  # these leave W alone
            result["init_lora_weights"] = "default"
        elif isinstance(init, str) and init.startswith(("pissa_niter_", "lora_ga", "loftq")):
            raise ConfigError(
                f"init_lora_weights={init!r} moved the base by a product that is not in the file."
                " Save it there with path_initial_model_for_weight_conversion."
            )
        return result


class LowRankOptions(_File, Tested, Calibrated, Packs, Follows, TrainsBase, ChecksTargets, Rates):
    """Everything about a low-rank method but its equation."""

    example: ClassVar = {"r": 3, "lora_alpha": 7.0}

    config: Any
    module_name: str
    r: int
    alpha: float
    scaling: float
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    start_A: Tensor  # noqa: N815
    start_B: Tensor  # noqa: N815
    keys: Mapping[str, str]
    frozen: frozenset[str]
    update: Callable[[], Tensor]
    starts_away = False
    took_up = False  # True if the base was quantized together with this

    def set_up(self, view: View, config: Any) -> None:
        """Names in the file, what is frozen, and buffers for initial values with B A ≠ 0."""
        self.init = config.init_lora_weights
        if view.of_ids and self.init != "gaussian":
            self.init = "default"
        if self.init not in ("default", "gaussian"):
            self._check_rank(view)
        self.starts_away = self.init.startswith(("pissa", "olora", "lora_ga"))
        if self.starts_away:
            module: Any = self
            module.register_buffer("start_A", self.lora_A.detach().clone())
            module.register_buffer("start_B", self.lora_B.detach().clone())
        A, B = ("lora_embedding_A", "lora_embedding_B") if view.of_ids else ("lora_A", "lora_B")
        end = "" if view.of_ids else ".weight"
        self.keys = {"lora_A": A + end, "lora_B": B + end}
        # The one that is initialized at random, and the one that is initialized to zero
        self.random, self.zero = ("lora_B", "lora_A") if view.of_ids else ("lora_A", "lora_B")
        self.frozen = frozenset({self.random} if config.use_lorafa else ())

    def _check_rank(self, view: View) -> None:
        most = min(view.in_features, view.out_features)
        most = most // 2 if self.init == "lora_ga" else most
        wanted = f"at most {most} for {self.module_name} with init_lora_weights={self.init!r}"
        check("r", self.r, wanted, self.r <= most)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A₀ (r, in) and B₀ (out, r), or None."""
        return (self.start_A, self.start_B) if self.starts_away else None

    def begin(self, A: Tensor, B: Tensor) -> None:
        """Initialize with A (r, in) and B (out, r), B A ≠ 0."""
        for parameter, start, value in (
            (self.lora_A, self.start_A, A),
            (self.lora_B, self.start_B, B),
        ):
            parameter.copy_(value)
            start.copy_(parameter)

    # Calibrated

    @classmethod
    def needs_batches(cls, config: Any) -> bool:
        return config.init_lora_weights in ("eva", "lora_ga")

    @classmethod
    def calibrate(
        cls, adapters: Sequence[tuple[Any, View]], model: nn.Module, batches: Iterable[Any]
    ) -> None:
        mine = [(a, v) for a, v in adapters if isinstance(a, LowRankOptions) and not v.of_ids]
        if not mine:
            return
        first, layers = mine[0][0], [(a.module_name, view, a.r) for a, view in mine]
        parts = layers, model, batches, call_model, first.lora_A.dtype
        with torch.no_grad():
            if first.init == "eva":
                for (adapter, _), A in zip(mine, from_inputs(*parts), strict=True):
                    adapter.lora_A.copy_(A)
            else:
                for (adapter, _), pair in zip(mine, from_gradients(*parts), strict=True):
                    adapter.begin(*pair)

    # Packs

    @classmethod
    def takes_up(cls, config: Any) -> bool:
        init: str = config.init_lora_weights
        return init.startswith(("pissa", "olora", "loftq"))

    @classmethod
    def needs_packing(cls, config: Any) -> bool:
        init: str = config.init_lora_weights
        return init.startswith("loftq")

    def check_fresh(self) -> None:
        """Raises ConfigError if the base's weight was quantized together with this adapter."""
        if self.took_up:
            raise ConfigError(
                f"{self.module_name}: the base was quantized together with this adapter's"
                " initial values. Load the base again, and inject into that."
            )

    def pack(self, W: Tensor, quantize: Callable[[Tensor], NF4]) -> NF4:
        if not self.takes_up(self.config):
            return quantize(W)
        W = W.to(self.lora_A.dtype)

        def start_from(M: Tensor) -> None:
            """A and B from M, decomposed in float64: see wide()."""
            A, B = decompose(self.init, M.to(wide(M)), self.r, self.scaling, torch.Generator())
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)

        def rest() -> Tensor:
            """W − s B A, in float64 first."""
            A, B = (factor.to(wide(W)) for factor in (self.lora_A, self.lora_B))
            return (W - self.scaling * (B @ A)).to(W.dtype)

        self.took_up, self.starts_away = True, False
        if not self.init.startswith("loftq"):
            del self.start_A, self.start_B
            start_from(W)
            return quantize(rest())
        for _ in range(int(self.init.partition("_")[2] or 1)):
            q = quantize(rest())  # W itself in the first round: B is zero
            start_from(W - dequantize(q, W.dtype))
        return q

    # Follows, TrainsBase, ChecksTargets, Rates

    @classmethod
    def further(
        cls,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: Any,
        targets: Sequence[str],
    ) -> Mapping[str, Make]:
        tokens = config.trainable_token_indices
        return token_layers(model, modules, tokens) if tokens else {}

    @classmethod
    def selects(cls, name: str, targeted: bool, config: Any) -> bool:
        meant = config.bias == "all" or (config.bias == "lora_only" and targeted)
        return meant and name.rpartition(".")[2] == "bias"

    @classmethod
    def check_targets(cls, config: Any, targets: Sequence[str]) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, name):
                if all(pick({key: True}, target, None) is None for target in targets):
                    raise TargetError(
                        f"{name}: {key!r} fits none of the {len(targets)} layers that"
                        f" target_modules matches ({targets[0]}, ...). Correct the name."
                    )

    def param_groups(self) -> dict[float, list[nn.Parameter]]:
        adapter: Any = self
        groups = {1.0: trained(adapter)}
        ratio, fast = self.config.loraplus_lr_ratio, getattr(self, self.zero)
        if ratio == 1.0:
            return groups
        return {1.0: [p for p in groups[1.0] if p is not fast], ratio: [fast]}

    # The file and the contract

    def tensors_to_save(self) -> dict[str, Tensor]:
        adapter: Any = self
        tensors: dict[str, Tensor] = adapter.parameters_by_key()
        if self.starts_away:
            tensors[self.keys["lora_A"]] = torch.cat([self.lora_A, self.start_A], dim=0)
            tensors[self.keys["lora_B"]] = torch.cat([self.lora_B, -self.start_B], dim=1)
        return tensors

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        if clause == "another_seed_other_bits" and config.init_lora_weights in ("pissa", "olora"):
            return "the initial values depend only on W"
        return super().exemption(clause, config, bias)
