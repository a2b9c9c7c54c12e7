"""Files of PEFT's as users have them: heads of any name, old names of modules, layers of any class.

Each is written by peft, its tensors filled from their keys, and peft's logits are the judge.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import distilbert, roberta, tokens
from test_peft import fill, peft_model, read_by_peft
from torch import Tensor, nn

import lora
from lora.layers import kind
from lora.testing import perturb
from lora.training import check_alive

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}


def filled(base: nn.Module, folder: Path, **settings: object) -> peft.PeftModel:
    """peft's adapter on the base, its values from its keys, saved."""
    theirs = peft_model(base, **settings)
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(folder)
    return theirs


def off(one: nn.Module, other: nn.Module, ids: Tensor | None = None) -> float:
    ids = tokens() if ids is None else ids
    with torch.no_grad():
        found = one.eval()(input_ids=ids).logits - other.eval()(input_ids=ids).logits
    return float(found.abs().max())


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def llama_classifier() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **WIDE, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def t5_classifier() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, num_labels=3,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForSequenceClassification(config)


@pytest.mark.parametrize(
    ("build", "names", "saved"),
    [
        (llama_classifier, ["q_proj"], ("score",)),
        (roberta, ["query"], ("classifier",)),
        (distilbert, ["q_lin"], ("pre_classifier", "classifier")),
        (t5_classifier, ["q"], ()),  # whose classification_head PEFT neither trains nor saves
    ],
)
def test_the_heads_that_peft_names_where_one_or_none_is_there(
    build: Callable[[], nn.Module], names: list[str], saved: tuple[str, ...], tmp_path: Path
) -> None:
    base = seeded(build)
    theirs = filled(
        copy.deepcopy(base), tmp_path / "theirs", r=2, task_type="SEQ_CLS", target_modules=names
    )
    settings = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    ids = tokens().clamp(min=2)
    ids[:, -1] = 1  # T5 classifies at its end token
    model = copy.deepcopy(base)
    report = lora.load(model, tmp_path / "theirs", trainable=True)
    assert report.plan.saved == saved
    assert ("modules_to_save names no module" in str(report)) == (not saved)
    assert off(model, theirs, ids) < 1e-5
    lora.save(model, tmp_path / "ours")
    again = copy.deepcopy(base)
    lora.load(again, tmp_path / "ours")
    assert off(again, theirs, ids) < 1e-5
    assert off(read_by_peft(copy.deepcopy(base), tmp_path / "ours"), theirs, ids) < 1e-5


