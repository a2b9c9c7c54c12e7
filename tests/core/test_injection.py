"""Injection: targets, freezing, several adapters, saved modules, merge and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import distilbert, gpt2, tokens
from torch import nn

import lora
from lora.targets import base_parameters
from lora.testing import perturb, snapshot, unchanged
from lora.training import check_alive


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def test_only_what_should_train_trains() -> None:
    """Every parameter that changed after three steps, by name, and no other."""
    model = distilbert().train()
    config = lora.LoRAConfig(
        r=4, target_modules=("q_lin", "v_lin"), modules_to_save=("pre_classifier", "classifier")
    )
    lora.inject(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(tokens(), labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    layer = "distilbert.transformer.layer.{}.attention.{}.adapters.default.lora_{}"
    assert changed == {
        layer.format(number, name, factor)
        for number in (0, 1)
        for name in ("q_lin", "v_lin")
        for factor in "AB"
    } | {
        f"{head}.copies.default.{end}"
        for head in ("pre_classifier", "classifier")
        for end in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 12),
        (("q_lin",), 2),
        (["q_lin", "v_lin"], 4),
        (("layer.0.attention.q_lin",), 1),
        (("distilbert.transformer.layer.1.ffn.lin1",), 1),
        (r".*\.layer\.0\..*(q|k|v)_lin", 3),
        (("lin",), None),  # an ending counts from a dot only
        (("q_lin", "typo"), None),
        ((), "target_modules"),
        ("(", "regular expression"),
        ("", "target_modules"),
        (("dropout",), None),
        (("sa_layer_norm",), None),
    ],
)
def test_targets(targets, count: int | str | None) -> None:
    model = distilbert()
    before = snapshot(model)
    if isinstance(count, int):
        assert (
            len(lora.inject(model, lora.LoRAConfig(target_modules=targets)).plan.targets) == count
        )
        return
    with pytest.raises(lora.TargetError if count is None else lora.ConfigError, match=count):
        lora.inject(model, lora.LoRAConfig(target_modules=targets))
    assert unchanged(before, model)


def test_the_error_names_what_the_model_has_and_what_to_try() -> None:
    with pytest.raises(lora.TargetError) as caught:
        lora.inject(gpt2(), lora.LoRAConfig(target_modules=("q_proj", "v_proj")))
    text = str(caught.value)
    assert "no layer matches target_modules=('q_proj', 'v_proj')" in text
    assert "c_attn ×2" in text
    assert "c_proj ×4" in text
    assert "lm_head ×1" in text
    assert "--target-modules c_proj c_attn" in text


def test_excluded_and_saved_layers_win() -> None:
    config = lora.LoRAConfig(exclude_modules=("lin1", "lin2"))
    report = lora.inject(distilbert(), config)
    assert len(report.plan.targets) == 8
    with pytest.raises(lora.TargetError, match="exclude_modules entry 'lin3'"):
        lora.inject(distilbert(), lora.LoRAConfig(exclude_modules=("lin3",)))
    config = lora.LoRAConfig(
        target_modules=("classifier", "q_lin"), modules_to_save=("classifier",)
    )
    with pytest.raises(lora.TargetError, match="entry 'classifier'"):
        lora.inject(distilbert(), config)
    with pytest.raises(lora.TargetError, match="modules_to_save entry 'score'"):
        lora.inject(distilbert(), lora.LoRAConfig(modules_to_save=("score",)))


@pytest.mark.parametrize(
    "setting",
    [
        {"r": 0}, {"r": -1}, {"r": "four"}, {"r": 2.5}, {"r": True}, {"lora_alpha": 0},
        {"lora_alpha": "8"}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.0},
        {"lora_dropout": -0.1}, {"lora_dropout": None}, {"target_modules": 3},
        {"target_modules": (1,)}, {"modules_to_save": "classifier"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be(setting: dict) -> None:
    with pytest.raises(lora.ConfigError, match=f"{next(iter(setting))} must be .*found"):
        lora.LoRAConfig(**setting)


def test_an_absurd_rank_fits_no_memory_and_leaves_the_model_alone() -> None:
    model = plain()
    before = snapshot(model)
    with pytest.raises((RuntimeError, lora.LoraError)):
        lora.inject(model, lora.LoRAConfig(r=10**15))
    assert unchanged(before, model)


@pytest.mark.parametrize("name", ["../up", "a.b", "", "a/b", "keys", "training", "a b", None])
def test_names_that_no_folder_and_no_module_should_have(name, tmp_path) -> None:
    with pytest.raises(lora.ConfigError, match="name must be letters"):
        lora.inject(plain(), lora.LoRAConfig(), name=name)
    with pytest.raises(lora.ConfigError, match="name must be letters"):
        lora.load(plain(), tmp_path, name=name)
    with pytest.raises(lora.ConfigError, match="name must be letters"):
        lora.save(plain(), tmp_path, name=name)


def test_additive_adapters_sum() -> None:
    model, x = plain(), torch.randn(5, 6)
    base = model(x).detach()
    for number, name in enumerate(("one", "two")):
        lora.inject(model, lora.LoRAConfig(r=2, target_modules=("0",)), name=name, seed=number)
        perturb(model, name)
    hidden = {}
    for names in (("one",), ("two",), ("one", "two")):
        lora.activate(model, *names)
        hidden[names] = model[0](x).detach()
    bare = model[0].base_layer(x).detach()
    wanted = hidden["one",] + hidden["two",] - bare
    assert torch.allclose(hidden["one", "two"], wanted, atol=1e-5)
    lora.merge(model)
    assert torch.allclose(model[0](x), wanted, atol=1e-5)
    lora.restore(model)
    lora.activate(model)
    assert torch.equal(model(x), base)
    with pytest.raises(lora.ConfigError, match="no adapter is named 'three'. Found: one, two"):
        lora.activate(model, "three")


def test_a_second_adapter_freezes_the_first() -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2), name="one")
    lora.inject(model, lora.LoRAConfig(r=2), name="two")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{i}.adapters.two.lora_{f}" for i in (0, 2) for f in "AB"}


def test_several_adapters_drop_each_their_own() -> None:
    model, x = plain(), torch.randn(400, 6)
    for name in ("one", "two"):
        config = lora.LoRAConfig(r=2, target_modules=("0",), lora_dropout=0.5)
        lora.inject(model, config, name=name)
        perturb(model, name)
    lora.activate(model, "one", "two")
    model.eval()
    wanted = model[0](x)
    model.train()
    torch.manual_seed(0)
    found = torch.stack([model[0](x) for _ in range(400)]).mean(0)
    assert not torch.equal(model[0](x), wanted)
    off = (found - wanted).detach().abs().mean() / wanted.detach().abs().mean()
    assert float(off) < 0.05


def test_saved_modules_train_a_copy_and_disabled_brings_the_original_back() -> None:
    model, ids = distilbert(), tokens()
    base = model(ids).logits.detach()
    lora.inject(model, lora.LoRAConfig(r=2, modules_to_save=("classifier",)))
    assert model.classifier.out_features == 2  # what the model reads off its own layers
    assert model.distilbert.transformer.layer[0].attention.q_lin.weight.dtype == torch.float32
    perturb(model)
    moved = model(ids).logits.detach()
    assert not torch.allclose(moved, base, atol=1e-3)
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, base)
        with lora.disabled(model):
            pass
        assert torch.equal(model(ids).logits, base)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert torch.equal(model(ids).logits, moved)
    lora.merge(model)
    lora.eject(model)
    assert torch.allclose(model(ids).logits, moved, atol=1e-5)
    assert "SavedModule" not in str(model)


def test_eject_unmerged_is_the_base_and_trains_again_what_trained() -> None:
    model = distilbert()
    model.distilbert.embeddings.requires_grad_(False)
    before = snapshot(model)
    lora.inject(model, lora.LoRAConfig(r=2, modules_to_save=("classifier",)))
    perturb(model)
    lora.eject(model)
    assert unchanged(before, model)


def test_merge_refuses_what_is_not_finite_and_leaves_the_rest_alone() -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2))
    with torch.no_grad():
        model[2].adapters["default"].lora_B.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(lora.MergeError, match="2 holds NaN or infinity"):
        lora.merge(model)
    assert unchanged(before, model)


def test_a_merged_model_says_restore_first(tmp_path) -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2))
    lora.merge(model)
    for refused in (
        lambda: lora.save(model, tmp_path),
        lambda: lora.activate(model, "default"),
        lambda: lora.inject(model, lora.LoRAConfig(), name="two"),
        lambda: lora.disabled(model).__enter__(),
    ):
        with pytest.raises(lora.MergeError, match=r"lora.restore\(model\) first"):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_a_tied_output_head_is_neither_targeted_by_default_nor_merged_in_silence() -> None:
    report = lora.inject(gpt2(), lora.LoRAConfig())
    assert "lm_head" not in report.plan.targets
    model = gpt2()
    lora.inject(model, lora.LoRAConfig(target_modules=("lm_head",)))
    with pytest.raises(lora.MergeError, match="lm_head is tied"):
        lora.merge(model)


def test_the_attention_of_torch_is_not_wrapped_dead() -> None:
    """nn.MultiheadAttention never calls its out_proj: an adapter there would do nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(lora.TargetError, match="NonDynamicallyQuantizableLinear"):
        lora.inject(model, lora.LoRAConfig(target_modules=("out_proj",)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_torchs_encoder_does_not_skip_the_adapter(masked: bool) -> None:
    """In eval and without gradients torch hands the layers' weights to a fused kernel."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False, False, False], [False, False, True]]) if masked else None
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
        report = lora.inject(model, lora.LoRAConfig())
        assert len(report.plan.targets) == 4
        perturb(model)
        found = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            wanted = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        real = torch.ones(2, 3, dtype=torch.bool) if mask is None else ~mask
        assert torch.allclose(found[real], wanted[real], atol=1e-6)
        assert not torch.allclose(found[real], base[real], atol=1e-2)
        lora.eject(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), base)


def test_a_start_on_the_meta_device_ends_in_the_same_bits() -> None:
    with torch.device("meta"):
        model = distilbert()
    lora.inject(model, lora.LoRAConfig(r=2), seed=3)
    model.to_empty(device="cpu")
    lora.init(model, seed=3)
    other = distilbert()
    lora.inject(other, lora.LoRAConfig(r=2), seed=3)
    from lora.inventory import trained_parameters

    for name, parameter in trained_parameters(model, "default").items():
        assert torch.equal(parameter, trained_parameters(other, "default")[name]), name


def test_the_start_of_a_layer_does_not_depend_on_the_others() -> None:
    from lora.inventory import trained_parameters

    whole, part = distilbert(), distilbert()
    lora.inject(whole, lora.LoRAConfig(r=2))
    lora.inject(part, lora.LoRAConfig(r=2, target_modules=("v_lin",)))
    for name, parameter in trained_parameters(part, "default").items():
        assert torch.equal(parameter, trained_parameters(whole, "default")[name]), name


def test_a_model_copied_after_injection_is_its_own() -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2))
    twin = copy.deepcopy(model)
    lora.inject(twin, lora.LoRAConfig(r=2), name="two")
    assert "two" not in model[0].adapters
    lora.activate(model, "default")


def test_full_stands_alone() -> None:
    model = plain()
    lora.inject(model, lora.FullConfig())
    with pytest.raises(lora.ConfigError, match="must be alone"):
        lora.inject(model, lora.LoRAConfig(), name="two")
    other = plain()
    lora.inject(other, lora.LoRAConfig())
    with pytest.raises(lora.ConfigError, match="must be alone"):
        lora.inject(other, lora.FullConfig(), name="two")


def test_eject_gives_back_what_inject_froze_and_no_more() -> None:
    model = plain()
    before = snapshot(model)
    lora.eject(model)
    assert unchanged(before, model)
    lora.inject(model, lora.LoRAConfig(r=2))
    model.append(nn.Linear(4, 2))
    lora.eject(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ("0",), "target_modules": ("2",)}, {"target_modules": ("0",)}),
        ({"target_modules": ("0",)}, {"modules_to_save": ("0",), "target_modules": ("2",)}),
    ],
)
def test_adapters_that_would_change_each_others_modules_are_refused(first, second) -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2, **first), name="one")
    before = snapshot(model)
    with pytest.raises(lora.ConfigError, match="'two' cannot join 'one': one trains 0 whole"):
        lora.inject(model, lora.LoRAConfig(r=2, **second), name="two")
    assert unchanged(before, model)


def test_two_heads_do_not_act_together_and_a_name_counts_once() -> None:
    model = plain()
    config = lora.LoRAConfig(r=2, target_modules=("0",), modules_to_save=("2",))
    for name in ("one", "two"):
        lora.inject(model, config, name=name)
        perturb(model, name)
    with pytest.raises(lora.MergeError, match="each has its own 2"):
        lora.activate(model, "one", "two")
    lora.activate(model, "one")
    x = torch.randn(3, 6)
    wanted = model(x)
    lora.activate(model, "one", "one")
    assert torch.equal(model(x), wanted)


def test_what_acts_trains() -> None:
    model = plain()
    for name in ("one", "two"):
        lora.inject(model, lora.LoRAConfig(r=2), name=name)
    lora.activate(model, "one")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{i}.adapters.one.lora_{f}" for i in (0, 2) for f in "AB"}


def test_a_part_with_an_adapter_of_its_own_is_not_injected_over() -> None:
    model = nn.Sequential(plain(), nn.Linear(4, 4))
    lora.inject(model[0], lora.LoRAConfig(r=2))
    before = snapshot(model)
    with pytest.raises(lora.ConfigError, match="injected into a part of the model"):
        lora.inject(model, lora.LoRAConfig(r=2))
    assert unchanged(before, model)


def test_a_saved_module_reached_by_two_paths_has_one_copy() -> None:
    model = plain()
    model.add_module("again", model[2])
    model.forward = lambda x: model[2](model[0](x))  # type: ignore[method-assign]
    report = lora.inject(model, lora.LoRAConfig(r=2, target_modules=("0",), modules_to_save=("2",)))
    assert model[2] is model.again
    assert report.trainable == 2 * (6 + 8) + 8 * 4 + 4
    lora.eject(model)
    assert model[2] is model.again


@pytest.mark.parametrize(
    ("build", "config", "match"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            {},
            r"1 \(BatchNorm1d\) keeps running statistics.*modules_to_save=\('1',\)",
        ),
        (lambda: nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), {"modules_to_save": ("0",),
         "target_modules": ("0.0",)}, "ModuleList, which is never called"),
        (lambda: torch.compile(plain()), {}, "Inject into model._orig_mod"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, "no layer matches"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), {},
         "no layer matches"),
        (plain, {"exclude_modules": "("},
         r"exclude_modules is refused: '\(' is not a regular expression"),
        (plain, {"target_modules": "a{99999999999}"}, "is not a regular expression"),
        (plain, {"r": 2**31 - 1}, "no adapter can be made: lora needs .* GiB"),
        (plain, {"r": 10**30}, "r must be .* at most 2,147,483,647, found .* 100 bits"),
    ],
    ids=range(9),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_and_settings_that_cannot_be_joined(build, config: dict, match: str) -> None:
    model = build()
    before = snapshot(model) if not match.startswith("no layer") else None
    with pytest.raises(lora.LoraError, match=match):
        lora.inject(model, lora.LoRAConfig(**config))
    assert before is None or unchanged(before, model)


def test_what_cannot_be_copied_or_trained_is_named_before_anything_changes() -> None:
    import threading

    model = plain()
    model[2].lock = threading.Lock()
    before = snapshot(model)
    with pytest.raises(lora.ConfigError, match="no adapter can be made for 2: cannot pickle"):
        lora.inject(model, lora.LoRAConfig(target_modules=("0",), modules_to_save=("2",)))
    assert unchanged(before, model)
    model = plain()
    model[1].codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(lora.TargetError, match="1.codes is torch.int8, which cannot train"):
        lora.inject(model, lora.FullConfig())


def test_a_wrapped_layer_looks_like_what_it_wraps() -> None:
    model = gpt2()
    lora.inject(model, lora.LoRAConfig())
    layer = model.transformer.h[0].attn.c_attn
    assert layer.nf == 96
    assert (layer.in_features, layer.out_features) == (32, 96)
    x = torch.randn(2, 32)
    assert torch.equal(layer(x=x), layer(x))
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_peft_would_read_more_into_a_name_and_the_report_says_so() -> None:
    targets = ("q_lin", "pre_classifier")
    config = lora.LoRAConfig(modules_to_save=("classifier",), target_modules=targets)
    report = str(lora.inject(distilbert(), config))
    assert "to mean pre_classifier too: it cannot read the saved file. Set" in report
    assert "modules_to_save=('pre_classifier', 'classifier')" in report
    config = lora.LoRAConfig(modules_to_save=("classifier",))
    report = str(lora.inject(distilbert(), config))
    assert "pre_classifier too: the saved file holds it as the base has it" in report
    config = lora.LoRAConfig(modules_to_save=("pre_classifier", "classifier"))
    assert "too" not in str(lora.inject(distilbert(), config))


def test_restore_follows_the_model_to_its_dtype() -> None:
    model = plain()
    lora.inject(model, lora.LoRAConfig(r=2))
    lora.merge(model)
    model.half()
    lora.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_an_adapted_model_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = plain()
        lora.inject(model, lora.LoRAConfig(r=2))
        assert model(torch.ones(3, 6)).shape == (3, 4)


class Twice(nn.Module):
    """A plain model with a layer that two paths lead to, and a norm that nothing targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.mid = nn.Module()
        self.mid.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)) + self.mid.again(x))


