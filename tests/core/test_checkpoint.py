"""Adapter files: every way to be wrong has its error, and a failed load changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, distilbert, gpt2, tokens
from torch import nn

import lora
from lora import nf4
from lora.identity import fingerprint
from lora.testing import perturb, snapshot, unchanged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ("q_lin", "v_lin"),
    "modules_to_save": ("pre_classifier", "classifier"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(**SETTINGS))
    perturb(model)
    return lora.save(model, tmp_path / "adapter")


def refused(folder: Path, match: str, model: nn.Module | None = None) -> str:
    """Load must fail with these words and leave model and folder as they were."""
    model = model or distilbert()
    before = snapshot(model)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(lora.LoraError, match=match) as caught:
        lora.load(model, folder)
    assert unchanged(before, model)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    """Change the tensors and keep the metadata."""
    path = folder / WEIGHTS
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(path.read_bytes())
    safetensors.torch.save_file(change(tensors) or tensors, path, metadata)


def first(tensors: dict) -> str:
    return min(key for key in tensors if "lora_A" in key)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x01", "not a whole safetensors file"),
        (b"hello, this is no adapter at all", "not a whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 99_999_999) + b"{" * 64, "not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "not in the file"),
        (pickle.dumps({"a": 1}), "pickle under a safetensors name"),
        (b"PK\x03\x04rest of a zip", "pickle under a safetensors name"),
    ],
)
def test_a_file_that_is_none(saved: Path, content: bytes, match: str) -> None:
    (saved / WEIGHTS).write_bytes(content)
    refused(saved, match)


def test_every_truncation_is_refused(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for length in (1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (saved / WEIGHTS).write_bytes(whole[:length])
        refused(saved, "not a whole safetensors file")
    (saved / WEIGHTS).write_bytes(whole + b"more")
    refused(saved, "not a whole safetensors file")


def test_a_pickle_is_refused_with_the_way_to_convert_it(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    text = refused(saved, "is a pickle, which can run code")
    assert "weights_only=True" in text


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "found a list, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("\udcff", "cannot be read as JSON"),
        ("{}", "no peft_type"),
        (
            '{"peft_type": "XLORA"}',
            "peft_type 'XLORA' is no method of ours. Known: ADALORA, .*LORA",
        ),
        ('{"peft_type": 3}', "is no method of ours"),
        ('{"peft_type": "LORA"}', "no target_modules"),
        ('{"peft_type": "LORA", "target_modules": ["q_lin"], "r": "four"}', "r must be"),
        ('{"peft_type": "LORA", "target_modules": ["q_lin"], "r": 1e99}', "r must be"),
        ('{"peft_type": "LORA", "target_modules": [3]}', "target_modules must be"),
        ('{"peft_type": "LORA", "target_modules": ["q_lin"], "wibble": 3}', "wibble=3 changes"),
        ('{"peft_type": "LORA", "target_modules": ["q_lin"], "lora_alpha": NaN}', "lora_alpha"),
    ],
    ids=range(15),
)
def test_a_config_that_is_none(saved: Path, content: str, match: str) -> None:
    (saved / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(saved, match)


def test_missing_folders_and_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match="the folder does not exist"):
        lora.load(distilbert(), tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    refused(saved, "no adapter_model.safetensors")
    (saved / CONFIG).unlink()
    refused(saved, "found .*README.md")


def test_missing_unexpected_and_misshapen_tensors(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    rewrite(saved, lambda t: {k: v for k, v in t.items() if k != first(t)})
    text = refused(saved, "1 differences over 12 tensors")
    assert "q_lin.lora_A.weight is not in the file" in text
    (saved / WEIGHTS).write_bytes(whole)
    rewrite(saved, lambda t: t | {"base_model.model.extra.lora_A.weight": torch.zeros(4, 2)})
    refused(saved, "extra.lora_A.weight has no place in the model")
    (saved / WEIGHTS).write_bytes(whole)
    rewrite(saved, lambda t: t | {first(t): torch.zeros(16, 32)})
    text = refused(saved, r"is \(16, 32\) in the file, \(4, 32\) in the model")
    assert "Set r to 16" in text
    (saved / WEIGHTS).write_bytes(whole)
    rewrite(saved, lambda t: {k.replace("base_model.model.", "module."): v for k, v in t.items()})
    refused(saved, "module.* does not begin with 'base_model.model.'")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda t: torch.full_like(t, float("nan")), "128 values that are not finite"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("inf")), "32 values"),
        (lambda t: t.to(torch.int64), "torch.int64, no dtype of weights"),
        (lambda t: t > 0, "torch.bool, no dtype of weights"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn, no dtype of weights"),
        (lambda t: t.to(torch.complex64), "complex64, no dtype of weights"),
    ],
)
def test_values_that_are_no_weights(saved: Path, value, match: str) -> None:
    rewrite(saved, lambda t: t | {first(t): value(t[first(t)])})
    refused(saved, match)


def test_sixteen_bit_adapters_are_held_in_float32(saved: Path) -> None:
    rewrite(saved, lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()})
    model = distilbert()
    lora.load(model, saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_edited_alpha_and_another_base_are_found_out(saved: Path) -> None:
    refused(saved, "trained on another base", distilbert(seed=1))
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 16'))
    refused(saved, "is not the config that adapter_model.safetensors was saved with")
    # what does not change the result may be edited
    (saved / CONFIG).write_text(text.replace('"lora_dropout": 0.0', '"lora_dropout": 0.3'))
    lora.load(distilbert(), saved)


def test_another_architecture_is_a_target_error(saved: Path) -> None:
    refused(saved, "no module matches|no layer matches", gpt2())


def test_a_head_that_is_not_saved_must_be_the_same(tmp_path: Path) -> None:
    """PEFT loads this in silence, onto a random head."""
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(target_modules=("q_lin",)))
    lora.save(model, tmp_path)
    other = distilbert()
    with torch.no_grad():
        other.classifier.weight.add_(1)
    refused(tmp_path, "name it in modules_to_save", other)


def test_the_fingerprint_of_a_base() -> None:
    model = distilbert()
    mark = fingerprint(model)
    lora.inject(model, lora.LoRAConfig(**SETTINGS))
    perturb(model)
    assert fingerprint(model) == mark
    assert set(mark) == {"base_bfloat16", "base_float16"}
    for dtype, key in ((torch.bfloat16, "base_bfloat16"), (torch.float16, "base_float16")):
        assert fingerprint(distilbert().to(dtype)) == {key: mark[key]}
    assert fingerprint(distilbert(seed=1)) != mark
    assert fingerprint(distilbert().to("meta")) == {}
    with torch.no_grad():
        model.distilbert.transformer.layer[1].ffn.lin2.bias[3] += 0.5
    assert fingerprint(model) != mark


def test_a_base_in_nf4_is_known_by_its_codes(tmp_path: Path) -> None:
    """The last bits of the scales depend on the number of threads and on the device."""
    model = nn.Sequential(nn.Linear(64, 64))
    nf4.quantize_layers(model, ["0"])
    lora.inject(model, lora.LoRAConfig(r=2, target_modules="all-linear"))
    lora.save(model, tmp_path / "now")
    with pytest.MonkeyPatch.context() as patch:  # a mark of an earlier version, which has them
        patch.setattr("lora.identity._scales", lambda *_: ())
        patch.setattr("lora.checkpoint.packed_layers", lambda _: {"0": [64, True]})
        lora.save(model, tmp_path / "earlier")
    lora.load(model, tmp_path / "earlier", name="earlier")
    layer, mark = model[0].base_layer, fingerprint(model)
    with torch.no_grad():
        for scale in (layer.offset, layer.nested_absmax):
            scale.copy_(torch.nextafter(scale, torch.tensor(9.0)))
        layer.absmax[0].bitwise_xor_(1)  # a code of the scales, which those bits can change
    assert fingerprint(model) == mark
    lora.load(model, tmp_path / "now", name="now")
    for change in (lambda: layer.offset.mul_(1.01), lambda: layer.weight[5].bitwise_xor_(1)):
        kept = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            change()
        with pytest.raises(lora.CheckpointError, match="trained on another base"):
            lora.load(model, tmp_path / "now", name="other")
        layer.load_state_dict(kept)


def test_the_fingerprint_samples_every_column() -> None:
    """A stride that divides the width would look at one column of each row only."""
    model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 512), nn.BatchNorm1d(4))
    mark = fingerprint(model)
    for column in (1, 17, 63):
        with torch.no_grad():
            kept = model[0].weight[:, column].clone()
            model[0].weight[:, column] += 1
        assert fingerprint(model) != mark
        with torch.no_grad():
            model[0].weight[:, column] = kept
    assert fingerprint(model) == mark
    model[2].running_mean += 1
    assert fingerprint(model) != mark


def test_a_base_is_known_in_sixteen_bits_and_said_where_it_cannot_be(
    saved: Path, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert "not verifiable" not in str(lora.load(distilbert().to(dtype), saved))
        refused(saved, "trained on another base", distilbert(seed=1).to(dtype))
    half = distilbert().half()
    lora.inject(half, lora.LoRAConfig())
    lora.save(half, tmp_path / "half")
    report = lora.load(distilbert().half().to(torch.bfloat16), tmp_path / "half")
    assert "base not verifiable: it was held in another dtype" in str(report)


def test_save_refuses_what_is_not_finite(tmp_path: Path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(lora.CheckpointError, match="not finite"):
        lora.save(model, tmp_path / "adapter")
    with pytest.raises(lora.CheckpointError, match="no adapter 'other'. Found: default"):
        lora.save(model, tmp_path / "adapter", name="other")
    assert not (tmp_path / "adapter").exists()


def test_a_named_adapter_has_its_subfolder(tmp_path: Path) -> None:
    model = distilbert()
    for name in ("one", "two"):
        lora.inject(model, lora.LoRAConfig(target_modules=("q_lin",)), name=name)
        perturb(model, name)
        assert lora.save(model, tmp_path, name=name) == tmp_path / name
    other = distilbert()
    lora.load(other, tmp_path, name="two")
    lora.activate(model, "two")
    assert torch.equal(other(tokens()).logits, model.eval()(tokens()).logits)
    with pytest.raises(lora.CheckpointError, match="It has adapters one, two"):
        lora.load(distilbert(), tmp_path)
    with pytest.raises(lora.ConfigError, match="has an adapter named 'two' already"):
        lora.load(other, tmp_path, name="two")


def test_a_loaded_adapter_trains_only_if_asked(saved: Path) -> None:
    model = distilbert()
    lora.load(model, saved)
    assert not any(p.requires_grad for p in model.parameters())
    model = distilbert()
    report = lora.load(model, saved, trainable=True)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the full disk."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, "tests")
import torch, lora
from conftest import distilbert
model = distilbert()
lora.inject(model, lora.LoRAConfig())
lora.save(model, {str(tmp_path / "adapter")!r})
with torch.no_grad():
    for p in model.parameters():
        p.add_(1) if p.requires_grad else None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    lora.save(model, {str(tmp_path / "adapter")!r})
except lora.CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "cannot be written: File too large. Files of an earlier save are" in done.stdout
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {CONFIG, WEIGHTS, "README.md"}
    lora.load(distilbert(), tmp_path / "adapter")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(lora.CheckpointError, match="cannot be written"):
        lora.save(model, tmp_path / "file")


def test_the_files_are_pefts_and_carry_the_mark(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    text = (saved / CONFIG).read_text()
    settings = json.loads(text)
    assert text == json.dumps(settings, indent=2, sort_keys=True)
    assert settings["inference_mode"] is True
    assert settings["lora_alpha"] == 8
    with safetensors.safe_open(saved / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    mark = json.loads(metadata["lora_from_scratch"])
    assert set(mark) == {"base_bfloat16", "base_float16", "config"}


def test_all_linear_is_saved_as_full_names(tmp_path: Path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    lora.save(model, tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert len(names) == 12
    assert "distilbert.transformer.layer.0.attention.q_lin" in names


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    """The first two bytes of a safetensors file are the low end of its header's length."""
    for length in range(100, 230):
        model = nn.Module()
        model.add_module("a" * length, nn.Linear(4, 4))
        lora.inject(model, lora.LoRAConfig(r=1))
        folder = lora.save(model, tmp_path / str(length))
        other = nn.Module()
        other.add_module("a" * length, nn.Linear(4, 4))
        other.load_state_dict(
            {
                key.replace("base_layer.", ""): tensor
                for key, tensor in model.state_dict().items()
                if "adapters" not in key
            }
        )
        lora.load(other, folder)
    starts = {(tmp_path / str(n) / WEIGHTS).read_bytes()[:2] for n in range(100, 230)}
    assert any(start[:1] == b"\x80" for start in starts)


