"""loralib's checkpoints against loralib itself, read by peft and by us."""

from __future__ import annotations

import io
import json
import random
import re
import warnings
import zipfile
from pathlib import Path

import loralib
import peft
import pytest
import safetensors.torch
import torch
from conftest import distilbert, gpt2, tokens
from torch import nn

import lora
from lora.finetune.cli import main
from lora.interop.loralib import ConvertConfig, _converted_layers, convert

ENABLED = [True, False, True]
SHARED = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}


def put(model: nn.Module, end: str, make) -> None:
    """Replaces each layer of that name by loralib's, with the same weights and a random update."""
    for name, module in list(model.named_modules()):
        if name.endswith("." + end):
            parent, _, leaf = name.rpartition(".")
            new = make(module)
            with torch.no_grad():
                new.weight.copy_(module.weight)
                if getattr(module, "bias", None) is not None:
                    new.bias.copy_(module.bias)
                generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
                for update in (new.lora_A, new.lora_B):
                    update.copy_(0.3 * torch.randn(update.shape, generator=generator))
            setattr(model.get_submodule(parent), leaf, new)


def theirs_gpt2() -> nn.Module:
    model = gpt2()
    put(
        model,
        "c_attn",
        lambda m: loralib.MergedLinear(
            32, 96, r=3, lora_alpha=7, enable_lora=ENABLED, fan_in_fan_out=True, merge_weights=False
        ),
    )
    put(
        model,
        "c_fc",
        lambda m: loralib.Linear(
            32, 128, r=3, lora_alpha=7, fan_in_fan_out=True, merge_weights=False
        ),
    )
    put(model, "wpe", lambda m: loralib.Embedding(64, 32, r=2, lora_alpha=7, merge_weights=False))
    return model.eval()  # fmt: skip


def bert() -> nn.Module:
    """Weights large enough that the update of one layer changes the logits."""
    return distilbert(initializer_range=0.2)


def theirs_distilbert(ranks: dict[str, int]) -> nn.Module:
    model = bert()
    for end, r in ranks.items():
        put(
            model,
            end,
            lambda m, r=r: loralib.Linear(
                m.in_features, m.out_features, r=r, lora_alpha=7, merge_weights=False
            ),
        )
    return model.eval()  # fmt: skip


def save(model: nn.Module, path: Path, bias: str = "none", wrap: bool = False) -> Path:
    state = loralib.lora_state_dict(model, bias=bias)
    torch.save({"model_state_dict": state} if wrap else state, path)
    return path


@torch.no_grad()
def check(theirs: nn.Module, build, folder: Path) -> None:
    """PEFT and our library compute the same logits from the folder as loralib."""
    wanted = theirs(tokens()).logits
    bound = 1e-5 * max(1.0, float(wanted.abs().max()))
    assert float((build()(tokens()).logits - wanted).abs().max()) > 100 * bound
    ours = build()
    lora.load(ours, folder)
    assert float((ours.eval()(tokens()).logits - wanted).abs().max()) < bound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        read = peft.PeftModel.from_pretrained(build(), folder).eval()
    assert float((read(tokens()).logits - wanted).abs().max()) < bound


@pytest.mark.parametrize("wrap", [False, True])
def test_gpt2_with_a_merged_projection_and_an_embedding(wrap: bool, tmp_path: Path, capsys) -> None:
    theirs = theirs_gpt2()
    path = save(theirs, tmp_path / "gpt2.pt", wrap=wrap)
    flags = ["--lora-alpha", "7", "--merged", "c_attn=1,0,1", "--embeddings", "wpe"]
    assert main(["convert", str(path), *flags, "--fan-in-fan-out", "--dry-run"]) == 0
    assert not (tmp_path / "gpt2").exists()
    assert "would be written" in capsys.readouterr().out
    assert main(["convert", str(path), *flags, "--fan-in-fan-out"]) == 0
    table = capsys.readouterr().out
    assert table.count("MergedLinear") == 2
    assert "(96, 6)" in table
    check(theirs, gpt2, tmp_path / "gpt2")
    assert main(["convert", str(path), *flags]) == 2
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_distilbert_with_several_ranks_and_trained_biases(bias: str, tmp_path: Path) -> None:
    theirs = theirs_distilbert({"q_lin": 3, "v_lin": 3, "lin2": 2})
    if bias != "none":
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                adapted = name.endswith(("q_lin.bias", "v_lin.bias", "lin2.bias"))
                if name.endswith("bias") and (adapted or bias == "all"):
                    parameter.add_(0.2)
    path = save(theirs, tmp_path / "a.pt", bias=bias)
    assert main(["convert", str(path), "--lora-alpha", "7"]) == 0
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["r"], settings["bias"]) == (3, bias)
    assert len(settings["rank_pattern"]) == 2
    check(theirs, bert, tmp_path / "a")