def test_a_layer_reached_by_two_paths_is_one_layer_whichever_is_named() -> None:
    model, x = Twice(), torch.randn(3, 6)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert lora.inject(model, lora.LoRAConfig(target_modules=("again",))).plan.targets == (
        "first",
        "mid.again",
    )
    lora.inject(model, lora.LoRAConfig(target_modules=("first",)), name="two")
    assert model.first is model.mid.again
    perturb(model)
    perturb(model, "two")
    lora.activate(model, "default", "two")
    before = model(x)
    lora.merge(model)
    torch.testing.assert_close(model(x), before)
    lora.restore(model)
    lora.eject(model)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    report = lora.inject(model, lora.LoRAConfig(exclude_modules=("again",)))
    assert report.plan.targets == ("second",)


def test_all_linear_leaves_the_head_alone_whatever_was_injected_before() -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    alone = lora.inject(model, lora.LoRAConfig()).plan.targets
    assert "lm_head" not in alone
    lora.eject(model)
    lora.inject(model, lora.LoRAConfig(target_modules=("lm_head",)), name="head")
    assert lora.inject(model, lora.LoRAConfig()).plan.targets == alone


def test_init_begins_saved_modules_again_from_the_base() -> None:
    model = distilbert().to("meta")
    lora.inject(model, lora.LoRAConfig(modules_to_save=("classifier",)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        whole = distilbert().state_dict()
        for name, parameter in base_parameters(model):
            parameter.copy_(whole[name])
    lora.init(model, seed=0)
    for name, parameter in distilbert().classifier.named_parameters():
        assert torch.equal(model.classifier.copies["default"].get_parameter(name), parameter)
    lora.merge(model)
    with pytest.raises(lora.MergeError, match=r"init: the model is merged"):
        lora.init(model, seed=0)


def test_an_adapter_that_the_model_reads_past_is_refused_or_found_at_the_first_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """WavLM's attention hands its layers' weights to torch, and never calls the layers."""
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=20, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.WavLMModel(config)
    named = lora.LoRAConfig(target_modules=("q_proj", "output_dense"))
    with pytest.raises(lora.TargetError, match="q_proj, whose weight WavLMModel reads itself"):
        lora.inject(model, named)
    lora.inject(model, lora.LoRAConfig())
    model(torch.randn(1, 800)).last_hidden_state.sum().backward()
    check_alive(model)
    lora.eject(model)
    monkeypatch.setattr(lora.targets, "UNCALLED", {})  # as of an architecture that is not known
    lora.inject(model, named)
    with pytest.raises(lora.TargetError, match=r"2 of 4 adapted layers did nothing.*q_proj"):
        model(torch.randn(1, 800))


def test_a_disabled_model_is_neither_merged_nor_given_adapters(tmp_path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(target_modules=("q_lin",)))
    lora.save(model, tmp_path)
    config = lora.LoRAConfig(target_modules=("v_lin",))
    with lora.disabled(model):
        for call in (
            lambda: lora.merge(model),
            lambda: lora.load(model, tmp_path, name="two"),
            lambda: lora.inject(model, config, name="two"),
        ):
            with pytest.raises(lora.MergeError, match=r"Leave lora.disabled\(model\) first"):
                call()


@pytest.mark.parametrize("make", ["inference", "expanded"])
def test_a_base_that_cannot_be_written_to_is_refused_untouched(make: str, tmp_path) -> None:
    model = plain()
    lora.inject(model, lora.FullConfig())
    lora.save(model, tmp_path)
    if make == "inference":
        with torch.inference_mode():
            model = plain()
    else:
        model = plain()
        model[2].weight = nn.Parameter(torch.zeros(1, 8).expand(4, 8))
    before = snapshot(model)
    for call in (lambda: lora.load(model, tmp_path), lambda: lora.inject(model, lora.FullConfig())):
        with pytest.raises(lora.TargetError, match="cannot be trained in place"):
            call()
        assert unchanged(before, model)


@pytest.mark.parametrize("seed", [1.5, None, "x", True])
def test_a_seed_is_a_whole_number(seed) -> None:
    with pytest.raises(lora.ConfigError, match="seed must be a whole number"):
        lora.inject(plain(), lora.LoRAConfig(), seed=seed)


def test_an_adapter_takes_the_mode_of_its_layer() -> None:
    model, x = plain().eval(), torch.randn(5, 6)
    lora.inject(model, lora.LoRAConfig(lora_dropout=0.9))
    perturb(model)
    assert torch.equal(model(x), model(x))


def test_a_linear_with_a_forward_or_a_bias_of_its_own_has_no_view() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    pruned = nn.Linear(3, 3)
    del pruned.bias
    pruned.bias = torch.zeros(3)
    for layer in (Scaled(3, 3), pruned):
        with pytest.raises(lora.TargetError, match="no view for it"):
            lora.inject(nn.Sequential(layer), lora.LoRAConfig(target_modules=("0",)))


def test_saved_modules_that_cannot_train_or_be_saved_are_refused() -> None:
    model = plain()
    model[2].codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    config = lora.LoRAConfig(target_modules=("0",), modules_to_save=("2",))
    with pytest.raises(lora.TargetError, match=r"2\.codes is torch.int8"):
        lora.inject(model, config)

    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 3}

    with pytest.raises(lora.TargetError, match="_extra_state is not a tensor"):
        lora.inject(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Counting(3, 3)), config)