def test_a_head_that_is_in_the_file_and_not_in_the_model_is_named(tmp_path: Path) -> None:
    filled(seeded(roberta), tmp_path, r=2, task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(lora.CheckpointError, match="classifier.* has no place in the model"):
        lora.load(transformers.RobertaForMaskedLM(seeded(roberta).config), tmp_path)


FALCONS = {
    "without biases": {},
    "biases": {"bias": True, "multi_query": False},
    "grouped heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def falcon(**settings: object) -> nn.Module:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, **settings))


@pytest.mark.parametrize("name", FALCONS)
def test_falcons_linear_layers_are_linear_layers(name: str, tmp_path: Path) -> None:
    base = seeded(lambda: falcon(**FALCONS[name]))
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    theirs = filled(copy.deepcopy(base), tmp_path / "theirs", r=3, target_modules=names)
    model = copy.deepcopy(base)
    report = lora.load(model, tmp_path / "theirs", trainable=True)
    assert len(report.plan.targets) == 8
    assert off(model, theirs) < 1e-5
    lora.save(model, tmp_path / "ours")
    assert off(read_by_peft(copy.deepcopy(base), tmp_path / "ours"), theirs) < 1e-5
    lora.merge(model, probe={"input_ids": tokens()})
    assert off(model, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_falcon_begins_as_itself_bit_for_bit(dtype: torch.dtype) -> None:
    """Its layers round before they add the bias: they are called, and not computed past."""
    base = seeded(lambda: falcon(bias=True, multi_query=False)).to(dtype)
    model = copy.deepcopy(base)
    report = lora.inject(model, lora.LoRAConfig(r=2))
    assert {name.rpartition(".")[2] for name in report.plan.targets} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert off(model, base) == 0
    perturb(model)
    assert off(model, base) > 1e-3
    model.train()(tokens(), labels=tokens()).loss.backward()
    check_alive(model)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T * 2


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return F.dropout(y, training=self.training)


class Forgets(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def _class(module: str, name: str) -> type[nn.Linear]:
    import importlib

    found = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    assert issubclass(found, nn.Linear)
    return found


@pytest.mark.parametrize(
    ("cls", "bias", "linear"),
    [
        (Own, True, True),
        (Own, False, True),
        (Scaled, False, False),
        (Noisy, True, False),
        (Forgets, False, True),
        (Forgets, True, False),
        (_class("falcon.modeling_falcon", "FalconLinear"), True, True),
        (_class("falcon.modeling_falcon", "FalconLinear"), False, True),
        (_class("llama4.modeling_llama4", "Llama4Router"), False, False),
        (_class("phimoe.modeling_phimoe", "PhimoeTopKRouter"), False, False),
        (_class("idefics.modeling_idefics", "IdeficsDecoupledLinear"), True, False),
    ],
)
def test_a_subclass_is_a_linear_layer_if_it_computes_what_one_does(
    cls: type[nn.Linear], bias: bool, linear: bool
) -> None:
    layer = cls.__new__(cls)
    nn.Linear.__init__(layer, 6, 4, bias=bias)
    state = torch.get_rng_state()
    assert kind(layer) == ("Linear" if linear else None)
    assert torch.equal(state, torch.get_rng_state())
    model = nn.Sequential(layer, nn.Linear(4, 4))
    if linear:
        before = model(torch.ones(2, 6))
        lora.inject(model, lora.LoRAConfig(r=1, target_modules=("0",)))
        assert torch.equal(model(torch.ones(2, 6)), before)
    else:
        with pytest.raises(lora.TargetError, match=f"matches 0, a {cls.__name__}: no view for it"):
            lora.inject(model, lora.LoRAConfig(r=1, target_modules=("0",)))


def _vision() -> dict[str, object]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision(), projection_dim=32),
        text_config=transformers.LlamaConfig(**SMALL, **WIDE),
        image_token_index=98,
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_vision()),
        text_config=transformers.GemmaConfig(**SMALL, **WIDE, head_dim=8),
        image_token_index=98, projection_dim=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llava, paligemma])
def test_old_names_of_a_vision_language_model(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    base = seeded(build)
    names = r".*language_model.*\.[qv]_proj"
    theirs = filled(copy.deepcopy(base), tmp_path, r=2, target_modules=names)
    path = tmp_path / "adapter_model.safetensors"
    before = safetensors.torch.load(path.read_bytes())
    renamed = {}
    for key, tensor in before.items():
        new = key.replace("model.model.language_model.", "model.language_model.model.")
        renamed[new] = tensor
    assert not {*renamed} & {*before}
    path.write_bytes(safetensors.torch.save(renamed, {"format": "pt"}))
    judge = read_by_peft(copy.deepcopy(base), tmp_path)
    model = copy.deepcopy(base)
    lora.load(model, tmp_path)
    ids = tokens() % 97
    assert off(judge, theirs, ids) == 0
    assert off(model, judge, ids) < 1e-5
    assert off(base, judge, ids) > 1e-3
    # what names no layer under any name is refused, as it was
    renamed["base_model.model.language_model.model.layers.9.self_attn.q_proj.lora_A.weight"] = (
        torch.zeros(2, 32)
    )
    path.write_bytes(safetensors.torch.save(renamed, {"format": "pt"}))
    with pytest.raises(lora.CheckpointError, match="layers.9.* has no place in the model"):
        lora.load(copy.deepcopy(base), tmp_path)
