"""The whole family against peft: every method and setting that it has, both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from conftest import bert_lm, distilbert, gpt2, llama, roberta, tokens
from torch import nn

import lora
from lora.testing import perturb

BERT, GPT, LLAMA = ("q_lin", "v_lin", "lin2"), ("c_attn", "c_proj"), ("q_proj", "down_proj")
Build = Callable[[], nn.Module]


def bert() -> nn.Module:
    """With weights large enough for what scales them to show."""
    return distilbert(initializer_range=0.2)


# name: (model, our Config, peft's, settings of both)
SAME: dict[str, tuple[Build, Any, Any, dict[str, Any]]] = {
    f"{label} {kind}": (build, ours, theirs, {"target_modules": targets, **settings})
    for label, ours, theirs, settings in [
        ("rslora", lora.LoRAConfig, peft.LoraConfig, {"r": 3, "lora_alpha": 7, "use_rslora": True}),
        ("dora", "DoRAConfig", peft.LoraConfig, {"r": 3, "lora_alpha": 7}),
        ("dora rslora", "DoRAConfig", peft.LoraConfig, {"r": 4, "use_rslora": True}),
        ("vera", "VeRAConfig", peft.VeraConfig, {"r": 5, "projection_prng_key": 3}),
        ("vera unsaved", "VeRAConfig", peft.VeraConfig, {"r": 5, "save_projection": False}),
        ("ia3", "IA3Config", peft.IA3Config, {"feedforward_modules": ()}),
        ("hira", "HiRAConfig", peft.HiraConfig, {"r": 3}),
        ("adalora", "AdaLoRAConfig", peft.AdaLoraConfig,
         {"init_r": 4, "target_r": 2, "lora_alpha": 7, "total_step": 10, "tinit": 1, "tfinal": 1}),
    ]
    for kind, build, targets in [
        ("DistilBERT", bert, BERT), ("GPT-2", gpt2, GPT), ("LLaMA", llama, LLAMA)
    ]
}  # fmt: skip
SAME |= {
    "patterns": (bert, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": BERT,
        "rank_pattern": {"layer.0.attention.q_lin": 5, "lin2|nothing": 2},
        "alpha_pattern": {r"layer\.1\..*": 9, "v_lin": 3},
    }),
    "bias all": (bert, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": BERT, "bias": "all"}),
    "bias lora_only": (gpt2, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": GPT, "bias": "lora_only"}),
    "bias all, with a head": (roberta, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("query",), "bias": "all", "modules_to_save": ("classifier",)}),
    "bias all, tied": (bert_lm, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("query",), "bias": "all"}),
    "bias lora_only, tied": (bert_lm, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("query", "decoder"), "bias": "lora_only"}),
    "lora_bias": (bert, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": BERT, "lora_bias": True}),
    "layers": (bert, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": BERT, "layers_to_transform": [1]}),
    "layers by pattern": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": LLAMA, "layers_to_transform": [0], "layers_pattern": ["layers"]}),
    "regex": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    "embedding": (gpt2, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": ("c_attn", "wte", "wpe")}),
    "embedding dora": (gpt2, "DoRAConfig", peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": ("c_attn", "wte")}),
    "embedding hira": (gpt2, "HiRAConfig", peft.HiraConfig, {
        "r": 3, "target_modules": ("c_attn", "wte")}),
    "embed_tokens": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": ("q_proj", "embed_tokens", "lm_head")}),
    "lm_head": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "lora_alpha": 7, "target_modules": ("q_proj", "lm_head")}),
    "lm_head by pattern": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": r".*q_proj|lm_head"}),
    "tied lm_head": (lambda: llama(tie_word_embeddings=True), lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("q_proj", "lm_head")}),
    "tokens": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("q_proj",), "trainable_token_indices": [3, 5, 7]}),
    "tokens, all-linear": (llama, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": "all-linear", "trainable_token_indices": [3, 5, 7]}),
    "tokens, tied": (lambda: llama(tie_word_embeddings=True), lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": ("q_proj",), "trainable_token_indices": [3, 5, 7]}),
    "tokens by layer": (bert, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": BERT, "trainable_token_indices": {"word_embeddings": [4, 9]}}),
    "tokens, Conv1D": (gpt2, lora.LoRAConfig, peft.LoraConfig, {
        "r": 3, "target_modules": GPT, "trainable_token_indices": [4, 9]}),
    "ia3 feed-forward": (bert, "IA3Config", peft.IA3Config, {
        "target_modules": ("k_lin", "v_lin", "lin2"), "feedforward_modules": ("lin2",)}),
    "ia3 feed-forward GPT-2": (gpt2, "IA3Config", peft.IA3Config, {
        "target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)}),
}  # fmt: skip


def config_of(kind: Any, settings: dict[str, Any]) -> lora.AdapterConfig:
    kind = getattr(lora, kind) if isinstance(kind, str) else kind
    return kind(**{k: v for k, v in settings.items() if k != "total_step"})


def peft_on(model: nn.Module, kind: Any, settings: dict[str, Any], ours: Any) -> peft.PeftModel:
    as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    if ours == "DoRAConfig":
        as_lists["use_dora"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, unsaved projections, embeddings
        return peft.get_peft_model(model, kind(**as_lists)).eval()


def read_by_peft(model: nn.Module, folder: Path) -> peft.PeftModel:
    """Any warning (a missing key, an unknown setting) is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*not save vera_A.*|.*not load vera_A.*")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def keys_of(model: peft.PeftModel) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves embeddings
        return set(peft.get_peft_model_state_dict(model))


