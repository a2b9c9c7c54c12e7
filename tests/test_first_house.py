"""Files of the first house load in the second: adapters of every method, a run, a run cut off.

tests/fixtures/first_house was written by make.py in a checkout of commit 2f489b1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

import lora
from lora.finetune import cli
from lora.finetune.source import open_source
from lora.finetune.trained import reopen

FIXTURE = ROOT / "tests" / "fixtures" / "first_house"
OUTPUTS = json.loads((FIXTURE / "outputs.json").read_text(encoding="utf-8"))


def base() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_an_adapter_computes_what_it_did(name: str) -> None:
    model = base()
    lora.load(model, FIXTURE / "adapters" / name)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(7)), torch.tensor(OUTPUTS[name]))


def moved(folder: Path, name: str) -> Path:
    """A copy of a run, whose data is where it is now."""
    shutil.copy(FIXTURE / "data.jsonl", folder / "data.jsonl")
    run = Path(shutil.copytree(FIXTURE / name, folder / name))
    for config in run.rglob("config.toml"):
        text = config.read_text(encoding="utf-8")
        path = json.dumps(str(folder / "data.jsonl"))
        lines = [f"    {path}," if "data.jsonl" in line else line for line in text.split("\n")]
        config.write_text("\n".join(lines), encoding="utf-8", newline="\n")
        manifest = config.with_name("manifest.json")
        if manifest.exists():
            files = json.loads(manifest.read_text(encoding="utf-8"))
            digest = hashlib.sha256(config.read_bytes()).hexdigest()
            files["config.toml"] = [config.stat().st_size, digest]
            manifest.write_text(json.dumps(files), encoding="utf-8")
    return run


def test_a_run_is_scored_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = moved(tmp_path, "run")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert cli.main(["eval", str(run)]) == 0
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(scores["loss"]) == pytest.approx(summary["loss"], abs=1e-3)
    assert reopen(run).config.settings.target_modules == ("q_proj",)


def test_a_run_that_was_cut_off_is_resumed(tmp_path: Path) -> None:
    """To the adapter of the run that was not: they had the same flags."""
    run = moved(tmp_path, "cut")
    assert cli.main(["train", "--resume", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    whole = json.loads((FIXTURE / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert summary["step"] == whole["step"] == 4


def test_the_base_demo_lm_is_now_called_demo_lm_tiny(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moved(tmp_path, "run")
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for folder in (run, adapter):
        assert open_source(folder).config.base == "demo-lm-tiny"
    for flags in (["train", "--base", "demo-lm"], ["eval", str(run), "--base", "demo-lm"]):
        assert cli.main(flags) == 2
        assert "demo-lm is now called demo-lm-tiny. Pass --base" in capsys.readouterr().err
