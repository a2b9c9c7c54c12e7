"""Tied weights: trained rows, whole copies and adapters on one side of a tie or on both, against
PEFT's reading of the same file and transformers' reading of the merged folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from architectures import ARCHITECTURES, GROUPED, SHAPE, build
from torch import nn

import lora
from lora.testing import perturb, snapshot, unchanged

Asked = list[int] | dict[str, list[int]]


def bert_mlm(**more: Any) -> Any:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(**SHAPE, **more)).eval()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **more)).eval()


def t5(cls: Any = hf.T5ForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    return cls(ARCHITECTURES["t5"][1]()).eval()


class Plain(nn.Module):
    """A table and a head of one weight, and nothing by which transformers or PEFT could know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(300, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.table(input_ids)))


# name: (model, the targets of LoRA, trainable_token_indices)
TOKENS: dict[str, tuple[Callable[[], Any], str, Asked]] = {
    "gpt2": (lambda: build("gpt2"), "c_attn", [3, 1]),
    "gpt2, by name": (lambda: build("gpt2"), "c_attn", {"wte": [3, 1]}),
    "gpt2, the head alone": (lambda: build("gpt2"), "c_attn", {"lm_head": [5, 3]}),
    "gpt2, apart": (lambda: build("gpt2"), "c_attn", {"wte": [3, 1], "lm_head": [5]}),
    "gpt2, both alike": (lambda: build("gpt2"), "c_attn", {"wte": [3, 1], "lm_head": [3, 1]}),
    "gpt2, another order": (lambda: build("gpt2"), "c_attn", {"wte": [3, 1], "lm_head": [1, 3]}),
    "gpt2, positions": (lambda: build("gpt2"), "c_attn", {"wpe": [2], "lm_head": [5]}),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), "q_proj", [3, 1]),
    "llama, untied": (llama, "q_proj", {"embed_tokens": [3, 1], "lm_head": [3, 1]}),
    "bert": (bert_mlm, "query", [3, 1]),
    "bert, in full": (bert_mlm, "query", {
        "bert.embeddings.word_embeddings": [3, 1], "cls.predictions.decoder": [3, 1]}),
    "bert, by ending": (bert_mlm, "query", {"word_embeddings": [3, 1], "decoder": [3, 1]}),
    "bert, apart": (bert_mlm, "query", {"word_embeddings": [3, 1], "predictions.decoder": [2]}),
    "t5": (t5, "q", [3, 1]),
    "t5, encoder and decoder": (t5, "q", {"embed_tokens": [3, 1]}),
    "t5, encoder": (t5, "q", {"encoder.embed_tokens": [3, 1]}),
    "t5, apart": (t5, "q", {"shared": [3, 1], "lm_head": [2]}),
    "t5, apart in part": (t5, "q", {"shared": [3, 1], "embed_tokens": [3, 1]}),
    "t5 for classes": (lambda: t5(hf.T5ForSequenceClassification), "q", [3, 1]),
    "bart": (lambda: build("bart"), "q_proj", [3, 1]),
    "bart, apart": (lambda: build("bart"), "q_proj", {"shared": [3, 1], "embed_tokens": [2]}),
    "plain": (Plain, "inner", [3, 1]),
    "plain, by name": (Plain, "inner", {"table": [3, 1], "head": [5]}),
}  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 1, 7, 5, 9, 1], [8, 4, 6, 3, 5, 1]])
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    config = getattr(base, "config", None)
    ids[:, -1] = getattr(config, "eos_token_id", None) or 1  # where T5 reads a class
    batch = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False) and hasattr(base, "lm_head"):
        batch["decoder_input_ids"] = ids
    found = model.eval()(**batch)
    return getattr(found, "logits", found)


def off(one: Any, other: Any) -> float:
    first = one if isinstance(one, torch.Tensor) else logits(one)
    second = other if isinstance(other, torch.Tensor) else logits(other)
    return float((first - second).abs().max() / second.abs().max().clamp(min=1.0))


def with_peft(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def by_peft(model: Any, targets: str, asked: Asked, **settings: Any) -> Any:
    settings |= {"target_modules": [targets], "trainable_token_indices": asked}
    return with_peft(model, peft.LoraConfig(r=2, **settings))


def moved(model: Any) -> Any:
    """The model with all that trains moved, by its shape's own values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def read_by_peft(model: Any, folder: Path) -> Any:
    """Any warning about keys is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*tied")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def saved_by_peft(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no config to compare with
        model.save_pretrained(folder)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())


both = pytest.mark.parametrize(
    ("name", "dora"), [(name, False) for name in TOKENS] + [("gpt2, apart", True), ("bert", True)]
)