def edit(folder: Path, changes: dict[str, Any]) -> None:
    """Change settings in the file of an adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def is_junk(key: str) -> bool:
    """With bias="all" PEFT files a saved module's biases three times over."""
    return key.endswith("bias") and (".original_module." in key or ".modules_to_save." in key)


def move(model: nn.Module) -> None:
    """Every trained tensor to values of its own, from its name's checksum."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def written(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())


@torch.no_grad()
def off(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of the logits, relative to the largest where that is above 1."""
    found, wanted = one(tokens()).logits, other(tokens()).logits
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", SAME)
def test_peft_reads_ours(name: str, tmp_path: Path) -> None:
    build, ours, _, settings = SAME[name]
    model = build()
    lora.inject(model, config_of(ours, settings))
    perturb(model.eval(), size=0.5)
    lora.save(model, tmp_path)
    theirs = read_by_peft(build(), tmp_path)
    assert off(theirs, model) < 1e-5
    assert off(build(), model) > 1e-3
    assert set(written(tmp_path)) == {key for key in keys_of(theirs) if not is_junk(key)}


@pytest.mark.parametrize("name", SAME)
def test_we_read_pefts(name: str, tmp_path: Path) -> None:
    build, ours, kind, settings = SAME[name]
    theirs = peft_on(build(), kind, settings, ours)
    move(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model = build()
    lora.load(model, tmp_path)
    assert off(model.eval(), theirs) < 1e-5
    with lora.disabled(model):
        assert off(model, build()) == 0
    again = tmp_path / "again"
    lora.save(model, again)
    first, second = written(tmp_path), written(again)
    assert {key for key in first if not is_junk(key)} == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_patterns_whose_order_matters_are_filed_so_that_peft_reads_them(tmp_path: Path) -> None:
    """The first that fits counts; a file's keys are sorted, by which PEFT loses its own order."""
    patterns = {"alpha_pattern": {"v_lin": 3, r"layer\.1\..*": 9}, "rank_pattern": {"lin2": 2}}
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(r=3, target_modules=BERT, **patterns))
    perturb(model.eval(), size=0.5)
    lora.save(model, tmp_path)
    assert off(read_by_peft(distilbert(), tmp_path), model) < 1e-5
    other = distilbert()
    lora.load(other, tmp_path)
    assert off(other.eval(), model) == 0


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_embedding_that_the_file_brings_replaces_ours(name: str, tmp_path: Path) -> None:
    """As after a vocabulary was resized: the base's own comes back with eject."""
    build, ours, kind, settings = SAME[name]
    base = build()
    with torch.no_grad():
        base.lm_head.weight.add_(0.1)
    theirs = peft_on(base, kind, settings, ours)
    move(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model = build()
    report = lora.load(model, tmp_path)
    assert "lm_head.weight is the file's, not the base's" in str(report)
    assert off(model.eval(), theirs) < 1e-5
    assert not model.lm_head.base_layer.weight.requires_grad
    with lora.disabled(model):
        assert off(model, build()) == 0
    lora.save(model, tmp_path / "again")
    other = build()
    lora.load(other, tmp_path / "again")
    assert off(other.eval(), model) == 0
    lora.eject(model)
    assert off(model, build()) == 0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("build", "init"), [(distilbert, "pissa"), (distilbert, "olora"), (gpt2, "pissa")]
)  # peft's OLoRA takes Conv1D's weight for its transpose, and cannot run
def test_a_start_away_from_zero_is_filed_as_peft_converts_it(
    build: Build, init: str, rslora: bool, tmp_path: Path
) -> None:
    targets = {distilbert: BERT, gpt2: GPT}[build]
    settings = {"r": 3, "lora_alpha": 7, "target_modules": targets, "use_rslora": rslora}
    model = build()
    lora.inject(model, lora.LoRAConfig(**settings, init_lora_weights=init))
    theirs = peft_on(build(), peft.LoraConfig, settings | {"init_lora_weights": init}, None)
    start = tmp_path / "start"
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's own guide does
    theirs.save_pretrained(start)
    named = dict(theirs.named_parameters())
    ours = lora.inventory.trained_parameters(model, "default")
    for key, parameter in ours.items():
        same = named[f"base_model.model.{key}".replace(".weight", ".default.weight")]
        torch.testing.assert_close(parameter, same, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # to the same place, from starts that differ in the last bits
        for key, parameter in ours.items():
            parameter.copy_(named[f"base_model.model.{key}".replace(".weight", ".default.weight")])
    perturb(model, size=0.1)
    with torch.no_grad():
        for key, parameter in ours.items():
            named[f"base_model.model.{key}".replace(".weight", ".default.weight")].copy_(parameter)
    lora.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(start)
        )
    first, second = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-5, rtol=1e-4)
    one, two = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    assert (one["r"], one["lora_alpha"]) == (two["r"], pytest.approx(two["lora_alpha"]))
    assert one["init_lora_weights"] is True
    plain = read_by_peft(build(), tmp_path / "ours")
    assert off(plain, model.eval()) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_we_read_a_start_that_peft_left_unconverted(init: str, tmp_path: Path) -> None:
    """PEFT moves the base by what it computes anew from it; we subtract the same."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": BERT, "init_lora_weights": init}
    theirs = peft_on(distilbert(), peft.LoraConfig, settings, None)
    move(theirs)
    theirs.save_pretrained(tmp_path)
    model = distilbert()
    lora.load(model, tmp_path)
    assert off(model.eval(), theirs) < 1e-5
    with lora.disabled(model):
        assert off(model, distilbert()) == 0


def test_a_base_that_pefts_start_has_moved_is_taken_as_it_is_filed(tmp_path: Path) -> None:
    """With lm_head among the targets the file brings its weight, less the start already."""
    settings = {"r": 3, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}
    theirs = peft_on(llama(initializer_range=0.2), peft.LoraConfig, settings, None)
    move(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model = llama(initializer_range=0.2)
    lora.load(model, tmp_path)
    assert off(model.eval(), theirs) < 1e-5
    lora.merge(model)
    lora.eject(model)
    assert off(model, theirs) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_file_of_ours_edited_to_start_elsewhere_is_found_out(init: str, tmp_path: Path) -> None:
    lora.inject(model := distilbert(), lora.LoRAConfig(r=2, target_modules=BERT))
    lora.save(model, tmp_path)
    edit(tmp_path, {"init_lora_weights": init})
    with pytest.raises(lora.CheckpointError, match="is not the config that"):
        lora.load(distilbert(), tmp_path)


def test_tied_biases_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    config = lora.LoRAConfig(r=2, target_modules=("query",), bias="all")
    lora.inject(model := bert_lm(), config)
    lora.save(model, tmp_path)
    tensors = written(tmp_path)
    tensors["base_model.model.cls.predictions.bias"] += 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(lora.CheckpointError, match="differ, and are one parameter"):
        lora.load(bert_lm(), tmp_path)


@pytest.mark.parametrize("init", ["pissa_niter_4", "lora_ga", "loftq", "corda"])
def test_a_start_that_the_file_does_not_hold_is_refused(init: str, tmp_path: Path) -> None:
    lora.inject(model := distilbert(), lora.LoRAConfig(target_modules=BERT))
    lora.save(model, tmp_path)
    edit(tmp_path, {"init_lora_weights": init})
    with pytest.raises(lora.CheckpointError, match="init_lora_weights"):
        lora.load(distilbert(), tmp_path)


def test_adalora_allocates_the_ranks_that_peft_does(tmp_path: Path) -> None:
    """The same start, data and optimiser, thirty steps: the same ranks, losses and logits."""
    settings = {
        "init_r": 6, "target_r": 2, "lora_alpha": 7, "total_step": 30, "tinit": 3, "tfinal": 7,
        "deltaT": 2, "beta1": 0.8, "beta2": 0.9, "target_modules": BERT,
    }  # fmt: skip
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    ours = distilbert(**quiet)
    theirs = peft_on(copy.deepcopy(ours), peft.AdaLoraConfig, settings, None)
    lora.inject(ours, config_of("AdaLoRAConfig", settings))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in lora.inventory.trained_parameters(ours, "default").items():
            named[f"base_model.model.{key}.default"].copy_(parameter)
    losses: list[list[float]] = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        curve = []
        for step in range(1, 31):
            whole = model if model is ours else theirs.base_model  # whose forward adds a penalty
            loss = whole(tokens(), labels=torch.tensor([0, 1, 1])).loss
            if model is ours:
                loss = loss + lora.training.penalty(ours)
            loss.backward()
            optimizer.step()
            if model is ours:
                lora.training.after_step(ours, step, 30)
            else:
                theirs.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    lora.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes a rank of 0 for a sharded tensor
        theirs.save_pretrained(tmp_path / "theirs")
    patterns = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())["rank_pattern"]
        for who in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    kept = [sum(ranks) for ranks in patterns[0].values()]
    assert sum(kept) == 2 * len(kept)
    assert min(kept) < max(kept)
    assert off(ours.eval(), theirs.eval()) < 1e-4
    for who in ("ours", "theirs"):
        model = distilbert(**quiet)
        lora.load(model, tmp_path / who)
        assert off(model.eval(), ours) < 1e-4
    assert off(read_by_peft(distilbert(**quiet), tmp_path / "ours"), ours) < 1e-5


def allocated(steps: int, **settings: Any) -> nn.Module:
    """A model whose AdaLoRA has had so many steps of twelve."""
    model = distilbert(initializer_range=0.2)
    lora.inject(model, lora.AdaLoRAConfig(target_modules=BERT, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        loss = model.train()(tokens(), labels=torch.tensor([0, 1, 1])).loss
        (loss + lora.training.penalty(model)).backward()
        optimizer.step()
        lora.training.after_step(model, step, 12)
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 12])
def test_adalora_is_filed_and_read_at_any_step(steps: int, tmp_path: Path) -> None:
    model = allocated(steps, init_r=4, target_r=2, tinit=2, tfinal=3)
    lora.save(model, tmp_path)
    other = distilbert(initializer_range=0.2)
    lora.load(other, tmp_path)
    assert off(other.eval(), model) < 1e-6
    assert off(read_by_peft(distilbert(initializer_range=0.2), tmp_path), model) < 1e-5
    for _, own in lora.training.acting(model):
        assert all(a.scaling == 8 / (4 + 1e-5) for a in own)
    kept = [sum(a.pattern) for _, own in lora.training.acting(model) for a in own if a.pattern]
    assert sum(kept) == ({0: 0, 1: 0, 3: 19, 7: 12, 12: 12}[steps])
    lora.init(model, seed=0)
    assert all(a.pattern is None for _, own in lora.training.acting(model) for a in own)


@pytest.mark.parametrize("settings", [{"tinit": 5}, {"tfinal": 100}, {"tinit": 3, "tfinal": 2}, {}])
def test_an_untrained_adalora_can_be_filed_and_trained_later(settings, tmp_path: Path) -> None:
    lora.inject(model := distilbert(), lora.AdaLoRAConfig(target_modules=BERT, **settings))
    lora.save(model, tmp_path)
    read_by_peft(distilbert(), tmp_path)
    other = distilbert()
    lora.load(other, tmp_path, trainable=True)
    config = lora.inventory.injected(other)["default"].config
    first, final = settings.get("tinit", 0), settings.get("tfinal", 0)
    assert config.schedule(1000) == (first, 1000 - final)


def test_ia3_is_filed_so_that_peft_finds_its_feedforward_layers(tmp_path: Path) -> None:
    """It wants the one list to be part of the other, word for word."""
    for targets in (("k_lin", "ffn.lin2"), r".*(k_lin|lin2)"):
        config = lora.METHODS["ia3"].Config(target_modules=targets, feedforward_modules=("lin2",))
        lora.inject(model := bert(), config)
        perturb(model.eval(), size=0.5)
        lora.save(model, tmp_path)
        assert off(read_by_peft(bert(), tmp_path), model) < 1e-5
        lora.load(other := bert(), tmp_path)
        assert off(other.eval(), model) == 0


def test_ranks_by_layer_are_filed_under_the_whole_name() -> None:
    """Where a layer's name is the ending of another's, and has signs that a pattern reads."""
    from lora.methods._lowrank_options import pick

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6)
            self.z = nn.ModuleDict({"q": nn.Linear(6, 6)})
            self.a1 = nn.ModuleDict({"q": nn.Linear(6, 6)})

    model = Nested()
    patterns = {"^z.q": 3, "^a1.q": 4, "q": 5}
    lora.inject(model, lora.LoRAConfig(r=2, rank_pattern=patterns, init_lora_weights="pissa"))
    settings = lora.adapter_config.file_config(
        model, lora.inventory.injected(model)["default"], "default"
    )
    ranks = {n: pick(settings["rank_pattern"], n, settings["r"]) for n in ("q", "z.q", "a1.q")}
    assert ranks == {"q": 10, "z.q": 6, "a1.q": 8}
    assert pick(settings["rank_pattern"], "zzq", 1) == 1
    assert pick({"lin": 2}, "a.q_lin", 8) == 8


@pytest.mark.parametrize(("settings", "total"), [({}, 1), ({"tinit": 5, "tfinal": 5}, 11)])
def test_a_schedule_without_steps_is_refused_before_the_first(settings, total: int) -> None:
    lora.inject(model := distilbert(), lora.AdaLoRAConfig(target_modules=BERT, **settings))
    with pytest.raises(lora.ConfigError, match="no steps to allocate ranks in"):
        lora.training.check_steps(model, total)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_alone_is_no_matter(init: Any, tmp_path: Path) -> None:
    theirs = peft_on(distilbert(), peft.LoraConfig, {"r": 2, "target_modules": BERT}, None)
    move(theirs)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, {"init_lora_weights": init})
    lora.load(model := distilbert(), tmp_path)
    assert off(model.eval(), theirs) < 1e-5


UNKNOWN = {
    "alora_invocation_tokens": [1], "arrow_config": {"top_k": 2}, "corda_config": None,
    "kasa_config": {"beta": 1}, "layer_replication": [[0, 2]],
    "megatron_config": {"tp": 2}, "monteclora_config": {"n": 1}, "target_parameters": ["w"],
    "use_bdlora": {"nblocks": 2}, "use_qalora": True, "velora_config": {"n": 1},
    "init_lora_weights": "mica", "bias": "some", "a_key_of_tomorrow": True,
}  # fmt: skip


def test_every_key_that_peft_writes_is_computed_or_refused_by_name(tmp_path: Path) -> None:
    """Of peft.LoraConfig's fields none is passed over in silence."""
    lora.inject(model := distilbert(), lora.LoRAConfig(r=2, target_modules=BERT))
    lora.save(model, tmp_path)
    weights = written(tmp_path)
    safetensors.torch.save_file(weights, tmp_path / "adapter_model.safetensors")  # as a foreign one
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    lora.load(distilbert(), tmp_path)
    for key, value in UNKNOWN.items():
        text = json.dumps(settings | {key: value})
        (tmp_path / "adapter_config.json").write_text(text)
        if value is None:
            lora.load(distilbert(), tmp_path)
            continue
        with pytest.raises(lora.CheckpointError, match=key):
            lora.load(distilbert(), tmp_path)
    ours = {field.name for field in dataclasses.fields(lora.LoRAConfig)}
    method = lora.METHODS["lora"]
    known = (
        ours | lora.adapter_config.INERT | set(method.neutral) | set(method.states) | set(UNKNOWN)
    )
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("method", ["ia3", "vera", "hira", "adalora", "dora"])
def test_a_strange_key_is_refused_for_every_method(method: str, tmp_path: Path) -> None:
    lora.inject(model := distilbert(), lora.METHODS[method].Config(target_modules=BERT))
    lora.save(model, tmp_path)
    edit(tmp_path, {"a_key_of_tomorrow": 1})
    with pytest.raises(lora.CheckpointError, match="a_key_of_tomorrow"):
        lora.load(distilbert(), tmp_path)