@pytest.mark.parametrize("blocks", ["1,0,1", "0,1,0", "1,1,0,0", "1,1,1"])
def test_a_merged_projection_equals_loralibs(blocks: str, tmp_path: Path) -> None:
    enabled = [block == "1" for block in blocks.split(",")]
    layer = loralib.MergedLinear(8, 12, r=2, lora_alpha=7, enable_lora=enabled)
    nn.init.normal_(layer.lora_B)
    config = ConvertConfig(checkpoint=tmp_path, lora_alpha=7, merged=(f"a={blocks}",))
    state = {"a.lora_A": layer.lora_A, "a.lora_B": layer.lora_B}
    (ours,) = _converted_layers(state, config).values()
    assert ours.r == 2 * sum(enabled)
    wanted = layer.scaling * layer.merge_AB()
    assert torch.allclose(ours.alpha / ours.r * (ours.B @ ours.A), wanted, atol=1e-6)


def test_a_training_checkpoint_gives_its_model(tmp_path: Path) -> None:
    theirs = theirs_distilbert({"q_lin": 3})
    state = loralib.lora_state_dict(theirs)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "--lora-alpha", "7"]) == 0
    check(theirs, bert, tmp_path / "a")


@pytest.mark.parametrize("prefix", ["module", "module."])
def test_a_prefix_comes_off(prefix: str, tmp_path: Path, capsys) -> None:
    theirs = theirs_distilbert({"q_lin": 3})
    state = {f"module.{k}": t for k, t in loralib.lora_state_dict(theirs).items()}
    torch.save(state, tmp_path / "a.pt")
    flags = ["--lora-alpha", "7", "--output", str(tmp_path / "out")]
    assert main(["convert", str(tmp_path / "a.pt"), *flags]) == 2
    assert "Set --prefix module., or --prefix '' if" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a.pt"), *flags, "--prefix", "", "--dry-run"]) == 0
    assert main(["convert", str(tmp_path / "a.pt"), *flags, "--prefix", prefix]) == 0
    check(theirs, bert, tmp_path / "out")


