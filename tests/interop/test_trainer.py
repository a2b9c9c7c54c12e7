"""transformers.Trainer takes an injected model as it is, and the callback leaves its adapter."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch
import transformers
from conftest import ROOT, distilbert, gpt2, llama, tokens
from torch import nn

import lora
from lora import nf4
from lora.errors import ConfigError, TargetError
from lora.finetune.quantized import packable
from lora.finetune.train import optimizer_groups
from lora.interop.trainer import AdapterCallback
from lora.inventory import trained_parameters

IDS = tokens(24)
ROWS = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] > 49)}
    for ids in IDS
]
CLASSIFIER = ("pre_classifier", "classifier")


def classifier(config: Any = None, packed: bool = False) -> nn.Module:
    model = distilbert(dropout=0.1, attention_dropout=0.0)
    if packed:
        nf4.quantize_layers(model, packable(model))
    lora.inject(model, config or lora.LoRAConfig(r=4, lora_dropout=0.1, modules_to_save=CLASSIFIER))
    return model


def trainer(
    model: nn.Module,
    folder: Path,
    data: Any = ROWS,
    shown: Any = None,
    optimizers: Any = (None, None),
    **given: Any,
) -> transformers.Trainer:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "seed": 3, "dataloader_pin_memory": False, **given,
    }  # fmt: skip
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=data,
        eval_dataset=shown or data,
        callbacks=[AdapterCallback()],
        optimizers=optimizers,
    )


def losses(run: transformers.Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # A parent's RANK or LOCAL_RANK would have accelerate look for other processes.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_it_learns_and_ours_and_peft_load_what_it_saved(tmp_path: Path) -> None:
    model = classifier()
    run = trainer(model, tmp_path, max_steps=60, save_strategy="steps", save_steps=30)
    run.train()
    found = losses(run)
    assert sum(found[-6:]) < 0.5 * sum(found[:6])
    assert run.evaluate()["eval_loss"] < 0.5 * found[0]
    ours = distilbert()
    lora.load(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers 5.23
        theirs = peft.PeftModel.from_pretrained(distilbert(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model))
    last = distilbert()
    lora.load(last, tmp_path / "checkpoint-60" / "adapter")
    assert torch.equal(logits(last), logits(model))
    half = distilbert()
    lora.load(half, tmp_path / "checkpoint-30" / "adapter")
    assert not torch.equal(logits(half), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "packed"),
    [
        (lora.LoRAConfig(r=4, lora_dropout=0.1, modules_to_save=CLASSIFIER), False),
        (lora.LoRAConfig(r=4, modules_to_save=CLASSIFIER), True),
        (lora.METHODS["dora"].Config(r=4, modules_to_save=CLASSIFIER), False),
        (lora.METHODS["vera"].Config(r=4, modules_to_save=CLASSIFIER), False),
        (
            lora.METHODS["adalora"].Config(
                init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, modules_to_save=CLASSIFIER
            ),
            False,
        ),
        (lora.METHODS["bitfit"].Config(), False),
        (lora.FullConfig(), False),
    ],
    ids=["lora", "qlora", "dora", "vera", "adalora", "bitfit", "full"],
)
def test_a_checkpoint_resumes_to_the_same_losses(tmp_path: Path, config: Any, packed: bool) -> None:
    whole = trainer(classifier(config, packed), tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    again = trainer(classifier(config, packed), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole)
    ends = [trained_parameters(run.model, "default") for run in (whole, again)]
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


def test_a_model_with_a_tied_head(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    runs = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        model = gpt2()
        lora.inject(model, lora.LoRAConfig(r=4, target_modules=("c_attn", "lm_head")))
        runs.append(trainer(model, tmp_path, rows, save_strategy="steps", save_steps=3))
        runs[-1].train(resume_from_checkpoint=resumed)
        assert model.lm_head.base_layer.weight is model.transformer.wte.weight
    assert losses(runs[0]) == losses(runs[1])


def test_the_best_one_is_left_at_the_end(tmp_path: Path) -> None:
    model = classifier()
    worse = [{**row, "labels": 1 - row["labels"]} for row in ROWS]  # the longer it learns
    run = trainer(
        model, tmp_path, shown=worse, max_steps=30, save_strategy="steps", save_steps=5,
        eval_strategy="steps", eval_steps=5, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-30"
    assert (best / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    ours = distilbert()
    lora.load(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = llama()
        lora.inject(model, lora.LoRAConfig(r=4))
        run = trainer(
            model, tmp_path, rows, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        run.train()
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_its_own_activation_checkpointing(tmp_path: Path, packed: bool) -> None:
    found = []
    for checkpointing in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        model = distilbert(dropout=0.0, attention_dropout=0.0)
        if packed:
            nf4.quantize_layers(model, packable(model))
        lora.inject(model, lora.LoRAConfig(r=4, modules_to_save=CLASSIFIER))
        run = trainer(model, tmp_path)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
            (enable or model.gradient_checkpointing_enable)(checkpointing)
        run.train()
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(found[2], rel=1e-4)


def test_the_penalty_of_a_method_is_in_its_gradients(tmp_path: Path) -> None:
    settings = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}
    ends = []
    for weight in (0.0, 5.0):
        config = lora.METHODS["adalora"].Config(orth_reg_weight=weight, **settings)
        model = classifier(config)
        trainer(model, tmp_path, max_steps=20).train()
        A = model.distilbert.transformer.layer[0].attention.q_lin.adapter("default").lora_A
        ends.append(torch.dist(A @ A.T, torch.eye(4)).item())
    assert ends[1] < 0.9 * ends[0]


def test_what_trainer_cannot_do_is_refused(tmp_path: Path) -> None:
    plus = lora.LoRAConfig(r=4, loraplus_lr_ratio=16.0, modules_to_save=CLASSIFIER)
    with pytest.raises(ConfigError, match="several learning rates, Trainer's optimizer has one"):
        trainer(classifier(plus), tmp_path).train()
    model = classifier(plus)
    own = torch.optim.AdamW(optimizer_groups(model, 1e-2, 0.0))
    trainer(model, tmp_path, optimizers=(own, None), warmup_steps=2).train()
    few = lora.METHODS["adalora"].Config(init_r=4, target_r=2, tinit=5, tfinal=5)
    with pytest.raises(ConfigError, match="adalora has no steps to allocate ranks in"):
        trainer(classifier(few), tmp_path).train()


def test_a_dead_adapter_is_named_before_the_first_update(tmp_path: Path) -> None:
    model = classifier()
    for block in model.distilbert.transformer.layer:  # one alone may be a block that is left out
        layer = block.attention.q_lin
        layer.forward = layer.base_layer.forward
    before = {name: p.clone() for name, p in trained_parameters(model, "default").items()}
    with pytest.raises(TargetError, match="have no gradient.*q_lin"):
        trainer(model, tmp_path).train()
    for name, parameter in trained_parameters(model, "default").items():
        assert torch.equal(parameter, before[name])


def test_a_checkpoint_is_the_adapters_size_and_the_model_is_plain_again(tmp_path: Path) -> None:
    model = classifier()
    before = set(model.state_dict())
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=6)
    run.train()
    with safetensors.safe_open(tmp_path / "checkpoint-6" / "model.safetensors", "pt") as file:
        kept = set(file.keys())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == trained
    assert set(model.state_dict()) == before
    # Cut off in the middle its hooks stay, and have nothing to leave out of a plain model.
    cut = trainer(classifier(), tmp_path)
    lora.merge(cut.model)
    lora.eject(cut.model)
    assert set(cut.model.state_dict()) == set(distilbert().state_dict())


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "examples/trainer.py", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert "A warm and funny film. {" in found
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_import_lora_leaves_trainer_alone() -> None:
    code = "import lora, sys; lora.LoRAConfig; assert 'lora.interop.trainer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_trainer_without_the_callback_saves_nothing_that_does_not_load(tmp_path: Path) -> None:
    model = classifier()
    run = trainer(model, tmp_path)
    run.train()
    with pytest.raises(lora.CheckpointError, match="AdapterCallback"):  # which is done by now
        run.save_model(str(tmp_path / "late"))
    plain = transformers.Trainer(model=classifier(), args=run.args, train_dataset=ROWS)
    with pytest.raises(lora.CheckpointError, match=r"callbacks=\[lora\.AdapterCallback"):
        plain.save_model(str(tmp_path / "plain"))
    assert not list(tmp_path.rglob("model.safetensors"))
