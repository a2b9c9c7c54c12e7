"""Which layers a config means: names, patterns, blocks, routers, ties; and what the report says."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from conftest import distilbert, gpt2, llama, tokens
from torch import nn

import lora
from lora.testing import perturb, snapshot, unchanged


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def qwen2_moe() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config).eval()


class Routed(nn.Module):
    """A mixture of experts with a linear router, as switch transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.gate = nn.Linear(8, 4)
        self.block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.gated = nn.Module()
        self.gated.gate = nn.Linear(8, 8)  # of a gated unit: no experts beside it
        self.gated.gate_proj = nn.Linear(8, 8)


def test_all_linear_leaves_out_routers_and_the_head() -> None:
    report = lora.inject(Routed(), lora.LoRAConfig(r=2))
    assert set(report.plan.targets) == {
        *(f"block.experts.{i}" for i in range(4)), "gated.gate", "gated.gate_proj"
    }  # fmt: skip
    assert dict(report.left) == {"gate": 1}
    for build in (mixtral, qwen2_moe):
        targets = lora.inject(build(), lora.LoRAConfig(r=2)).plan.targets
        assert targets
        assert not [n for n in targets if n.endswith(("gate", "router", "lm_head"))]
        assert not [n for n in targets if "embed" in n]


def test_blocks_are_counted_as_peft_counts_them() -> None:
    for settings in (
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [1], "layers_pattern": ["layer"]},
    ):
        names = ["q_lin", "lin1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(
                distilbert(), peft.LoraConfig(r=2, target_modules=names, **settings)
            )
        theirs = {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}
        ours = lora.inject(distilbert(), lora.LoRAConfig(r=2, target_modules=names, **settings))
        assert set(ours.plan.targets) == theirs


def test_blocks_narrow_all_linear_and_not_what_is_named_in_full() -> None:
    report = lora.inject(llama(), lora.LoRAConfig(r=2, layers_to_transform=1))
    assert {name.split(".")[2] for name in report.plan.targets} == {"1"}
    whole = "model.layers.0.self_attn.q_proj"
    config = lora.LoRAConfig(r=2, target_modules=(whole, "k_proj"), layers_to_transform=(1,))
    assert set(lora.inject(llama(), config).plan.targets) == {
        whole, "model.layers.1.self_attn.k_proj"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"layers_to_transform": (2,)}, lora.TargetError, r"in layers_to_transform=\(2,\)"),
        ({"layers_to_transform": (0, 5)}, lora.TargetError, "layers_to_transform 5"),
        ({"target_modules": "q_lin", "layers_to_transform": (0,)}, lora.ConfigError, "a pattern"),
        ({"layers_pattern": ("layer",)}, lora.ConfigError, "layers_pattern"),
        ({"layers_to_transform": (-1,)}, lora.ConfigError, "numbers of blocks"),
        ({"layers_to_transform": (0,), "layers_pattern": ("h",)}, lora.TargetError,
         r"in layers_to_transform=\(0,\)"),
        ({"target_modules": ("q_lin", "typo")}, lora.TargetError, "entry 'typo'"),
        ({"target_modules": ("q_lin", "sa_layer_norm")}, lora.TargetError, "no view"),
        ({"rank_pattern": {"q_lin": 0}}, lora.ConfigError, "rank_pattern of q_lin"),
        ({"rank_pattern": {"(": 3}}, lora.ConfigError, "not a regular expression"),
        ({"rank_pattern": {"q_linn": 3}}, lora.TargetError, "rank_pattern.*q_linn"),
        ({"alpha_pattern": {"pre_classifier": 3}}, lora.TargetError, "alpha_pattern"),
        ({"trainable_token_indices": (99,)}, lora.ConfigError, "below the 99"),
        ({"trainable_token_indices": (1, 1)}, lora.ConfigError, "distinct"),
        ({"trainable_token_indices": {"nope": [1]}}, lora.TargetError, "'nope'"),
        ({"trainable_token_indices": (1,), "target_modules": ("word_embeddings",)},
         lora.ConfigError, "adapted twice"),
        ({"trainable_token_indices": (1,), "modules_to_save": ("embeddings",)},
         lora.ConfigError, "adapted twice"),
        ({"trainable_token_indices": None}, lora.ConfigError, "list of whole numbers"),
        ({"trainable_token_indices": 5}, lora.ConfigError, "list of whole numbers"),
        ({"trainable_token_indices": {"x": 5}}, lora.ConfigError, "list of whole numbers"),
        ({"trainable_token_indices": [[1]]}, lora.ConfigError, "list of whole numbers"),
        ({"layers_to_transform": (1,), "layers_pattern": "("}, lora.ConfigError, "layers_pattern"),
        ({"target_modules": "("}, lora.ConfigError, "not a regular expression"),
        ({"target_modules": "(" * 2000}, lora.ConfigError, "not a regular expression"),
        ({"exclude_modules": ("ffn",)}, lora.TargetError, "exclude_modules entry 'ffn'"),
        ({"use_rslora": "false"}, lora.ConfigError, "use_rslora must be true or false"),
        ({"use_lorafa": 1}, lora.ConfigError, "use_lorafa must be true or false"),
        ({"target_modules": ("q_lin", "lin2"), "exclude_modules": ("lin2",)}, lora.TargetError,
         "no layer that is not excluded or in modules_to_save matches .*entry 'lin2'"),
        ({"lora_bias": True, "target_modules": ("word_embeddings",)}, lora.ConfigError, "no bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_the_model_left_alone(settings, kind, match: str) -> None:
    model = distilbert()
    before = snapshot(model)

    def inject() -> None:
        lora.inject(model, lora.LoRAConfig(r=2, **settings))

    with pytest.raises(kind, match=match):
        inject()
    assert unchanged(before, model)


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        ("vera", {"projection_prng_key": 10**30}, "at most 9,223"),
        ("vera", {"d_initial": 10**30}, "at most a million"),
        ("vera", {"save_projection": "no"}, "true or false"),
        ("ia3", {"feedforward_modules": "(" * 2000}, "not a regular expression"),
        ("ia3", {"feedforward_modules": ("",)}, "list of module names"),
        ("bitfit", {"small": "yes"}, "true or false"),
        ("topk", {"k": 0}, "at least 1"),
        ("adalora", {"target_r": 20}, "at most init_r"),
        ("hira", {"hira_dropout": 1.0}, "0 <= p < 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(method: str, settings, match: str) -> None:
    with pytest.raises(lora.ConfigError, match=match):
        lora.METHODS[method].Config(**settings)


def test_ia3_wants_its_feedforward_layers_among_the_targets() -> None:
    config = lora.METHODS["ia3"].Config(target_modules=("q_lin",), feedforward_modules=("lin2",))
    with pytest.raises(lora.TargetError, match="'lin2' is none of the 2 layers"):
        lora.inject(distilbert(), config)


def test_an_embedding_that_takes_more_than_ids_has_no_view() -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, vocab_size=99,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(lora.TargetError, match="OPTLearnedPositionalEmbedding: no view"):
        lora.inject(model, lora.LoRAConfig(target_modules=("embed_positions",)))
    assert unchanged(before, model)


def test_blocks_by_a_pattern_of_two_lists() -> None:
    for pattern in ("layers|h", "(?P<number>layers)"):
        config = lora.LoRAConfig(r=2, layers_to_transform=(0,), layers_pattern=(pattern,))
        targets = lora.inject(llama(), config).plan.targets
        assert {name.split(".")[2] for name in targets} == {"0"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vera", {"r": 4, "target_modules": ("lin",), "exclude_modules": ("block.lin",)}),
        ("ia3", {"target_modules": "lin", "feedforward_modules": ("lin",)}),
        ("ia3", {"target_modules": "lin|block.lin", "feedforward_modules": ("block.lin",)}),
        ("ia3", {"target_modules": ("x.0.lin", "x.1.lin"), "layers_to_transform": (1,)}),
    ],
)
def test_names_that_end_in_others_come_back_the_same(method: str, settings, tmp_path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"lin": nn.Linear(8, 8)})
        model["block"] = nn.ModuleDict({"lin": nn.Linear(8, 8)})
        model["x"] = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))
        return model

    model = build()
    targets = lora.inject(model, lora.METHODS[method].Config(**settings)).plan.targets
    lora.save(model, tmp_path)
    assert set(lora.load(build(), tmp_path).plan.targets) == set(targets)


