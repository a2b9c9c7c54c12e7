"""Trainable tokens: trains rows of an embedding and adapts no other layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from lora.adapter import Adapter
from lora.errors import ConfigError, TargetError
from lora.layers import View
from lora.method import ChecksTargets, Follows
from lora.methods._tokens import Make, Tokens, followers_of, input_embedding, token_ids
from lora.settings import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class TokensConfig(AdapterConfig):
    """Settings of trainable tokens. Layers tied to the input embedding use its trained rows."""

    target_modules: str | tuple[str, ...] = "input-embedding"
    """Embeddings to train rows of: input-embedding, names or the last parts of names, or a regular
    expression."""
    token_indices: tuple[int, ...] = ()
    """Ids of the tokens to train, such as 32000 32001. Required."""

    def __post_init__(self) -> None:
        super().__post_init__()
        token_ids("token_indices", self.token_indices)
        if self.modules_to_save:
            raise ConfigError(
                f"tokens: no module trains besides, found modules_to_save={self.modules_to_save}."
                " To train both, set --method lora --trainable-token-indices."
            )


class TrainableTokens(Follows, ChecksTargets, Tokens):
    """W' is W with trained rows for some token ids.  PEFT's TRAINABLE_TOKENS.

    trainable_tokens_delta (n, dim)   replaces the base's rows, is not added to them. Initially
    W's rows, so W' = W at step 0. A layer tied to the input embedding uses the same rows.
    Cost: n·dim parameters; copies the table at every step.
    """

    name = "tokens"
    paper = "none (from PEFT)"
    when = "To train only a few new tokens. With LoRA, use trainable_token_indices instead."
    Config = TokensConfig
    peft_type = "TRAINABLE_TOKENS"
    unfiled = frozenset(
        {"exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"}
    )
    neutral: ClassVar = {"init_weights": ...}  # changes only the initial values
    example: ClassVar = {"token_indices": (4, 1), "target_modules": ("first", "second")}
    exempt: ClassVar = {"another_seed_other_bits": "the initial values depend only on W"}
    keys = {}

    def __init__(
        self, view: View, config: TokensConfig, module: str, leader: str | None = None
    ) -> None:
        super().__init__(view, config, module, config.token_indices, leader)

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        biased = "a layer with a bias is refused, since PEFT ignores the bias" if bias else None
        return super().exemption(clause, config, bias) or biased

    @classmethod
    def check_targets(cls, config: TokensConfig, targets: Sequence[str]) -> None:
        if not config.token_indices:
            raise TargetError("tokens: no ids to train. Set --token-indices.")

    @classmethod
    def further(
        cls,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        config: TokensConfig,
        targets: Sequence[str],
    ) -> Mapping[str, Make]:
        table = input_embedding(model)
        leader = next((name for name in targets if modules[name] is table), None)
        ends = followers_of(model, modules, table) if leader else []
        tied = [name for name in modules if any(name.endswith(end) for end in ends)]
        return {name: partial(cls, leader=leader) for name in tied}

    @classmethod
    def size(cls, view: View, config: TokensConfig, module: str) -> int:
        return len(config.token_indices) * cls.shape(view)[1]

    def parameters_by_key(self) -> dict[str, Tensor]:
        # Also those of a tied layer: PEFT saves its rows a second time.
        return Adapter.parameters_by_key(self)
