"""A training that was cut off goes on bit for bit; a checkpoint is there whole or not at all."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import distilbert
from test_train import encoded
from torch import nn

import lora
from lora.errors import CheckpointError
from lora.finetune import state
from lora.finetune.record import NOTHING
from lora.finetune.state import Training
from lora.finetune.train import Hyperparameters, begin, fit

SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "micro_batch_size": 3}

METHODS: dict[str, lora.settings.MethodConfig] = {
    "lora": lora.LoRAConfig(r=2, lora_dropout=0.2, loraplus_lr_ratio=4.0),
    "pissa": lora.LoRAConfig(r=2, init_lora_weights="pissa"),
    "dora": lora.DoRAConfig(r=2, lora_dropout=0.2),
    "adalora": lora.AdaLoRAConfig(init_r=3, target_r=1, tinit=2, tfinal=2),
    "vera": lora.VeRAConfig(r=4),
    "bitfit": lora.BitFitConfig(),
    "full": lora.FullConfig(),
}


def training(method: str = "lora", **model: Any) -> Training:
    found = distilbert(dropout=0.1, **model)
    lora.inject(found, METHODS[method], seed=3)
    return begin(found, 1e-2, weight_decay=0.1, seed=4)


def go(training: Training, until: int | None = None) -> list[float]:
    losses = []
    for step in fit(training, encoded(), "classification", Hyperparameters(seed=4, **SETTINGS)):
        losses.append(step.loss)
        if step.step == until:
            break
    return losses


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in state.values(model).items()}


@functools.cache
def whole_training(method: str) -> tuple[list[float], Training]:
    """An uninterrupted training, done once for all tests that compare with it."""
    training_ = training(method)
    return go(training_), training_


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_training_goes_on_bit_for_bit(method: str, at: int, tmp_path: Path) -> None:
    """From the middle of an epoch, into a model that was made anew, whatever was drawn between."""
    losses, whole = whole_training(method)
    cut = training(method)
    assert go(cut, at) == losses[:at]
    path = state.save_training(cut, tmp_path, b"", (7, "f"))
    on = training(method)
    torch.rand(5)
    assert state.restore_training(on, path)["recorded"] == (7, "f")
    assert go(on) == losses[at:]
    assert bits(on.model) == bits(whole.model)
    if method == "adalora":
        patterns = [
            [adapter.pattern for adapter in state.adapters(one.model).values()]  # type: ignore[attr-defined]
            for one in (on, whole)
        ]
        assert patterns[0] == patterns[1]
        assert any(None not in p and False in p for p in [patterns[0][0] or []])
    saved = [lora.save(one.model, tmp_path / name) for one, name in ((on, "a"), (whole, "b"))]
    files = [(one / "adapter_model.safetensors").read_bytes() for one in saved]
    assert files[0] == files[1]


def test_what_the_optimizer_keeps_follows_its_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step too: fused AdamW refuses a step that is on another device."""
    one = training()
    go(one, 1)
    path = state.save_training(one, tmp_path, b"", NOTHING)
    monkeypatch.setattr(state, "same_base", lambda *_: True)  # the meta device has no values
    model = one.model.to("meta")
    trained = [p for p in model.parameters() if p.requires_grad]
    moved = Training(model, torch.optim.AdamW(trained), 1e-2)
    state.restore_training(moved, path)
    kept = [moment for p in trained for moment in moved.optimizer.state[p].values()]
    assert len(kept) == 3 * len(trained)
    assert all(moment.is_meta for moment in kept)


def test_running_statistics_and_random_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = lora.LoRAConfig(r=1, target_modules="all-linear", modules_to_save=("1",))
    lora.inject(model, config)
    one = begin(model, 1e-3)
    model(torch.randn(8, 4))
    path = state.save_training(one, tmp_path, b"", NOTHING)
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    before = bits(model)
    model(torch.randn(8, 4))
    assert bits(model) != before
    state.restore_training(one, path)
    assert bits(model) == before
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn


def saved(folder: Path, *steps: int) -> Training:
    one = training()
    for step in steps:
        one.step = step
        state.save_training(one, folder, b"", NOTHING)
    return one


def test_the_adapter_of_a_checkpoint_loads(tmp_path: Path) -> None:
    one = saved(tmp_path, 3)
    other = distilbert(dropout=0.1)
    lora.load(other, tmp_path / "step-00000003" / "adapter")
    ids = torch.arange(5)[None]
    assert torch.equal(other.eval()(ids).logits, one.model.eval()(ids).logits)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "training.safetensors").write_bytes(b""),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "adapter" / "adapter_model.safetensors").unlink(),
        lambda path: (path / "training.json").write_text("{}"),
        lambda path: (path / "more").write_text(""),
    ],
    ids=["empty", "no manifest", "no JSON", "missing", "another", "more"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(harm: Any, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    harm(tmp_path / "step-00000002")
    (tmp_path / ".step-00000003.abcd").mkdir()
    found, said = state.find(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert "step-00000003" in said[0]
    assert "step-00000002 is damaged" in said[1]
    state.prune(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert state.find(tmp_path) == (found, [])
    assert state.find(tmp_path / "nowhere") == (None, [])


def test_the_checkpoint_of_another_model_leaves_this_one_alone(tmp_path: Path) -> None:
    path = state.save_training(training(), tmp_path, b"", NOTHING)
    for other, words in (
        (training("dora"), "does not fit the model"),
        (training(initializer_range=0.1), "is of another base"),
        (training("full"), "is of another base"),
    ):
        before = bits(other.model)
        with pytest.raises(CheckpointError, match=words):
            state.restore_training(other, path)
        assert bits(other.model) == before
        assert other.step == 0


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_save_that_fails_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the disk gives up, the checkpoint before is whole and nothing else is left."""
    one = saved(tmp_path, 1)
    before = state.find(tmp_path)
    one.step = 2
    owner, real = (os, os.fsync) if call == "fsync" else (Path, Path.rename)
    for failing in range(40):
        calls = iter(range(1000))

        def fail(*args: Any, calls: Any = calls, failing: int = failing) -> Any:
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(owner, call, fail)
        try:
            state.save_training(one, tmp_path, b"", NOTHING)
            break
        except CheckpointError as error:
            assert "cannot be written: No space left" in str(error)  # noqa: PT017
        monkeypatch.setattr(owner, call, real)
        if state.steps(tmp_path) == [1, 2]:  # the last call, which makes its name last
            break
        assert state.find(tmp_path) == before
        assert len(list(tmp_path.iterdir())) == 1
    assert state.find(tmp_path) == (tmp_path / "step-00000002", [])
    assert failing > (5 if call == "fsync" else 0)
    assert json.loads((tmp_path / "step-00000002" / "training.json").read_text())["step"] == 2