def test_of_nested_saved_modules_the_outer_one_is_saved() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2))})
    report = lora.inject(model, lora.LoRAConfig(modules_to_save=("head", "head.0")))
    assert report.plan.saved == ("head",)


def test_the_mask_is_drawn_in_float32() -> None:
    """1 / (1 − p) rounded to bfloat16 would bias every update."""
    model = plain().to(torch.bfloat16).train()
    lora.inject(model, lora.LoRAConfig(lora_dropout=0.1))
    x = torch.ones(50, 6, dtype=torch.bfloat16)
    mask = model[0].adapter("default").draw_mask(x).scaled(x)
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1.0).div(0.9))}


def test_a_saved_module_that_the_model_calls_by_another_path_is_found() -> None:
    """T5's encoder and decoder have embeddings of their own, whose weight `shared` only shares."""
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=40,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    lora.inject(model, lora.LoRAConfig(target_modules=("q",), modules_to_save=("shared",)))
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(lora.TargetError, match="shared among them.*--modules-to-save without it"):
        check_alive(model)


def test_a_part_with_adapters_is_known_from_the_whole() -> None:
    whole = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    lora.inject(whole[0], lora.FullConfig())
    with pytest.raises(lora.MergeError, match="keeps no originals"), lora.disabled(whole):
        pass
    with pytest.raises(lora.MergeError, match="keeps no originals"):
        lora.merge(whole)
    lora.eject(whole[0])
    lora.inject(whole[0], lora.LoRAConfig())
    with pytest.raises(lora.MergeError, match=r"those of the part 0. Call lora.eject\(model.0\)"):
        lora.eject(whole)
    compiled = torch.compile(whole[0], backend="eager")
    with pytest.raises(lora.MergeError, match=r"lora.eject\(model._orig_mod\)"):
        lora.eject(compiled)
    lora.eject(whole[0])
    assert [type(module).__name__ for module in whole[0]] == ["Linear", "Linear"]


