"""The dry run against the run: what it counts, what it takes, and that it reads no weight."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import distilbert, save_distilbert, tokens
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lora.finetune.run
from lora.errors import ConfigError, LoraError, ModelError, TargetError
from lora.finetune.config import from_table
from lora.finetune.estimate import Estimate, Memory
from lora.finetune.ledger import Ledger
from lora.finetune.models import load_skeleton
from lora.finetune.plan import plan
from lora.finetune.train import Hyperparameters, begin, fit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of masked tokens."""
    return save_distilbert(tmp_path_factory.mktemp("base"), lm_head=True)


@pytest.fixture(scope="module")
def bare(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without its weights."""
    folder = tmp_path_factory.mktemp("bare")
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def asked(base: Path, method: str = "lora", **more: Any) -> Any:
    table = {"base": str(base), "epochs": 2, "limit": 40, "dtype": "float32"}
    return from_table(table | more, method)


def one(base: Path, method: str = "lora", **more: Any) -> Memory:
    return plan(asked(base, method, **more)).memory[0]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", {"r": 3, "lora_dropout": 0.1}),
        ("lora", {"init_lora_weights": "eva"}),
        ("lora", {"init_lora_weights": "loftq", "quantize": "nf4"}),
        # Like loftq above and vera below, in what a run and a plan count.
        pytest.param("qlora", {"init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        pytest.param("dora", {}, marks=pytest.mark.slow),
        ("bitfit", {}),
        ("full", {}),
        ("vera", {}),
    ],
)
def test_it_counts_what_the_run_counts(
    base: Path, bare: Path, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    found = plan(asked(bare, method, **more))
    summary = lora.finetune.run.run(asked(base, method, run_dir=tmp_path / "run", **more))
    assert found.report.trainable == summary["trainable"]
    assert found.report.adapter_parameters == summary["adapter_parameters"]
    assert found.report.total == summary["parameters"]
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [row for row in rows if row["kind"] == "step"]
    assert found.epochs * found.steps_per_epoch == len(steps) == steps[0]["steps"]
    assert found.tokens == pytest.approx(sum(s["tokens"] for s in steps) / len(steps))
    positions = [s["tokens"] / (1 - s["padding"]) for s in steps]
    assert found.largest[0] * found.largest[1] == pytest.approx(max(positions))
    assert found.padding == pytest.approx(1 - sum(s["tokens"] for s in steps) / sum(positions))


@pytest.mark.parametrize("method", ["lora", "full", "qlora", "bitfit"])
def test_it_counts_the_bytes_that_torchs_allocator_gives_out(bare: Path, method: str) -> None:
    """The peak of a whole step, above what lives between the steps."""
    # Truncated to one length, so that the batch with the most positions needs the most memory.
    config = asked(bare, method, max_length=24, **({"r": 4} if method == "lora" else {}))
    found = plan(config)
    corpus = lora.finetune.run.read_corpus(config)
    real = load_base_of(bare, config.quantize)
    config, _ = lora.finetune.assemble.resolve(config, corpus, real, torch.device("cpu"))
    lora.inject(real.model, config.settings)
    rows, longest, *_ = found.largest
    offsets = torch.arange(rows + 1) * longest
    fields = {
        n: torch.ones(rows * longest, dtype=torch.int32) for n in ("input_ids", "attention_mask")
    }
    fields["attention_mask"][-1] = 0
    data = lora.finetune.data.tokens.Encoded(
        fields, offsets, torch.zeros(rows, dtype=torch.long), 0
    )
    steps = fit(begin(real.model, 1e-3), data, "classification", Hyperparameters(2, rows))
    next(steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        next(steps)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    counted = found.memory[0].training
    within = sum(counted.get(name, 0) for name in ("activations", "logits", "gradients"))
    assert within == pytest.approx(most, rel=0.03)


def load_base_of(folder: Path, quantize: str) -> Any:
    """The folder's model with random weights, as load_base holds it."""
    from lora import nf4
    from lora.finetune.quantized import packable

    found = load_skeleton(str(folder), 2, "classification", device="cpu")
    if quantize == "nf4":
        nf4.quantize_layers(found.model, packable(found.model))
    return found


@pytest.mark.slow
def test_the_estimate_grows_with_what_costs_memory(bare: Path) -> None:
    small = one(bare)
    assert one(bare, batch_size=32).training["activations"] > 1.5 * small.training["activations"]
    assert one(bare, r=64).training["trained"] > small.training["trained"]
    assert one(bare, "qlora").training["base"] < small.training["base"] + small.mapped
    full = one(bare, "full")
    assert full.training["optimiser"] == pytest.approx(2 * full.training["trained"], rel=0.01)
    assert full.saving["file"] == 2 * full.training["trained"]


def test_pieces_checkpoints_and_devices_lower_it(bare: Path) -> None:
    config = asked(bare, limit=64, batch_size=32)
    (whole,) = plan(config).memory
    (pieces,) = plan(dataclasses.replace(config, micro_batch_size=8)).memory
    assert pieces.rows == 8
    assert pieces.training["activations"] < 0.4 * whole.training["activations"]
    (again,) = plan(dataclasses.replace(config, activation_checkpointing=True)).memory
    assert again.training["activations"] < whole.training["activations"]
    alone, divided, sharded = plan(config, devices=4).memory
    assert dataclasses.replace(alone, process=0) == dataclasses.replace(whole, process=0)
    assert (divided.rows, divided.devices, divided.sharded) == (8, 4, False)
    assert divided.training["activations"] < 0.4 * whole.training["activations"]
    held = divided.training["base"] + divided.mapped
    assert held / 4 < sharded.training["base"] < held


def test_nothing_is_written_and_no_value_stays_behind(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan(asked(bare, "qlora"))
    assert list(tmp_path.iterdir()) == []
    W = torch.randn(64, 64)  # what NF4 caches is of values
    back = lora.nf4.dequantize(lora.nf4.quantize(W, double_quant=True))
    assert float((back - W).abs().max()) < 1


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        ({"target_modules": ("nothing",)}, TargetError, "no layer matches"),
        ({"max_length": 2}, ConfigError, "max_length must leave room"),
        ({"max_length": 600}, ModelError, "positions"),
        ({"init_lora_weights": "loftq"}, ConfigError, "--quantize nf4"),
        ({"r": 10**9}, ConfigError, "Lower --r|the machine has"),
        ({"base": "./nowhere"}, ModelError, "no such folder"),
    ],
)
def test_what_train_refuses_it_refuses(
    bare: Path, more: dict[str, Any], kind: type[LoraError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        plan(asked(**({"base": bare} | more)))


def test_devices_are_a_whole_number(bare: Path) -> None:
    with pytest.raises(ConfigError, match="nproc"):
        plan(asked(bare), devices=0)


def test_what_it_says(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Estimate = plan(asked(bare), devices=2)
    said = str(found)
    for part in (
        "lora: ",
        "q_lin",
        "steps   ",
        "padding",
        "time    at least ",
        "one device",
        "2 devices, base sharded",
    ):
        assert part in said
    assert said.count("fits, the machine has") == 3
    assert "dtype: " not in said  # it was given
    monkeypatch.setenv("LORA_BFLOAT16", "1")
    chosen = str(plan(dataclasses.replace(asked(bare), dtype="auto")))
    assert "dtype: bfloat16, since LORA_BFLOAT16=1 is in the environment" in chosen
    assert "base, bfloat16" in chosen
    short = dataclasses.replace(found, available=2**20).verdict()
    for flag in ("--micro-batch-size", "--activation-checkpointing", "--quantize nf4", "--r"):
        assert flag in short
    table = json.loads(json.dumps(found.as_dict()))
    assert table["memory"][0]["peak"] == found.memory[0].peak
    assert table["trainable"] == found.report.trainable
    assert table["seconds"] == found.flops / found.rate > 0


def test_the_products_of_a_run_grow_with_its_steps(bare: Path) -> None:
    one, two = (plan(asked(bare, epochs=epochs)).flops for epochs in (1, 2))
    assert 1.5 < two / one < 2  # test is evaluated once
    assert plan(asked(bare, epochs=1, eval_steps=1)).flops > one


@pytest.mark.parametrize("method", ["full", "lora"])
def test_products_are_counted_as_torch_counts_them(method: str) -> None:
    model = distilbert(attn_implementation="eager").train()
    lora.inject(model, lora.METHODS[method].Config())
    ids = tokens()
    counts = []
    for counter in (Ledger(), FlopCounterMode(display=False)):
        # torch's counter does not know addmm_, which a kernel uses.
        with lora.kernels.off(), counter:
            model(input_ids=ids).logits.sum().backward()
        counts.append(getattr(counter, "flops", None) or counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with Ledger() as by_kernels:
        model(input_ids=ids).logits.sum().backward()
    assert 0.5 < by_kernels.flops / counts[0] <= 1
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with torch.inference_mode(), Ledger() as inference:
        model(input_ids=ids)
    assert inference.flops == forward.get_total_flops()


def test_a_head_is_new_where_the_config_says_so(bare: Path, tmp_path: Path) -> None:
    assert plan(asked(bare)).report.plan.saved == ("pre_classifier", "classifier")
    for path in bare.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((bare / "config.json").read_text())
    config["architectures"] = ["DistilBertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(asked(tmp_path)).report.plan.saved == ()
    labels = {"id2label": {str(i): str(i) for i in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(config | labels))
    # Of the two only the last is new. PEFT's file holds both, so both are trained.
    assert plan(asked(tmp_path)).report.plan.saved == ("pre_classifier", "classifier")


@pytest.mark.slow
def test_a_small_run_takes_what_was_planned(bare: Path, base: Path, tmp_path: Path) -> None:
    """Within a third: the process outweighs such a model, and the two run beside other tests."""
    flags = ["--limit", "100", "--epochs", "1", "--dtype", "float32", "--base"]
    code = (
        "import sys\nfrom lora.finetune.config import parse_run\n"
        "from lora.finetune.plan import plan\n"
        "print(plan(parse_run(sys.argv[1:])).memory[0].peak)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, *flags, str(bare)], check=True, capture_output=True, text=True
    ).stdout
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lora", "train", *flags, str(base), "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    peak = json.loads((run / "summary.json").read_text())["peak_bytes"]
    assert int(said) == pytest.approx(peak, rel=0.33)


def test_epochs_without_end_are_planned_from_the_first(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches of 100,000 steps say what those of the others are like."""
    monkeypatch.setattr("lora.finetune.plan.WALKED", 10)
    few, many = (plan(asked(bare, epochs=epochs)) for epochs in (4, 2**31 - 1))
    assert many.epochs * many.steps_per_epoch == (2**31 - 1) * few.steps_per_epoch
    assert (many.largest, many.tokens, many.padding) == (few.largest, few.tokens, few.padding)
    assert few.memory[0].training == many.memory[0].training
    assert "note: only the batches of the first 4 epochs were counted." in many.notes
    with pytest.raises(ConfigError, match="epochs must be at most 2,147,483,647"):
        asked(bare, epochs=2**31)
