"""loralib's checkpoints against loralib itself, read by peft and by us."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import loralib
import peft
import pytest
import torch
from conftest import distilbert, gpt2, tokens
from torch import nn

import lora
from lora.cli import main

ENABLED = [True, False, True]


def put(model: nn.Module, end: str, make) -> None:
    """loralib's layer in the place of each of that name, with its weights, its update moved."""
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
    """With weights large enough for what one layer adds to show."""
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
    """peft and we compute from the folder what loralib does."""
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
    said = capsys.readouterr().out
    assert said.count("MergedLinear") == 2
    assert "(96, 6)" in said
    check(theirs, gpt2, tmp_path / "gpt2")
    assert main(["convert", str(path), *flags]) == 2
    assert "is not written over" in capsys.readouterr().err


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_distilbert_with_ranks_of_its_own_and_trained_biases(bias: str, tmp_path: Path) -> None:
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


def test_a_prefix_comes_off(tmp_path: Path) -> None:
    theirs = theirs_distilbert({"q_lin": 3})
    state = {f"module.{k}": t for k, t in loralib.lora_state_dict(theirs).items()}
    torch.save(state, tmp_path / "a.pt")
    flags = ["--lora-alpha", "7", "--prefix", "module.", "--output", str(tmp_path / "out")]
    assert main(["convert", str(tmp_path / "a.pt"), *flags]) == 0
    check(theirs, bert, tmp_path / "out")


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "flags", "match"),
    [
        (Evil(), [], "cannot be read as tensors"),
        (b"nothing", [], "cannot be read as tensors"),
        (None, [], "No such file"),
        ([1, 2], [], "holds list, not tensors by name"),
        ({}, [], "not tensors by name"),
        ({"a.lora_A": 3}, [], "not tensors by name"),
        ({"a.weight": torch.ones(2)}, [], "a.weight, 1 keys .*not of LoRA"),
        ({"a.bias": torch.ones(2)}, [], "no lora_A and lora_B"),
        ({"a.lora_A": torch.ones(2, 4)}, [], "a has lora_A alone"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, [], "Set --merged a=1,0,1"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "a=1,1,1"],
         "not of 3 blocks"),
        ({"a.lora_A": torch.ones(4, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "a"],
         "must be LAYER=1,0,1"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--merged", "b=1,0"],
         "--merged 'b' is no layer"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--embeddings", "b"],
         "--embeddings 'b' is no layer"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2)}, ["--prefix", "module."],
         "does not begin with --prefix"),
        ({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(8, 2) / 0}, [], "no finite"),
        ({"a.lora_A": torch.ones(2), "a.lora_B": torch.ones(8, 2)}, [], "no finite matrices"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_of_loralib_is_refused(
    content, flags, match: str, tmp_path: Path, capsys
) -> None:
    import re

    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(["convert", str(path), "--lora-alpha", "8", *flags]) == 2
    out, err = capsys.readouterr()
    assert re.search(match, err), err
    assert "run" not in out
    assert not (tmp_path / "a").exists()


def test_alpha_is_asked_for(tmp_path: Path, capsys) -> None:
    path = save(theirs_distilbert({"q_lin": 3}), tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        main(["convert", str(path)])
    assert "--lora-alpha" in capsys.readouterr().err
    assert main(["convert", str(path), "--lora-alpha", "-1"]) == 2
    assert "lora_alpha must be a positive number" in capsys.readouterr().err
