"""facts: trainable parameters of real models, from their shapes alone (meta device)."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

import lora


def meta(kind: type, config: transformers.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def distilbert() -> nn.Module:
    kind = transformers.DistilBertForSequenceClassification
    return meta(kind, transformers.DistilBertConfig(num_labels=2))


def roberta(large: bool) -> nn.Module:
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096} if large else {}  # fmt: skip
    config = transformers.RobertaConfig(vocab_size=50265, num_labels=2, **size)
    return meta(transformers.RobertaForSequenceClassification, config)


def llama2() -> nn.Module:
    return meta(transformers.LlamaForCausalLM, transformers.LlamaConfig())


def llama3() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
    )
    return meta(transformers.LlamaForCausalLM, config)


def mistral() -> nn.Module:
    config = transformers.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    return meta(transformers.MistralForCausalLM, config)


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
    )  # fmt: skip
    return meta(transformers.Qwen2ForCausalLM, config)


def gpt3() -> nn.Module:
    """GPT-3's shape with separate projections, as the paper counts them."""
    config = transformers.OPTConfig(
        hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152,
        word_embed_proj_dim=12288,
    )  # fmt: skip
    return meta(transformers.OPTForCausalLM, config)


QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("build", "r", "targets", "adapters"),
    [
        (distilbert, 4, ("q_lin", "v_lin"), 73_728),
        (distilbert, 8, ("q_lin", "v_lin"), 147_456),
        (lambda: roberta(False), 8, ("query", "value"), 294_912),
        (lambda: roberta(True), 8, ("query", "value"), 786_432),
        (llama2, 8, QV, 4_194_304),
        (llama2, 16, "all-linear", 39_976_960),
        (llama3, 16, "all-linear", 41_943_040),
        (mistral, 16, "all-linear", 41_943_040),
        (qwen2, 16, "all-linear", 40_370_176),
        (gpt3, 1, QV, 4_718_592),
        (gpt3, 8, QV, 37_748_736),
    ],
    ids=["distilbert-4", "distilbert-8", "roberta-base", "roberta-large", "llama2-qv", "llama2-all",
         "llama3-all", "mistral-all", "qwen2-all", "gpt3-1", "gpt3-8"],
)  # fmt: skip
def test_adapter_parameters(build, r: int, targets, adapters: int) -> None:
    report = lora.inject(build(), lora.LoRAConfig(r=r, target_modules=targets))
    assert report.adapter_parameters == report.trainable == adapters


def test_distilbert_with_its_head_and_whole() -> None:
    model = distilbert()
    base = sum(p.numel() for p in model.parameters())
    assert base == 66_955_010
    report = lora.inject(
        model,
        lora.LoRAConfig(
            r=8, target_modules=("q_lin", "v_lin"), modules_to_save=("pre_classifier", "classifier")
        ),
    )
    assert report.trainable == 739_586
    assert report.trainable - report.adapter_parameters == 592_130
    assert lora.inject(distilbert(), lora.FullConfig()).trainable == 66_955_010


def test_all_linear_leaves_the_output_head_alone() -> None:
    report = lora.inject(llama2(), lora.LoRAConfig(r=16))
    assert "lm_head" not in report.plan.targets
    assert {name.rpartition(".")[2] for name in report.plan.targets} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert json.loads(json.dumps(str(report))).count("×32") == 7