def test_a_weight_that_was_tied_trains_again_after_eject() -> None:
    model = gpt2()
    report = lora.inject(model, lora.LoRAConfig(modules_to_save=("wte",)))
    assert "transformer.wte.weight trains apart from lm_head.weight" in str(report)
    lora.merge(model, untie=True)
    lora.eject(model)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_method_in_two_files_is_refused() -> None:
    body = {"name": "lora", "__module__": "lora.methods.mine", "__qualname__": "LoRA"}
    with pytest.raises(lora.ConfigError, match="two methods are named 'lora'"):
        type("LoRA", (lora.Adapter,), body)
    assert lora.METHODS["lora"].Config is lora.LoRAConfig


def test_restore_brings_back_a_bias_that_was_written_to_while_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, lora.LoRAConfig())
    lora.restore(model)  # nothing to undo
    layer = model[0]
    kept = layer.weight.clone(), layer.bias.clone()
    lora.merge(model)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    lora.restore(model)
    assert torch.equal(layer.weight, kept[0])
    assert torch.equal(layer.bias, kept[1])


def test_a_saved_module_is_indexed_and_walked_as_what_it_holds() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.head if self.head else ():
                x = layer(x)
            return x + self.head[-1].bias[0] + len(self.head)

    model, x = Headed(), torch.ones(1, 4)
    wanted = model(x)
    lora.inject(model, lora.LoRAConfig(target_modules=("body",), modules_to_save=("head",)))
    assert torch.equal(model(x), wanted)
    assert bool(model.head)
    model(x).sum().backward()
    assert model.head.current[1].bias.grad is not None


def test_adapters_held_in_sixteen_bits_merge_from_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lora.inject(model, lora.LoRAConfig(r=8))
    perturb(model)
    model.to(torch.bfloat16)
    layer = model[0]
    adapter = layer.adapter("default")
    A, B = adapter.lora_A.float(), adapter.lora_B.float()
    wanted = (layer.base_layer.weight.float() + adapter.scaling * B @ A).to(torch.bfloat16)
    lora.merge(model)
    assert torch.equal(layer.weight, wanted)


def test_wrappers_take_the_mode_of_what_they_wrap() -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(modules_to_save=("classifier",)))
    assert not any(module.training for module in model.modules())
