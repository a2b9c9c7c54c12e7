"""The schema of a base model's config.json.

transformers accepts any number of any type and allocates lists, tables and modules from them before
it reads a weight. We check the file against this schema first, so that a damaged file cannot use
all memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict

LARGEST_VALUES = {"layers?$": 4_096, "label|expert|head|block|num_": 100_000, "position": 2**26}
"""Pattern of a key -> the largest value allowed. If several match, the first counts. Real models
stay far below: they have at most a few hundred layers."""


def _whole(least: int, most: int, optional: bool = True) -> Callable[[Any], Any]:
    """Returns a validator of an integer or a list of them. optional: null is valid too."""

    def check_bounds(value: Any) -> Any:
        values = value if isinstance(value, list) else [value] * (value is not None or not optional)
        # type(), not isinstance(): True is an int too.
        if not all(type(number) is int and least <= number <= most for number in values):
            raise ValueError(f"must be a whole number from {least} to {most:,}")
        return value

    return check_bounds


def _check_counts(config: Any) -> Any:
    """Raises ValueError if a count of layers, heads, labels, ... is larger than any model has.

    It matches parts of the keys, so it also covers keys that the schema does not list.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):  # text_config, vision_config and others
            _check_counts(value)
        most = next((most for part, most in LARGEST_VALUES.items() if re.search(part, key)), None)
        # Floats too: JSON's 1e9 is one.
        if most is not None and isinstance(value, int | float) and value > most:
            raise ValueError(f"states {key}={value:.6g}, at most {most:,} are allowed")
    return config


LayerCount = Annotated[Any, AfterValidator(_whole(0, 4_096, optional=False))]
Heads = Annotated[Any, AfterValidator(_whole(1, 100_000, optional=False))]
Groups = Annotated[Any, AfterValidator(_whole(1, 100_000))]
Width = Annotated[Any, AfterValidator(_whole(1, 2**26))]
Token = Annotated[Any, AfterValidator(_whole(-1, 2**31))]


class BaseFile(TypedDict, total=False):
    """config.json: the keys that we read, and the sizes that most architectures have.

    Every key is optional: architectures use different names, and transformers has defaults.
    """

    model_type: str
    architectures: list[str] | None
    is_encoder_decoder: bool
    tie_word_embeddings: bool
    quantization_config: dict[str, Any] | None
    id2label: dict[str, Any] | None
    num_labels: Groups
    num_hidden_layers: LayerCount
    num_layers: LayerCount
    num_decoder_layers: LayerCount
    n_layer: LayerCount
    n_layers: LayerCount
    encoder_layers: LayerCount
    decoder_layers: LayerCount
    num_attention_heads: Heads
    num_key_value_heads: Groups
    num_heads: Heads
    n_head: Heads
    n_heads: Heads
    encoder_attention_heads: Heads
    decoder_attention_heads: Heads
    hidden_size: Width
    intermediate_size: Width
    vocab_size: Width
    max_position_embeddings: Width
    n_positions: Width
    n_embd: Width
    n_inner: Width
    dim: Width
    hidden_dim: Width
    d_model: Width
    d_ff: Width
    d_kv: Width
    head_dim: Annotated[Any, AfterValidator(_whole(0, 2**26))]
    pad_token_id: Token
    bos_token_id: Token
    eos_token_id: Token
    decoder_start_token_id: Token
    text_config: BaseFile | None


BASE_FILE: TypeAdapter[BaseFile] = TypeAdapter(Annotated[BaseFile, AfterValidator(_check_counts)])