PAIR = {"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "flags", "match"),
    [
        (Evil(), [], "it contains (builtins.)?print, which is not a tensor"),
        (nn.Linear(2, 2), [], "contains torch.nn.modules.linear.Linear, which is not a"),
        (b"nothing", [], "is damaged, or torch.save did not write it"),
        (b"", [], "is damaged, or torch.save did not write it"),
        (None, [], "No such file"),
        ([1, 2], [], "contains a list, not tensors by name"),
        ({}, [], "not tensors by name"),
        ({"a.lora_A": 3}, [], "not tensors by name"),
        ({"a.weight": torch.ones(2)}, [], "a.weight: 1 of 1 keys are not LAYER.lora_A"),
        ({"a.bias": torch.ones(2)}, [], "no lora_A and lora_B"),
        ({"a.lora_A": torch.ones(2, 4)}, [], "a has only lora_A"),
        ({"model": PAIR, "ema": PAIR}, [], "contains several models: model, ema"),
        (PAIR | {"a.conv.bias": torch.ones(4)}, [], "a is a loralib.ConvLoRA"),
        (PAIR | {"a.bias": torch.ones(3)}, [], r"of shape \(8,\), found float32 \(3,\)"),
        (PAIR | {"b.bias": torch.ones(1, 1, 4, 4).bool()}, [], "b.bias .* one number per output"),
        (PAIR | {"b.bias": torch.ones(3) / 0}, [], "b.bias must be a finite tensor"),
        (PAIR, ["--embeddings", "a", "--merged", "a=1,1"], "a matches --embeddings a and --me"),
        (PAIR, ["--merged", "a=1,1", "a=1,0"], "--merged a is given twice"),
        ({"a.lora_A": torch.ones(3, 4), "a.lora_B": torch.ones(8, 2)}, [], "no layer of loralib"),
        ({k: t.to_sparse() for k, t in PAIR.items()}, [], "must be finite, dense"),
        ({k: t.to(torch.float8_e4m3fn) for k, t in PAIR.items()}, [], "found float8_e4m3fn"),
        ({k: t.to("meta") for k, t in PAIR.items()}, [], "must be finite, dense"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, [], "Set --merged a=1,0,1"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "a=1,1,1"],
         "do not have 3 blocks"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "a"],
         "must be LAYER=1,0,1"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "b=1,0"],
         "--merged 'b' matches no layer"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--embeddings", "b"],
         "--embeddings 'b' matches no layer"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--prefix", "module."],
         "does not begin with --prefix"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2) / 0}, [], "must be finite"),
        ({"a.lora_A": torch.ones(2), "a.lora_B": torch.ones(8, 2)}, [], "finite, dense matrices"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_converted_is_an_error(
    content, flags, match: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(["convert", str(path), "--lora-alpha", "8", *flags]) == 2
    out, err = capsys.readouterr()
    assert re.search(match, err), err
    assert out == ""
    assert "weights_only" not in err
    assert not (tmp_path / "a").exists()


def test_alpha_is_asked_for(tmp_path: Path, capsys) -> None:
    path = save(theirs_distilbert({"q_lin": 3}), tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        main(["convert", str(path)])
    assert "--lora-alpha" in capsys.readouterr().err
    assert main(["convert", str(path), "--lora-alpha", "-1"]) == 2
    assert "--lora-alpha must be a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_an_error_whatever_is_damaged(
    zipped: bool, tmp_path: Path, capsys
) -> None:
    payload = io.BytesIO()
    torch.save(PAIR, payload, _use_new_zipfile_serialization=zipped)
    draw, path = random.Random(0), tmp_path / "a.pt"
    codes = set()
    for number in range(120):
        damaged = bytearray(payload.getvalue())
        if number % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(min(500, len(damaged)))] = draw.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what it finds in the file
            codes.add(main(["convert", str(path), "--lora-alpha", "8", "--dry-run"]))
    assert codes <= {0, 2}
    assert 2 in codes


@pytest.mark.parametrize("file", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_no_file_is_written_over(file: str, tmp_path: Path, capsys) -> None:
    torch.save(PAIR, tmp_path / "a.pt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / file).write_text("mine")
    assert main(["convert", str(tmp_path / "a.pt"), "--lora-alpha", "8"]) == 2
    error = capsys.readouterr().err
    assert f"already contains {file}, which would be overwritten. Pass another --output" in error
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_folders_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    torch.save(PAIR, tmp_path / "a.pt")
    (tmp_path / "file").write_text("mine")
    flags = ["--lora-alpha", "8", "--output", str(tmp_path / "file")]
    assert main(["convert", str(tmp_path / "a.pt"), *flags]) == 2
    assert "cannot be written: File exists. Pass another --output" in capsys.readouterr().err
    for folder in (".", "/"):
        assert main(["convert", folder, "--lora-alpha", "8"]) == 2
        assert "would overwrite the checkpoint" in capsys.readouterr().err


def test_a_convolution_without_biases_fails_when_it_is_loaded(tmp_path: Path) -> None:
    """Its file looks like a Linear's."""
    state = loralib.lora_state_dict(nn.Sequential(loralib.Conv2d(3, 4, 3, r=2)))
    torch.save(state, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "--lora-alpha", "8"]) == 0
    with pytest.raises(lora.LoraError, match="Conv2d"):
        lora.load(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "a")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "a")


def test_elements_that_share_memory_are_no_checkpoint(tmp_path: Path) -> None:
    """1.5 KB that state 8 TB: the check for finite values would allocate them."""
    wide = torch.ones(1, 1).expand(2**20, 2**20)
    torch.save({"l.lora_A": wide, "l.lora_B": wide.T}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2000
    with pytest.raises(lora.CheckpointError, match="8,796,093,022,208 bytes.*share memory"):
        convert(ConvertConfig(checkpoint=tmp_path / "a.pt", lora_alpha=8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_layers_that_are_tied_are_converted(tmp_path: Path) -> None:
    tied = {f"{name}.{key}": tensor for name in "lm" for key, tensor in SHARED.items()}
    torch.save(tied, tmp_path / "a.pt")
    folder, _ = convert(ConvertConfig(checkpoint=tmp_path / "a.pt", lora_alpha=8))
    assert len(safetensors.torch.load_file(folder / "adapter_model.safetensors")) == 4


def test_compressed_records_are_refused_unread(tmp_path: Path) -> None:
    whole, packed = tmp_path / "whole.pt", tmp_path / "packed.pt"
    torch.save({"l.lora_A": torch.zeros(4, 2**20), "l.lora_B": torch.zeros(4, 4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < whole.stat().st_size / 100
    with pytest.raises(lora.CheckpointError, match="its records are compressed"):
        convert(ConvertConfig(checkpoint=packed, lora_alpha=8))
    assert torch.load(packed, weights_only=True)["l.lora_A"].shape == (4, 2**20)  # torch would


def test_records_larger_than_the_archive_are_refused(tmp_path: Path) -> None:
    """Several names for the same bytes would each be read."""
    path = tmp_path / "a.pt"
    torch.save({f"l.{key}": tensor for key, tensor in SHARED.items()}, path)
    payload = bytearray(path.read_bytes())
    at = payload.index(b"PK\x01\x02")  # the first record's sizes in the directory
    payload[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(payload)
    with pytest.raises(lora.CheckpointError, match="records are larger than the file"):
        convert(ConvertConfig(checkpoint=path, lora_alpha=8))
