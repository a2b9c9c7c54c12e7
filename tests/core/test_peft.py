"""PEFT's files, both directions, against peft itself: logits, key sets, and bf16 errors."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from conftest import distilbert, gpt2, tokens
from peft.utils import ModulesToSaveWrapper
from torch import nn

import lora
from lora.testing import perturb

BUILDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "Linear": (distilbert, ("q_lin", "v_lin", "lin1"), ("pre_classifier", "classifier")),
    "Conv1D": (gpt2, ("c_attn", "c_fc", "c_proj"), ()),
}


def fill(tensors: dict[str, torch.Tensor], size: float = 0.2) -> None:
    """Values from each key's own checksum, so that a swap or a transpose shows."""
    import zlib

    for key, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        tensor.copy_(size * torch.randn(tensor.shape, generator=generator))


def peft_model(base: nn.Module, **settings: object) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out: it corrects it for Conv1D, and says so
        return peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()


def read_by_peft(base: nn.Module, folder: Path) -> peft.PeftModel:
    """Any warning (a missing key, an unknown setting) is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("kind", BUILDS)
def test_peft_reads_ours(kind: str, tmp_path: Path) -> None:
    build, targets, saved = BUILDS[kind]
    model = build()
    config = lora.LoRAConfig(r=3, lora_alpha=7, target_modules=targets, modules_to_save=saved)
    lora.inject(model, config)
    perturb(model)
    model.eval()
    lora.save(model, tmp_path)
    theirs = read_by_peft(build(), tmp_path)
    with torch.no_grad():
        ours = model(tokens()).logits
        assert float((theirs(tokens()).logits - ours).abs().max()) < 1e-5
        assert float((build()(tokens()).logits - ours).abs().max()) > 1e-2
    keys = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == set(peft.get_peft_model_state_dict(theirs))


@pytest.mark.parametrize("kind", BUILDS)
def test_we_read_pefts(kind: str, tmp_path: Path) -> None:
    build, targets, saved = BUILDS[kind]
    theirs = peft_model(
        build(), r=3, lora_alpha=7, lora_dropout=0.1, target_modules=list(targets),
        modules_to_save=list(saved) or None,
    )  # fmt: skip
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = build()
    report = lora.load(model, tmp_path)
    assert "not verifiable" in str(report)
    with torch.no_grad():
        off = (model.eval()(tokens()).logits - theirs(tokens()).logits).abs().max()
    assert float(off) < 1e-5
    # and written again by us, it is the same file
    again = tmp_path / "again"
    lora.save(model, again)
    first = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    second = safetensors.torch.load_file(again / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_we_read_what_pefts_bare_endswith_saved(tmp_path: Path) -> None:
    """task_type SEQ_CLS adds ["classifier", "score"], which catches pre_classifier too."""
    theirs = peft_model(distilbert(), r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    model = distilbert()
    report = lora.load(model, tmp_path)
    assert report.plan.saved == ("pre_classifier", "classifier")
    with torch.no_grad():
        off = (model.eval()(tokens()).logits - theirs(tokens()).logits).abs().max()
    assert float(off) < 1e-5


@pytest.mark.parametrize("bias", ["none", "all"])
def test_peft_reads_a_saved_module_whose_name_ends_anothers(bias: str, tmp_path: Path) -> None:
    """PEFT takes classifier for pre_classifier too: the file holds that as the base has it."""
    model = distilbert()
    settings = {"r": 2, "target_modules": ("q_lin",), "modules_to_save": ("classifier",)}
    lora.inject(model, lora.LoRAConfig(**settings, bias=bias))
    perturb(model)
    lora.save(model.eval(), tmp_path)
    judge = read_by_peft(distilbert(), tmp_path)
    wrapped = [n for n, m in judge.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert wrapped == ["base_model.model.pre_classifier", "base_model.model.classifier"]
    again = distilbert()
    report = lora.load(again, tmp_path, trainable=True)
    assert report.plan.saved == ("classifier",)
    assert not report.plan.carried
    assert not again.pre_classifier.weight.requires_grad
    with torch.no_grad():
        ours, base = model(tokens()).logits, distilbert().eval()(tokens()).logits
        assert float((ours - base).abs().max()) > 0.1
        assert float((judge(tokens()).logits - ours).abs().max()) < 1e-5
        assert torch.equal(again.eval()(tokens()).logits, ours)
    if bias == "none":  # PEFT does not take biases back
        with torch.no_grad(), judge.disable_adapter():
            assert float((judge(tokens()).logits - base).abs().max()) < 1e-5
    # The bytes are the same from what was loaded, and on another base it is refused
    lora.save(again, tmp_path / "b")
    first, second = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "b")
    )
    assert first == second
    other = distilbert()
    with torch.no_grad():
        other.pre_classifier.weight[0, 0] += 1
    with pytest.raises(lora.CheckpointError, match="trained on another base"):
        lora.load(other, tmp_path)
    assert lora.load(distilbert().bfloat16(), tmp_path).plan.carried == ()


def test_all_linear_means_what_it_means_to_peft() -> None:
    # PEFT leaves out a language model's head only; DistilBERT's two it has to be told.
    theirs = peft_model(
        distilbert(), r=2, target_modules="all-linear",
        exclude_modules=["pre_classifier", "classifier"],
    )  # fmt: skip
    theirs_count = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert lora.inject(distilbert(), lora.LoRAConfig(r=2)).adapter_parameters == theirs_count
    theirs = peft_model(gpt2(), r=2, target_modules="all-linear")
    theirs_count = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert lora.inject(gpt2(), lora.LoRAConfig(r=2)).adapter_parameters == theirs_count


@pytest.mark.parametrize("kind", BUILDS)
def test_bf16_error_is_at_most_one_and_a_half_of_pefts(kind: str, tmp_path: Path) -> None:
    """Both against the same bf16 weights computed in float32; the mean over ten inputs."""
    build, targets, _ = BUILDS[kind]
    model = build()
    lora.inject(model, lora.LoRAConfig(r=4, lora_alpha=8, target_modules=targets))
    perturb(model, size=0.1)
    lora.save(model, tmp_path)
    half = build().to(torch.bfloat16)
    truth, ours, theirs = copy.deepcopy(half).float(), copy.deepcopy(half), copy.deepcopy(half)
    for base in (truth, ours):
        # saved on the float32 base, whose fingerprint is that of its bfloat16 rounding
        lora.load(base, tmp_path)
        base.eval()
    theirs = read_by_peft(theirs, tmp_path)
    errors = []
    with torch.no_grad():
        for seed in range(10):
            ids = torch.randint(1, 99, (4, 16), generator=torch.Generator().manual_seed(seed))
            wanted = truth(ids).logits
            errors.append(
                [float((m(ids).logits.float() - wanted).abs().mean()) for m in (ours, theirs)]
            )
    mine, pefts = (sum(column) for column in zip(*errors, strict=True))
    assert mine <= 1.5 * pefts


def test_training_from_one_start_stays_with_peft() -> None:
    """The same values, data and optimiser: after twenty steps the losses agree to 1e-5."""
    ours = distilbert(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    theirs = peft_model(copy.deepcopy(ours), r=4, lora_alpha=8, target_modules=["q_lin", "lin2"])
    lora.inject(ours, lora.LoRAConfig(r=4, lora_alpha=8, target_modules=("q_lin", "lin2")))
    named = dict(theirs.named_parameters())
    from lora.inventory import trained_parameters

    with torch.no_grad():
        for key, parameter in trained_parameters(ours, "default").items():
            path, _, leaf = key.removesuffix(".weight").rpartition(".")
            named[f"base_model.model.{path}.{leaf}.default.weight"].copy_(parameter)
    losses = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        curve = []
        for _ in range(20):
            loss = model(tokens(), labels=torch.tensor([0, 1, 1])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.02


def test_merged_logits_are_pefts(tmp_path: Path) -> None:
    theirs = peft_model(gpt2(), r=3, target_modules=["c_attn"])
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = gpt2()
    lora.load(model, tmp_path)
    lora.merge(model)
    lora.eject(model)
    with torch.no_grad():
        off = model(tokens()).logits - theirs.merge_and_unload()(tokens()).logits
    assert float(off.abs().max()) < 1e-5


def test_entries_of_pefts_that_meet_nothing_or_saved_modules_only(tmp_path: Path) -> None:
    """PEFT ignores them; every tensor of the file has its place all the same."""
    theirs = peft_model(
        distilbert(), r=2, target_modules=["q_lin", "nope", "classifier"],
        modules_to_save=["classifier"], exclude_modules=["nothing"],
    )  # fmt: skip
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = distilbert()
    lora.load(model, tmp_path)
    with torch.no_grad():
        off = (model.eval()(tokens()).logits - theirs(tokens()).logits).abs().max()
    assert float(off) < 1e-5
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_linn"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(lora.TargetError, match="no layer matches"):
        lora.load(distilbert(), tmp_path)


@pytest.mark.parametrize("lost", ["pre_classifier", "classifier"])
def test_a_file_of_pefts_without_its_head_is_refused(lost: str, tmp_path: Path) -> None:
    """PEFT loads it in silence, onto a random head."""
    peft_model(distilbert(), r=2, target_modules=["q_lin"], task_type="SEQ_CLS").save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    kept = {key: tensor for key, tensor in tensors.items() if f".{lost}." not in key}
    assert len(kept) == len(tensors) - 2
    path.write_bytes(safetensors.torch.save(kept))
    with pytest.raises(lora.CheckpointError, match=f"{lost}.* is not in the file"):
        lora.load(distilbert(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "exclude_modules": r".*\.ffn\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["lin1", "lin2"]},
        {"target_modules": ["q_lin", "lin1"], "exclude_modules": ["lin1"]},
        {"target_modules": ["q_lin"], "exclude_modules": []},
    ],
)
def test_we_read_what_peft_excluded(settings: dict, tmp_path: Path) -> None:
    theirs = peft_model(distilbert(), r=2, **settings)
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = distilbert()
    lora.load(model, tmp_path)
    with torch.no_grad():
        off = (model.eval()(tokens()).logits - theirs(tokens()).logits).abs().max()
    assert float(off) < 1e-5
