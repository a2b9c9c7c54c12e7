"""Injection: targets, freezing, several adapters, saved modules, merge and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import distilbert, gpt2, tokens
from torch import nn

import lora
from lora.testing import perturb, snapshot, unchanged


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
    with pytest.raises(lora.MergeError, match="2 is not finite"):
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


def test_the_fast_path_of_torchs_encoder_layer_is_not_left_to_skip_the_adapter() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(lora.TargetError, match="set_fastpath_enabled"):
        lora.inject(model, lora.LoRAConfig())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        report = lora.inject(model, lora.LoRAConfig())
        assert report.plan.targets == ("linear1", "linear2")
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            before = model(x)
            perturb(model)
            assert not torch.equal(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_start_on_the_meta_device_ends_in_the_same_bits() -> None:
    with torch.device("meta"):
        model = distilbert()
    lora.inject(model, lora.LoRAConfig(r=2), seed=3)
    model.to_empty(device="cpu")
    lora.init(model, seed=3)
    other = distilbert()
    lora.inject(other, lora.LoRAConfig(r=2), seed=3)
    from lora.injection import trained_parameters

    for name, parameter in trained_parameters(model, "default").items():
        assert torch.equal(parameter, trained_parameters(other, "default")[name]), name


def test_the_start_of_a_layer_does_not_depend_on_the_others() -> None:
    from lora.injection import trained_parameters

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
    with pytest.raises(lora.ConfigError, match="stands alone"):
        lora.inject(model, lora.LoRAConfig(), name="two")
    other = plain()
    lora.inject(other, lora.LoRAConfig())
    with pytest.raises(lora.ConfigError, match="stands alone"):
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
        (plain, {"exclude_modules": "("}, "exclude_modules='\\(' is no regular expression"),
        (plain, {"target_modules": "a{99999999999}"}, "is no regular expression"),
        (plain, {"r": 10**12}, "no adapter can be made for 0"),
        (plain, {"r": 10**30}, "no adapter can be made for 0"),
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
    config = lora.LoRAConfig(modules_to_save=("classifier",))
    assert "pre_classifier too" in str(lora.inject(distilbert(), config))
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