def test_files_are_replaced_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    folder = lora.save(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    perturb(model)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(lora.CheckpointError, match="No space left on device. Files of an earlier"):
        lora.save(model, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_saves_running_statistics_and_integer_buffers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    x = torch.randn(16, 4)
    for config in (lora.FullConfig(), lora.LoRAConfig(r=2, modules_to_save=("1",))):
        model = build()
        lora.inject(model, config)
        for _ in range(20):
            model.train()(x * 3 + 1)
        folder = tmp_path / type(config).__name__
        lora.save(model, folder)
        other = build()
        lora.load(other, folder)
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert not torch.allclose(other(x), build().eval()(x), atol=0.1)


def test_values_past_the_range_of_their_place(tmp_path: Path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(r=2, modules_to_save=("classifier",)))
    with torch.no_grad():
        model.classifier.copies["default"].bias.fill_(1e6)
    lora.save(model, tmp_path)
    refused(tmp_path, "2 values that are not finite in torch.float16", distilbert().half())


def test_a_model_without_values_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        model = distilbert()
    with pytest.raises(lora.CheckpointError, match="cannot be loaded onto the meta device"):
        lora.load(model, saved)


def test_a_tied_weight_inside_a_saved_module_is_written_twice(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        model[1][1].weight = model[1][0].weight
        return model

    model = build()
    lora.inject(model, lora.LoRAConfig(target_modules=("0",), modules_to_save=("1",)))
    perturb(model)
    lora.save(model, tmp_path)
    other = build()
    lora.load(other, tmp_path)
    assert torch.equal(other(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_the_folder_itself_comes_before_a_folder_of_the_name(tmp_path: Path) -> None:
    for number, place in enumerate((tmp_path / "default", tmp_path)):
        model = distilbert()
        lora.inject(model, lora.LoRAConfig(r=number + 1))
        lora.save(model, place)
    assert lora.load(distilbert(), tmp_path).plan.config.r == 2


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_paths_that_no_system_takes(name: str) -> None:
    with pytest.raises(lora.CheckpointError):
        lora.load(distilbert(), name)
    model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    with pytest.raises(lora.CheckpointError, match="cannot be written"):
        lora.save(model, name)


def test_another_head_is_no_other_base_where_the_head_is_saved(saved: Path) -> None:
    """The main use: a new base with a new random head, which the file replaces."""
    other = distilbert()
    with torch.no_grad():
        other.classifier.weight.add_(1)
    assert "not verifiable" not in str(lora.load(other, saved))


def test_the_same_adapter_is_the_same_bytes_and_readable_by_all(tmp_path: Path) -> None:
    import os

    mask = os.umask(0o022)
    try:
        found = []
        for run in range(4):
            model = distilbert()
            lora.inject(model, lora.LoRAConfig(**SETTINGS))
            folder = lora.save(model, tmp_path / str(run))
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    finally:
        os.umask(mask)
    assert all(files == found[0] for files in found)


def test_a_folder_in_a_files_place_is_found_before_anything_is_replaced(saved: Path) -> None:
    (saved / "README.md").unlink()
    (saved / "README.md").mkdir()
    before = (saved / WEIGHTS).read_bytes()
    model = distilbert()
    lora.load(model, saved)
    perturb(model)
    with pytest.raises(lora.CheckpointError, match="Is a directory|is a folder"):
        lora.save(model, saved)
    assert (saved / WEIGHTS).read_bytes() == before
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_all_linear_names_that_are_others_endings_load_again(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))

    model, x = build(), torch.randn(5, 3)
    lora.inject(model, lora.LoRAConfig(r=2))
    perturb(model)
    lora.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"0|1\.1"
    other = build()
    lora.load(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_the_fingerprint_counts_what_files_hold_in_every_floating_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    mark = fingerprint(model)
    model[0].register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == mark
    assert set(fingerprint(nn.Linear(3, 3).double())) == set(mark)
    torch.set_default_device("meta")
    try:
        big = nn.Linear(100, 100, device="cpu")
        assert len(fingerprint(big)) == 2
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_rounded_and_held_in_float32_again_is_the_same(dtype, saved: Path) -> None:
    lora.load(distilbert().to(dtype).float(), saved)


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = distilbert()
    lora.inject(model, lora.LoRAConfig())
    with pytest.raises(lora.CheckpointError, match=r"meta device\). Call lora.init first"):
        lora.save(model, tmp_path)


def test_a_load_that_would_move_running_statistics_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3))

    model = build()
    lora.inject(model, lora.LoRAConfig())
    folder = lora.save(model, tmp_path)
    other = nn.Sequential(*build(), nn.BatchNorm1d(3))
    rewrite_mark(folder)
    before = snapshot(other)
    with pytest.raises(lora.TargetError, match="keeps running statistics"):
        lora.load(other, folder, trainable=True)
    assert unchanged(before, other)
    lora.load(other, folder)


def rewrite_mark(folder: Path) -> None:
    """Make the file a foreign one."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))


def test_a_foreign_file_must_name_modules_that_are_there(saved: Path) -> None:
    rewrite_mark(saved)
    settings = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(settings | {"modules_to_save": ["klassifier"]}))
    # As PEFT allows; but the file's head has no place then
    refused(saved, "classifier.weight has no place in the model")


def test_another_width_is_no_other_rank(saved: Path) -> None:
    """A rank is only offered where it is the rank that differs."""
    import transformers

    config = transformers.DistilBertConfig(
        dim=64, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=99, num_labels=2
    )
    wide = transformers.DistilBertForSequenceClassification(config)
    with pytest.raises(lora.CheckpointError, match="does not fit") as caught:
        lora.load(wide, saved)
    assert "Set r to" not in str(caught.value)
