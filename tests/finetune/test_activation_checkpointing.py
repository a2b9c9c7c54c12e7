"""A model whose blocks are computed again learns as it does without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import tokens
from torch import Tensor, nn

import lora
from lora import nf4
from lora.errors import ModelError, TargetError
from lora.finetune.memory import checkpoint_activations
from lora.finetune.quantized import packable
from lora.inventory import wrappers_of
from lora.testing import perturb
from lora.training import check_alive

SHARED: dict[str, Any] = {"vocab_size": 99, "num_labels": 2, "pad_token_id": 0}
BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.2, **SHARED,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, **SHARED,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DistilBert": {
        "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "dropout": 0.2, **SHARED,
    },
    "Bert": BERT,
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "GPT2": {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2,
        "use_cache": False, **SHARED,
    },
    "T5": {
        "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "eos_token_id": 2,
        "decoder_start_token_id": 0, "dropout_rate": 0.2, "use_cache": False, **SHARED,
    },
}  # fmt: skip


def classifier(architecture: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture])
    return getattr(transformers, f"{architecture}ForSequenceClassification")(config)


def texts() -> Tensor:
    ids = tokens().clamp(min=3)
    ids[:, -1] = 2  # T5 reads its class off the one end of a text
    return ids


def learn(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients that it leaves, of one seed's masks."""
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=texts(), labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_bits_by_the_same_masks(architecture: str, method: str) -> None:
    model = classifier(architecture)
    if method == "qlora":
        nf4.quantize_layers(model, packable(model))
    if method == "full":
        lora.inject(model, lora.FullConfig())
    else:
        config: Callable[..., Any] = lora.METHODS["dora" if method == "dora" else "lora"].Config
        lora.inject(model, config(r=4, lora_dropout=0.2))
        perturb(model)
    calls: list[nn.Module] = []
    for layer in wrappers_of(model)[0].values():
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    loss, wanted = learn(model)
    once = len(calls)
    checkpoint_activations(model)
    again, found = learn(model)
    assert torch.equal(again, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert len(calls) - once >= 1.5 * once


def test_layers_of_one_input_that_are_read_together_agree_where_nothing_is_dropped() -> None:
    model = classifier("Llama")
    model.config.attention_dropout = 0.0
    lora.inject(model, lora.LoRAConfig(r=4))
    perturb(model)
    loss, wanted = learn(model)
    checkpoint_activations(model)
    again, found = learn(model)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(found, wanted)


def test_what_lies_below_the_first_adapter_needs_no_gradient() -> None:
    model = classifier("DistilBert")
    lora.inject(model, lora.LoRAConfig(r=4))
    checkpoint_activations(model)
    learn(model)
    embedded = model.distilbert.embeddings(tokens())
    assert not embedded.requires_grad


def test_an_architecture_without_it_is_named() -> None:
    config = transformers.CTRLConfig(vocab_size=9, n_positions=8, n_embd=8, dff=8, n_layer=1,
                                     n_head=1)  # fmt: skip
    with pytest.raises(ModelError, match="none for CTRLForSequenceClassification. Leave it out"):
        checkpoint_activations(transformers.CTRLForSequenceClassification(config))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("head", [(), ("classifier",)])
def test_adapters_dead_under_a_reentrant_checkpoint_are_named(head: tuple[str, ...]) -> None:
    model = classifier("DistilBert")
    lora.inject(model, lora.LoRAConfig(r=4, modules_to_save=head))
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()
    loss = model(input_ids=tokens(), labels=torch.tensor([0, 1, 1])).loss
    assert loss.requires_grad == bool(head)
    if head:
        loss.backward()
    with pytest.raises(TargetError, match=r"12 of 1\d trained modules.*use_reentrant=False"):
        check_alive(model)


def test_a_layer_whose_dtype_the_model_goes_by_is_not_packed() -> None:
    model = classifier("T5").eval()
    names = packable(model)
    assert names
    assert not any(name.endswith(".wo") for name in names)
    nf4.quantize_layers(model, names)
    assert model(input_ids=texts()).logits.isfinite().all()