def comes_back(model: nn.Module, theirs: nn.Module, folder: Path) -> None:
    """PEFT's file in `folder` is read to PEFT's output, and written again to the same tensors."""
    lora.load(model, folder)
    assert off(model, theirs) < 1e-5
    lora.save(model, folder / "again")
    first, second = written(folder), written(folder / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@both
def test_we_read_trained_rows_as_peft_does(name: str, dora: bool, tmp_path: Path) -> None:
    make, targets, asked = TOKENS[name]
    theirs = moved(by_peft(make(), targets, asked, use_dora=dora))
    saved_by_peft(theirs, tmp_path)
    comes_back(make(), theirs, tmp_path)
    assert off(read_by_peft(make(), tmp_path / "again"), theirs) < 1e-5


@both
def test_trained_rows_of_ours_are_read_by_peft_and_again_here(
    name: str, dora: bool, tmp_path: Path
) -> None:
    make, targets, asked = TOKENS[name]
    config = lora.METHODS["dora" if dora else "lora"].Config
    lora.inject(
        model := make(), config(r=2, target_modules=(targets,), trainable_token_indices=asked)
    )
    assert off(model, make()) < 1e-6
    perturb(model, size=0.3)
    lora.save(model, tmp_path)
    assert off(read_by_peft(make(), tmp_path), model) < 1e-5
    lora.load(other := make(), tmp_path)
    assert off(other, model) == 0
    if name != "t5 for classes":  # which reads its embeddings by another path than `shared`
        lora.eject(other)
        rows = lora.LoRAConfig(r=1, target_modules=(targets,), trainable_token_indices=asked)
        lora.inject(other, rows)
        with torch.no_grad():
            for key, parameter in lora.inventory.trained_parameters(other, "default").items():
                if "tokens_delta" in key:
                    parameter.add_(torch.randn(parameter.shape))
        assert off(other, make()) > 1e-2  # the rows act by themselves


@pytest.mark.parametrize(
    ("make", "asked", "message"),
    [
        (lambda: build("gpt2"), {"wte": [3], "transformer.wte": [4]}, "wte has two lists of ids"),
        (t5, {"lm_head": [3], "encoder.embed_tokens": [3]}, "tied to shared.*Name shared too"),
        (lambda: moved(bert_mlm()), [3], "decoder has a bias, which PEFT leaves out"),
        (lambda: build("gpt2"), {"transformer.h": [3]}, "'transformer.h' names no embedding"),
        (lambda: build("gpt2"), [3, 3], "distinct ids"),
        (lambda: build("gpt2"), [-1], "ids below the 300"),
        (lambda: build("gpt2"), {"lm_head": [300]}, "ids below the 300"),
    ],
)
def test_rows_that_cannot_be_trained_as_asked_are_refused(
    make: Callable[[], Any], asked: Asked, message: str
) -> None:
    before, pattern = snapshot(model := make()), ".*(c_attn|query|q)"

    def inject() -> None:
        settings = {"target_modules": pattern, "trainable_token_indices": asked}
        lora.inject(model, lora.LoRAConfig(r=2, **settings))

    with pytest.raises((lora.TargetError, lora.ConfigError), match=message):
        inject()
    assert unchanged(before, model)


ROWS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gpt2": (lambda: build("gpt2"), {}),
    "gpt2, by name": (lambda: build("gpt2"), {"target_modules": ["wte"]}),
    "gpt2, the head": (lambda: build("gpt2"), {"target_modules": ["lm_head"]}),
    "llama, untied": (llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    "bert": (bert_mlm, {}),
    "t5": (t5, {}),
    "t5 for classes": (lambda: t5(hf.T5ForSequenceClassification), {}),
    "bart": (lambda: build("bart"), {}),
    "bart, by pattern": (lambda: build("bart"), {"target_modules": r".*coder\.embed_tokens"}),
    "plain": (Plain, {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_alone_mean_what_they_mean_to_peft(name: str, tmp_path: Path) -> None:
    make, settings = ROWS[name]
    config = peft.TrainableTokensConfig(token_indices=[3, 1], **settings)
    theirs = moved(with_peft(make(), config))
    saved_by_peft(theirs, tmp_path)
    comes_back(make(), theirs, tmp_path)
    # and of ours
    lora.inject(model := make(), lora.TokensConfig(token_indices=(3, 1), **settings))
    assert off(model, make()) < 1e-6
    perturb(model)
    assert name == "t5 for classes" or off(model, make()) > 1e-3
    lora.save(model, tmp_path / "ours")
    assert off(read_by_peft(make(), tmp_path / "ours"), model) < 1e-5
    lora.load(other := make(), tmp_path / "ours")
    assert off(other, model) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no ids to train"),
        ({"token_indices": (3,), "target_modules": ("nope",)}, "no layer matches.*'nope'"),
        ({"token_indices": (3,), "target_modules": "transformer"}, "transformer.*no view for it"),
        ({"token_indices": (3,), "exclude_modules": ("wte",)}, "names none, or it is"),
        ({"token_indices": (3,), "modules_to_save": ("lm_head",)}, "no module trains besides"),
        ({"token_indices": (300,)}, "ids below the 300"),
    ],
)
def test_rows_alone_that_cannot_train_are_refused(settings: dict[str, Any], message: str) -> None:
    before = snapshot(model := build("gpt2"))
    with pytest.raises((lora.TargetError, lora.ConfigError), match=message):
        lora.inject(model, lora.METHODS["tokens"].Config(**settings))
    assert unchanged(before, model)


SIDES: dict[str, tuple[Callable[[], Any], Any]] = {
    "gpt2, the head whole": (
        lambda: build("gpt2"), {"target_modules": ("c_attn",), "modules_to_save": ("lm_head",)}),
    "gpt2, the table whole": (
        lambda: build("gpt2"), {"target_modules": ("c_attn",), "modules_to_save": ("wte",)}),
    "gpt2, both whole": (lambda: build("gpt2"), {
        "target_modules": ("c_attn",), "modules_to_save": ("wte", "lm_head")}),
    "gpt2, an adapter on the head": (lambda: build("gpt2"), {"target_modules": ("lm_head",)}),
    "gpt2, rows apart": (lambda: build("gpt2"), {
        "target_modules": ("c_attn",), "trainable_token_indices": {"wte": [3, 1], "lm_head": [5]}}),
    "bert, the head whole": (
        bert_mlm, {"target_modules": ("query",), "modules_to_save": ("decoder",)}),
    "bert, the head and what is before it": (
        bert_mlm, {"target_modules": ("query",), "modules_to_save": ("cls",)}),
    "bert, an adapter with a bias on the head": (
        bert_mlm, {"target_modules": ("decoder",), "lora_bias": True}),
    "bert, an adapter on the table": (bert_mlm, {"target_modules": ("word_embeddings",)}),
    "t5, the head whole": (t5, {"target_modules": ("q",), "modules_to_save": ("lm_head",)}),
    "t5, the encoder's table": (t5, {
        "target_modules": ("q",), "trainable_token_indices": {"encoder.embed_tokens": [3, 1]}}),
    "bart, the head whole": (
        lambda: build("bart"), {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)}),
    "bart, the decoder's table": (
        lambda: build("bart"), {"target_modules": ("decoder.embed_tokens",)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_one_side_of_a_tie_is_in_the_merged_folder(name: str, tmp_path: Path) -> None:
    make, settings = SIDES[name]
    lora.inject(model := make(), lora.LoRAConfig(r=2, **settings))
    perturb(model.eval(), size=0.3)
    wanted, before = logits(model), snapshot(model)
    assert off(make(), wanted) > 1e-3
    with pytest.raises(lora.MergeError, match=r"untie=True.*--untie"):
        lora.merge(model)
    assert unchanged(before, model)
    assert lora.merge(model, untie=True).untied
    flag = model.config.tie_word_embeddings
    assert flag is ("t5" in name)  # whose config knows no other value
    lora.restore(model)
    assert unchanged(before, model)
    assert model.config.tie_word_embeddings is True
    lora.merge(model, untie=True)
    lora.eject(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert off(type(model).from_pretrained(tmp_path), wanted) < 1e-5
    if flag:
        return
    # A reader that goes by the flag finds each weight under its own name.
    filed = safetensors.torch.load((tmp_path / "model.safetensors").read_bytes())
    assert {key for key in model.state_dict() if key not in filed} == set()


def test_a_model_that_computes_by_the_flag_is_not_untied() -> None:
    torch.manual_seed(0)
    config = hf.UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = hf.UMT5ForConditionalGeneration(config).eval()
    assert model.config.tie_word_embeddings
    lora.inject(model, lora.LoRAConfig(target_modules=("q",), modules_to_save=("lm_head",)))
    before = snapshot(model)
    with pytest.raises(lora.MergeError, match="computes another output if its config says"):
        lora.merge(model, untie=True)
    assert unchanged(before, model)


# name: (model, settings of PEFT's, whether it ties anything there)
ENSURED: dict[str, tuple[Callable[[], Any], dict[str, Any], bool]] = {
    "no layer of the tie": (lambda: build("gpt2"), {"target_modules": ["c_attn"]}, False),
    "an untied head": (llama, {"target_modules": ["q_proj", "lm_head"]}, False),
    "an untied head, whole": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "rows": (lambda: build("gpt2"), {
        "target_modules": ["c_attn"], "trainable_token_indices": [3, 1]}, False),
    "a table of another name": (
        lambda: build("gpt2"), {"target_modules": ["c_attn", "wte"]}, False),
    "the head": (lambda: llama(tie_word_embeddings=True), {
        "target_modules": ["q_proj", "lm_head"]}, True),
    "the head by pattern": (lambda: build("gpt2"), {"target_modules": ".*c_attn|lm_head"}, True),
    "the table, whole": (lambda: llama(tie_word_embeddings=True), {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", ENSURED)
def test_weight_tying_is_read_where_it_ties_nothing_and_named_where_it_does(
    name: str, tmp_path: Path
) -> None:
    make, settings, ties = ENSURED[name]
    theirs = moved(with_peft(make(), peft.LoraConfig(r=2, ensure_weight_tying=True, **settings)))
    saved_by_peft(theirs, tmp_path)
    before = snapshot(model := make())
    if ties:
        with pytest.raises(lora.CheckpointError, match="ensure_weight_tying=True ties"):
            lora.load(model, tmp_path)
        assert unchanged(before, model)
        return
    lora.load(model, tmp_path)
    assert off(model, theirs) < 1e-5
    lora.save(model, tmp_path / "again")
    assert off(read_by_peft(make(), tmp_path / "again"), theirs) < 1e-5
