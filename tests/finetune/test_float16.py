"""Training in float16: a loss scale, steps that are skipped, and a resume that keeps both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import distilbert, save_distilbert
from test_cli import data, lora
from test_state import METHODS, bits, go
from test_train import encoded
from torch import nn

import lora as library
from lora.errors import ModelError, TrainingError
from lora.finetune import state
from lora.finetune.memory import set_dtype
from lora.finetune.record import NOTHING, Step
from lora.finetune.state import Training
from lora.finetune.train import Hyperparameters, begin, fit


def training(method: str = "lora", dtype: str = "float16", scale: float | None = None) -> Training:
    model = distilbert(dropout=0.1)
    library.inject(model, METHODS[method], seed=3)
    set_dtype(model, dtype)
    result = begin(model, 1e-2, seed=4)
    if scale is not None:
        result.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return result


def steps_of(training: Training, epochs: int = 3) -> list[Step]:
    settings = Hyperparameters(epochs, 8, micro_batch_size=3, seed=4)
    return list(fit(training, encoded(), "classification", settings))


def test_it_learns_as_in_float32() -> None:
    half, whole = training(), training(dtype="float32")
    losses = [[step.loss for step in steps_of(each)] for each in (half, whole)]
    assert whole.scaler is None
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    linear = half.model.distilbert.transformer.layer[0].attention.q_lin
    assert linear.base_layer.weight.dtype == torch.float16
    trained = [p for p in half.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_step_that_overflows_is_skipped(method: str) -> None:
    """Weights, moments and what a method remembers are those before; the scale is halved."""
    one = training(method, scale=2.0**30)
    before = bits(one.model)
    settings = Hyperparameters(3, 8, seed=4)
    steps = fit(one, encoded(), "classification", settings)
    first = next(steps)
    assert (first.skipped, first.gradient_norm) == (True, 0.0)
    assert math.isfinite(first.loss)
    assert bits(one.model) == before
    assert not one.optimizer.state
    assert one.scaler is not None
    assert one.scaler.get_scale() == 2.0**29
    rest = list(steps)
    assert rest[0].skipped
    assert not rest[-1].skipped
    assert all(tensor.isfinite().all() for tensor in state.values(one.model).values())
    assert bits(one.model) != before


def test_gradients_that_no_scale_helps_end_the_training() -> None:
    one = training(scale=4.0)
    first = next(p for p in one.model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: gradient * torch.inf)
    settings = Hyperparameters(3, 8, seed=4)
    steps = fit(one, encoded(), "classification", settings)
    assert [next(steps).skipped, next(steps).skipped] == [True, True]
    with pytest.raises(TrainingError, match=r"step 3 of 15 .* gradient norm (nan|inf)"):
        next(steps)


def test_a_weight_past_float16_is_named() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = 7e4
    with pytest.raises(
        ModelError, match="--dtype float16: 0 has weights up to 7e[+]04, past 65,504"
    ):
        set_dtype(model, "float16")


def test_it_resumes_bit_for_bit_with_its_scale(tmp_path: Path) -> None:
    whole = training(scale=2.0**28)
    losses = go(whole)
    cut = training(scale=2.0**28)
    assert go(cut, 4) == losses[:4]
    path = state.save_training(cut, tmp_path, b"", NOTHING)
    again = training()
    state.restore_training(again, path)
    assert again.scaler is not None
    assert cut.scaler is not None
    assert again.scaler.state_dict() == cut.scaler.state_dict()
    assert go(again) == losses[4:]
    assert bits(again.model) == bits(whole.model)


def test_a_run_records_the_steps_it_skipped(tmp_path: Path) -> None:
    base = str(save_distilbert(tmp_path / "base"))
    run = tmp_path / "run"
    flags = ("--base", base, "--data", data(tmp_path / "data"), "--run-dir", run, "--r", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.amp.GradScaler.__init__, "__defaults__", ("cpu", 2.0**30, 2.0, 0.5, 2000, True)
        )
        assert lora("train", *flags, "--dtype", "float16", "--epochs", 10) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [row.get("skipped", False) for row in rows if row["kind"] == "step"]
    assert skipped[0]
    assert not skipped[-1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dtype"] == "float16"
    assert lora("eval", run) == 0
