"""A base's config.json: whatever transformers' models state passes, and nothing absurd does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import llama
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora.errors import LoraError, ModelError
from lora.interop.basefile import BASE_FILE
from lora.interop.pretrained import base_config, skeleton_of

MODELS = sorted(
    {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    - {"musicflamingo"}  # it has 1200.0 positions
)


@pytest.mark.parametrize("kind", MODELS)
def test_the_defaults_of_every_architecture_pass(kind: str) -> None:
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception as error:
        pytest.skip(f"{kind} has no defaults: {error}")
    stated = json.loads(config.to_json_string(use_diff=False))
    BASE_FILE.validate_python(stated, strict=True, extra="allow")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().config.save_pretrained(tmp_path)
    return tmp_path


def state(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("architectures", 5, "a list, found 5"),
        ("architectures", [5], "a text, found 5"),
        ("num_attention_heads", 0, "a whole number from 1 to 100,000, found 0"),
        ("num_attention_heads", -4, "a whole number from 1 to 100,000, found -4"),
        ("num_attention_heads", None, "a whole number from 1 to 100,000, found None"),
        ("num_key_value_heads", "2", "a whole number from 1 to 100,000, found '2'"),
        ("num_hidden_layers", 10**9, "a whole number from 0 to 4,096, found 1000000000"),
        ("num_labels", 2**31, "a whole number from 1 to 100,000, found 2147483648"),
        ("hidden_size", 0.5, "a whole number from 1 to 67,108,864, found 0.5"),
        ("vocab_size", True, "a whole number from 1 to 67,108,864, found True"),
        ("max_position_embeddings", "x", "a whole number from 1 to 67,108,864, found 'x'"),
        ("eos_token_id", [1, "x"], "a whole number from -1 to"),
        ("is_encoder_decoder", "no", "true or false, found 'no'"),
        ("quantization_config", 5, "an object, found 5"),
    ],
)
def test_what_no_model_states_is_named(key: str, value: Any, wanted: str, base: Path) -> None:
    state(base, **{key: value})
    with pytest.raises(ModelError, match=rf"config.json is damaged: {key}.* must be {wanted}"):
        base_config(str(base))


@pytest.mark.parametrize("key", ["num_foo_layers", "expert_count", "conv_blocks"])
def test_counts_by_any_name_are_bounded(key: str, base: Path) -> None:
    state(base, **{key: 10**9})
    with pytest.raises(ModelError, match=f"states {key}=1e[+]09, at most [0-9,]+ are allowed"):
        base_config(str(base))
    state(base, **{key: 1, "vocab_size_per_layer_input": 262_144})  # Gemma 3n's
    assert base_config(str(base)).model_type == "llama"


@pytest.mark.parametrize("payload", [b"", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"a":'])
def test_what_is_no_config_is_named(payload: bytes, base: Path) -> None:
    (base / "config.json").write_bytes(payload)
    with pytest.raises(ModelError, match=f"--base {base}"):
        base_config(str(base))


def test_no_config_lets_through_anything_but_an_error_of_ours(base: Path) -> None:
    """A config that passes makes a model, or transformers' refusal is one of ours."""
    good = json.loads((base / "config.json").read_text())
    odd = (None, True, -4, 0, 3, 0.5, 1e30, 2**31, 10**9, "x", [], [1], {}, {"a": 1}, "float32")
    made = 0
    for seed in range(300):
        rng = random.Random(seed)
        changes = {rng.choice(list(good)): rng.choice(odd) for _ in range(rng.randint(1, 2))}
        (base / "config.json").write_text(json.dumps(good | changes))
        try:
            model = skeleton_of(base_config(str(base)), "text")
        except LoraError:
            continue
        made += isinstance(model, transformers.PreTrainedModel)
    assert 0 < made < 300