def test_topk_counts_blocks_and_not_experts() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        model.layers.append(block)
    selected = lora.inject(model, lora.METHODS["topk"].Config(k=1)).plan.selected
    assert {name.split(".")[1] for name in selected} == {"1"}
    assert len(selected) == 16


def test_the_report_lists_layers_that_are_not_adapted() -> None:
    report = lora.inject(gpt2(), lora.LoRAConfig(r=2, target_modules=("c_attn",)))
    assert "not adapted: wte ×1, wpe ×1, c_proj ×4, c_fc ×2, lm_head ×1" in str(report)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_one_side_of_a_tie_trains_alone_and_merges_where_it_may(targets, tmp_path) -> None:
    def build() -> nn.Module:
        return llama(tie_word_embeddings=True)

    model = build()
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=targets))
    perturb(model.eval(), size=0.5)
    wanted = model(tokens()).logits
    before = snapshot(model)
    with pytest.raises(lora.MergeError, match=r"untie=True"):
        lora.merge(model)
    assert unchanged(before, model)
    certificate = lora.merge(model, untie=True, probe=tokens())
    assert set(certificate.untied) == {n for n in certificate.untied if n.endswith(targets)}
    assert len(certificate.untied) == len(targets)
    assert model.config.tie_word_embeddings is False
    lora.restore(model)
    assert unchanged(before, model)
    assert model.config.tie_word_embeddings is True
    assert model(tokens()).logits.equal(wanted)
    # and on as a plain model, saved and read by transformers itself
    lora.merge(model, untie=True)
    lora.eject(model)
    torch.testing.assert_close(model(tokens()).logits, wanted)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, wanted)


def test_tokens_keep_the_tie_through_a_merge() -> None:
    model = llama(tie_word_embeddings=True)
    config = lora.LoRAConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3, 5))
    lora.inject(model, config)
    perturb(model.eval(), size=0.5)
    wanted = model(tokens()).logits
    base = llama(tie_word_embeddings=True)
    assert lora.merge(model, probe=tokens()).untied == ()
    lora.eject(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens()).logits, wanted)
    moved = (model.lm_head.weight != base.lm_head.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [3, 5]


def test_only_the_tokens_rows_train() -> None:
    model = llama(tie_word_embeddings=True)
    config = lora.LoRAConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3, 5))
    report = lora.inject(model, config)
    assert report.trainable == 2 * 32 + 2 * 2 * 64
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with lora.disabled(model):
        assert model(tokens()).logits.equal(llama(tie_word_embeddings=True)(tokens()).logits)
    lora.merge(model)
    lora.eject(model)
    base = llama(tie_word_embeddings=True)
    moved = (model.lm_head.weight != base.lm_head.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [3, 5]
