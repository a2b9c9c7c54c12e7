"""What LoRA and DoRA share: the update s(BA − B₀A₀), where it starts, and how it is filed.

    init_lora_weights    A₀, B₀ of a layer with the weight W (out, in), scaling s
    default              A kaiming_uniform(a=√5), B zeros     LoRA's; A₀ = B₀ = 0
    gaussian             A N(0, 1/r²), B zeros                what the paper says
    pissa                U S Vᵀ = W: A = √(S/s) Vᵀ, B = U √(S/s), the largest r   arXiv:2404.02948
    pissa_niter_N        the same by N rounds of a randomised subspace iteration
    olora                Q R = W: A = R[:r], B = Q[:, :r]                         arXiv:2406.01775
    eva                  A = the main directions of the layer's inputs, B zeros   arXiv:2410.07170
    lora_ga              A, B = singular vectors of W's gradient                  arXiv:2407.05000
    loftq, loftq_N       A, B = pissa's of W − Q, Q = W − sBA in NF4, N times     arXiv:2310.08659

Of a start away from zero (pissa, olora, lora_ga) the product B₀A₀ is subtracted again, so that the
model begins as the base, whose bits stay: W' = W + s(BA − B₀A₀), where those papers move W. An
Embedding starts by default or gaussian, A zeros and B N(0, 1), whatever the others do (as in PEFT).
Filed, such an update is the plain one that it equals, of rank 2r: [A; A₀] and [B, −B₀].

Where the base is packed in NF4 with the injection (inject(..., pack=names)), pissa, olora and loftq
take up what the rounding leaves: Q = W − sB₀A₀ in NF4, or loftq's Q, lies beneath, W' = Q + sBA,
and no start is subtracted. The model begins nearer to W than W in NF4 would be, and not as that.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import (
    Adapter,
    AdapterConfig,
    check,
    check_count,
    forward,
    positive,
    probability,
    strength,
    whole_number,
)
from lora.errors import ConfigError, TargetError
from lora.kernels.dropout import Mask, drop
from lora.layers import View, apply
from lora.methods._tokens import Make, token_ids, token_layers
from lora.nf4 import NF4, dequantize
from lora.patterns import ENDING, check_pattern, compiled

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """Settings of a low-rank update. It is scaled by lora_alpha / r."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"lora_dropout", "use_lorafa", "loraplus_lr_ratio"}
    )
    unsaved: ClassVar[frozenset[str]] = frozenset({"use_lorafa", "loraplus_lr_ratio"})

    r: int = 8
    """Rank of the update, at least 1."""
    lora_alpha: float = 8.0
    """Numerator of the scaling lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training, 0 <= p < 1."""
    use_rslora: bool = False
    """Scale by lora_alpha / √r, which keeps large ranks learning (arXiv:2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers: a name, its dotted ending or a pattern of either, then the rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """lora_alpha of single layers, likewise."""
    init_lora_weights: str = "default"
    """Where training starts: default, gaussian, pissa, pissa_niter_N, olora, eva or lora_ga; on a
    base in four bits also loftq or loftq_N."""
    bias: Bias = "none"
    """Biases of the base that train too: none, those of adapted layers (lora_only), or all."""
    use_lorafa: bool = False
    """LoRA-FA: A stays as it starts and B alone trains (arXiv:2308.03303)."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: B trains at this multiple of the learning rate (arXiv:2402.12354; there 16)."""
    trainable_token_indices: tuple[int, ...] | dict[str, list[int]] = ()
    """Tokens whose embeddings train as a whole: ids of the input embedding; from Python also
    {layer: ids}. What the model's config ties to the embedding follows."""

    def __post_init__(self) -> None:
        init: Any = self.init_lora_weights
        if init is True:  # as PEFT writes the default
            object.__setattr__(self, "init_lora_weights", "default")
        super().__post_init__()
        whole_number("r", self.r)
        strength("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name, check_value in (("rank_pattern", whole_number), ("alpha_pattern", strength)):
            pattern = getattr(self, name)
            check_count(name, len(pattern))
            for key, value in pattern.items():
                check_value(f"{name} of {key}", value)
                check_pattern(name, key, ENDING)
        init = self.init_lora_weights
        good = re.fullmatch(
            "default|gaussian|pissa(_niter_[1-9][0-9]*)?|olora|eva|lora_ga|loftq(_[1-9][0-9]*)?",
            init,
        )
        wanted = "default, gaussian, pissa, pissa_niter_N, olora, eva, lora_ga, loftq or loftq_N"
        check("init_lora_weights", init, wanted, bool(good))
        positive("loraplus_lr_ratio", self.loraplus_lr_ratio)
        asked = token_ids("trainable_token_indices", self.trainable_token_indices)
        object.__setattr__(self, "trainable_token_indices", asked)


def pick(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a layer's name: of the first key that fits it, or a dotted ending of it."""
    for key, value in pattern.items():
        if compiled(key, ENDING).match(module):
            return value
    return default


def by_layer(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern that gives each other layer its own; by layers' names."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {"^" + re.escape(n): value for n, value in values.items() if value != most}


class LowRank(Adapter):
    """s(BA − B₀A₀), s = lora_alpha / r, for what is built on it.

    trainable_token_indices put an adapter of their own on the embedding: _tokens.
    lora_A (r, in), lora_B (out, r), both in float32 at least; start_A, start_B their frozen start,
    where there is one.
    """

    peft_type = "LORA"
    example: ClassVar = {"r": 3, "lora_alpha": 7.0}
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

    config: LowRankConfig
    start_A: Tensor  # noqa: N815
    start_B: Tensor  # noqa: N815

    def __init__(self, view: View, config: LowRankConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.r = r = pick(config.rank_pattern, module, config.r)
        self.alpha = pick(config.alpha_pattern, module, config.lora_alpha)
        self.scaling = self.alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = config.lora_dropout
        self.lora_A = self.new(view, r, view.in_features)
        self.lora_B = self.new(view, view.out_features, r)
        self.init = config.init_lora_weights
        if view.of_ids and self.init != "gaussian":
            self.init = "default"
        self.starts_away = self.init.startswith(("pissa", "olora", "lora_ga"))
        self.took_up = False
        if self.init not in ("default", "gaussian"):
            most = min(view.in_features, view.out_features)
            most = most // 2 if self.init == "lora_ga" else most
            wanted = f"at most {most} for {module} with init_lora_weights={self.init!r}"
            check("r", r, wanted, r <= most)
        if self.starts_away:
            self.register_buffer("start_A", self.lora_A.detach().clone())
            self.register_buffer("start_B", self.lora_B.detach().clone())
        A, B = ("lora_embedding_A", "lora_embedding_B") if view.of_ids else ("lora_A", "lora_B")
        end = "" if view.of_ids else ".weight"
        self.keys = {"lora_A": A + end, "lora_B": B + end}
        # The one that starts at random, and the one that starts at zero
        self.random, self.zero = ("lora_B", "lora_A") if view.of_ids else ("lora_A", "lora_B")
        self.frozen = frozenset({self.random} if config.use_lorafa else ())

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        if self.took_up:
            raise ConfigError(
                f"{self.module_name}: the base was packed for the start that it had. Load the base"
                " anew, and inject into that."
            )
        W, _ = view.read()
        if self.starts_away and self.init != "lora_ga":  # which calibrate fills
            self.begin(*self.decompose(W.to(self.lora_A.dtype), generator("lora_A")))
            return
        std = 1 / self.r if self.init == "gaussian" else None
        start_at_zero(self.lora_A, self.lora_B, view, std, generator(self.random))

    def begin(self, A: Tensor, B: Tensor) -> None:
        """Start at A (r, in), B (out, r), away from zero."""
        for parameter, start, value in (
            (self.lora_A, self.start_A, A),
            (self.lora_B, self.start_B, B),
        ):
            parameter.copy_(value)
            start.copy_(parameter)

    def decompose(self, W: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A, B of pissa and olora for W, and of loftq for what its rounding left."""
        if self.init == "olora":
            Q, R = torch.linalg.qr(W)
            return R[: self.r], Q[:, : self.r]
        if self.init == "pissa" or self.init.startswith("loftq"):
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, Vh = svd_lowrank(W, self.r, int(self.init.rpartition("_")[2]), generator)
        root = (S[: self.r] / self.scaling).sqrt()
        return root[:, None] * Vh[: self.r], U[:, : self.r] * root

    @classmethod
    def takes_up(cls, config: LowRankConfig) -> bool:
        return config.init_lora_weights.startswith(("pissa", "olora", "loftq"))

    @classmethod
    def needs_packing(cls, config: LowRankConfig) -> bool:
        return config.init_lora_weights.startswith("loftq")

    def pack(self, W: Tensor, quantize: Callable[[Tensor], NF4]) -> NF4:
        if not self.takes_up(self.config):
            return quantize(W)
        W = W.to(self.lora_A.dtype)
        self.took_up, self.starts_away = True, False
        if not self.init.startswith("loftq"):
            del self.start_A, self.start_B
            return quantize(W - self.update())
        for _ in range(int(self.init.partition("_")[2] or 1)):
            q = quantize(W - self.update())  # of W itself at first: B is zero
            A, B = self.decompose(W - dequantize(q, W.dtype), torch.Generator())
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        return q

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        r: int = pick(config.rank_pattern, module, config.r)
        return r * (view.in_features + view.out_features)

    def update(self) -> Tensor:
        """s(BA − B₀A₀), (out, in)."""
        update: Tensor = self.scaling * (self.lora_B @ self.lora_A)
        if self.starts_away:
            update = update - self.scaling * (self.start_B @ self.start_A)
        return update

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A₀ (r, in), B₀ (out, r)"""
        return (self.start_A, self.start_B) if self.starts_away else None

    def updated(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        """The update of m ∘ x without the (out, in) matrix: s(B(A x) − B₀(A₀ x))."""
        dropped = drop(x, mask)
        y: Tensor = self.scaling * F.linear(apply(view, dropped, self.lora_A), self.lora_B)
        if self.starts_away:
            y = y - self.scaling * F.linear(apply(view, dropped, self.start_A), self.start_B)
        return y

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        if clause == "another_seed_other_bits" and config.init_lora_weights in ("pissa", "olora"):
            return "the start follows from W alone"
        return super().exemption(clause, config, bias)

    @classmethod
    def check_targets(cls, config: LowRankConfig, targets: Sequence[str]) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, name):
                if all(pick({key: True}, target, None) is None for target in targets):
                    raise TargetError(
                        f"{name}: {key!r} fits none of the {len(targets)} layers that"
                        f" target_modules means, {targets[0]} the first. Mend the name."
                    )

    @classmethod
    def needs_batches(cls, config: LowRankConfig) -> bool:
        return config.init_lora_weights in ("eva", "lora_ga")

    @classmethod
    def calibrate(
        cls, placed: Sequence[tuple[Any, View]], model: nn.Module, batches: Iterable[Any]
    ) -> None:
        own = [(a, view) for a, view in placed if isinstance(a, LowRank) and not view.of_ids]
        if own and own[0][0].init == "eva":
            _by_inputs(own, model, batches)
        elif own:
            _by_gradients(own, model, batches)

    @classmethod
    def selects(cls, name: str, targeted: bool, config: LowRankConfig) -> bool:
        meant = config.bias == "all" or (config.bias == "lora_only" and targeted)
        return meant and name.rpartition(".")[2] == "bias"

    @classmethod
    def further(
        cls,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: LowRankConfig,
        targets: Sequence[str],
    ) -> Mapping[str, Make]:
        return token_layers(model, modules, config.trainable_token_indices)

    def param_groups(self) -> dict[float, list[nn.Parameter]]:
        groups = super().param_groups()
        ratio, fast = self.config.loraplus_lr_ratio, getattr(self, self.zero)
        if ratio == 1.0:
            return groups
        return {1.0: [p for p in groups[1.0] if p is not fast], ratio: [fast]}

    def stored(self) -> dict[str, Tensor]:
        found = super().stored()
        if self.starts_away:
            found[self.keys["lora_A"]] = torch.cat([self.lora_A, self.start_A], dim=0)
            found[self.keys["lora_B"]] = torch.cat([self.lora_B, -self.start_B], dim=1)
        return found

    @classmethod
    def file_settings(cls, config: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        settings = super().file_settings(config, adapters)
        settings["init_lora_weights"] = True  # what is filed is the plain update
        filed: dict[str, tuple[int, float]] = {}
        for name, adapter in adapters.items():
            if isinstance(adapter, LowRank):
                away = adapter.starts_away
                more = (math.sqrt(2) if config.use_rslora else 2) if away else 1
                filed[name] = (2 if away else 1) * adapter.r, more * adapter.alpha
        for index, (key, pattern) in enumerate(
            (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        ):
            wanted = {name: pair[index] for name, pair in filed.items()}
            # A file's keys are sorted: where that changes what fits first, each layer is named.
            patterns = dict(sorted(settings[pattern].items()))
            if any(pick(patterns, n, settings[key]) != value for n, value in wanted.items()):
                settings[key], patterns = by_layer(wanted)
            settings[pattern] = patterns
        asked = settings["trainable_token_indices"] or None
        if isinstance(asked, dict):
            asked = {name: list(ids) for name, ids in asked.items()}
        return settings | {"trainable_token_indices": asked}

    @classmethod
    def read_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        found = super().read_settings(settings)
        found |= {k: {} for k in ("rank_pattern", "alpha_pattern") if k in found and not found[k]}
        found["trainable_token_indices"] = found.get("trainable_token_indices") or ()
        init = found.get("init_lora_weights")
        if init in (None, False, "gaussian", "orthogonal", "eva"):  # these leave W alone
            found["init_lora_weights"] = "default"
        elif isinstance(init, str) and init.startswith(("pissa_niter_", "lora_ga", "loftq")):
            raise ConfigError(
                f"init_lora_weights={init!r} moved the base by a product that is not in the file."
                " Save it there with path_initial_model_for_weight_conversion."
            )
        return found


def start_at_zero(
    A: Tensor, B: Tensor, view: View, std: float | None, generator: torch.Generator
) -> None:
    """A (r, in) kaiming_uniform(a=√5), or N(0, std²), and B (out, r) zeros; on an Embedding A zeros
    and B N(0, 1)."""
    drawn, zero = (B, A) if view.of_ids else (A, B)
    start = torch.empty(drawn.shape, dtype=torch.float32, device="cpu")
    if view.of_ids or std is not None:
        start.normal_(std=1.0 if view.of_ids else std, generator=generator)  # type: ignore[arg-type]
    else:
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    drawn.copy_(start)
    zero.zero_()


def svd_lowrank(
    M: Tensor, r: int, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, r), S (r,), Vh (r, columns): the largest r by randomised subspace iteration.

    Halko et al. 2011, algorithm 5.1, 8 directions more than asked.
    """
    size = min(r + 8, *M.shape)
    start = torch.randn(M.shape[1], size, generator=generator, dtype=torch.float32)
    Q = torch.linalg.qr(M @ start.to(M.device, M.dtype)).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def _by_inputs(
    placed: Sequence[tuple[LowRank, View]], model: nn.Module, batches: Iterable[Any]
) -> None:
    """EVA with equal ranks (its ρ = 1): A (r, in), the right singular vectors of the inputs.

    The singular values and vectors of what was seen stand for it when the next batch comes
    (incremental SVD). Padded positions do not count.
    """
    seen: dict[LowRank, Tensor] = {}
    real: Tensor | None = None

    # An encoder's mask is not its decoder's.
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def look(adapter: LowRank, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        masked = real is not None and x.shape[:-1] == real.shape
        rows = x[real] if masked else x
        rows = rows.detach().reshape(-1, x.shape[-1]).to(adapter.lora_A.dtype)
        rows = torch.cat([seen[adapter], rows]) if adapter in seen else rows
        generator = torch.Generator().manual_seed(0)
        _, S, Vh = svd_lowrank(rows, 2 * adapter.r, 4, generator)
        seen[adapter] = S[:, None] * Vh

    hooks = [
        view.module.register_forward_pre_hook(
            lambda _, args, kwargs, adapter=adapter: look(adapter, args, kwargs), with_kwargs=True
        )
        for adapter, view in placed
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                real = None if mask is None or two else mask.bool()
                forward(model, batch)
            for adapter, _ in placed:
                if adapter not in seen or len(seen[adapter]) < adapter.r:
                    rows = len(seen.get(adapter, ()))
                    raise ConfigError(
                        f"eva: {adapter.module_name} saw {rows} directions for r={adapter.r}."
                        " Pass more batches."
                    )
                adapter.lora_A.copy_(nn.functional.normalize(seen[adapter][: adapter.r]))
    finally:
        for hook in hooks:
            hook.remove()


def _by_gradients(
    placed: Sequence[tuple[LowRank, View]], model: nn.Module, batches: Iterable[Any]
) -> None:
    """LoRA-GA: of the gradient's U S Vᵀ, A = c Vᵀ[:r] and B = c U[:, r:2r], c = out^¼ / √γ.

    γ = 16 and the choice of vectors as in the paper (its "stable" and "ArB2r"). The first step of
    A and B then moves W along its own gradient.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    weights = {adapter: view.parameters()[0] for adapter, view in placed}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                loss = getattr(forward(model, batch), "loss", None)
                if loss is None:
                    raise ConfigError("lora_ga: the model's output has no loss. Pass labels too.")
                loss.backward()
        for adapter, view in placed:
            gradient = weights[adapter].grad
            if gradient is None or not bool(gradient.any()):
                raise ConfigError(
                    f"lora_ga: {adapter.module_name} got no gradient. Leave it out, or pass other"
                    " batches."
                )
            gradient = (gradient.T if view.transposed else gradient).to(adapter.lora_A.dtype)
            generator = torch.Generator().manual_seed(0)
            U, _, Vh = svd_lowrank(gradient, 2 * adapter.r, 4, generator)
            size = view.out_features**0.25 / 4
            with torch.no_grad():
                adapter.begin(size * Vh[: adapter.r], size * U[:, adapter.r :])
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
