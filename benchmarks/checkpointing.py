"""Activation checkpointing: what memory it saves, and what time that costs.

python -m benchmarks.checkpointing [--quick] [--json FILE]

Memory: benchmarks.memory's model, in float32, and its measure; `kept` is held at the end of
forward, `peak` is the most that is held at any moment of forward and backward, above what was held
before, by the allocator's own events. Time: benchmarks.step's model and step, 16 x 128 tokens, each
contender with checkpoints over itself without. "ours" is LoRA, r = 8, on all linears of a block,
"nf4" the same on a base in NF4, "full" trains every weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import memory, step
from benchmarks.machine import write
from benchmarks.turns import median, ratio, shown, take_turns
from lora import nf4
from lora.finetune.memory import bfloat16_here, checkpoint_activations, set_dtype
from lora.finetune.quantized import packable
from lora.kernels.scratch import keep_freed_memory

CHECKPOINTED = ", checkpointed"


def packed(setting: step.Setting) -> nn.Module:
    model = step.base(setting.layers)
    nf4.quantize_layers(model, packable(model))
    step.with_lora(model, step.LINEARS, r=8)
    set_dtype(model, setting.dtype)
    return model


MEMORY: dict[str, Callable[[], nn.Module]] = {
    "ours": memory.CONTENDERS["ours"],
    "nf4": memory.CONTENDERS["ours nf4"],
    "full": memory.CONTENDERS["full"],
}
TIME: dict[str, Callable[[step.Setting], nn.Module]] = {
    "ours": step.ours,
    "nf4": packed,
    "full": step.full,
}


def checkpointed(model: Any) -> Any:
    """The model, its blocks computed again in the backward pass."""
    checkpoint_activations(model)
    return model


def peak(model: Any) -> int:
    """The most bytes held in forward and backward above those before."""
    ids = torch.randint(1, 1000, (memory.ROWS, memory.LENGTH))
    for parameter in model.parameters():  # there from the second step on
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return memory.most_held(lambda: model(input_ids=ids).logits.float().square().mean().backward())


def measure_memory() -> dict[str, Any]:
    """Bytes of each contender, without and with checkpoints, and the ratios of the two."""
    found: dict[str, dict[str, int]] = {}
    for name, build in MEMORY.items():
        for with_them in (False, True):
            model: Any = build().float()
            model = checkpointed(model) if with_them else model
            found[name + CHECKPOINTED * with_them] = {
                "kept": memory.kept(model), "peak": peak(model)
            }  # fmt: skip
    for name, sizes in found.items():
        print(f"{name:<20}" + "".join(f"  {k} {v / 2**20:7.1f} MiB" for k, v in sizes.items()))
    ratios = {
        name: {k: found[name + CHECKPOINTED][k] / found[name][k] for k in ("kept", "peak")}
        for name in MEMORY
    }
    for name, both in ratios.items():
        print(f"{name:<20}" + "".join(f"  {k} {v:.2f}" for k, v in both.items()))
    return {"bytes": found, "ratios": ratios}


def measure_time(setting: step.Setting) -> dict[str, Any]:
    """The rounds of a setting, and each contender's ratio of with to without."""
    models = {name: build(setting) for name, build in TIME.items()}
    models |= {name + CHECKPOINTED: checkpointed(build(setting)) for name, build in TIME.items()}
    steps = {
        name: step.stepper(model, setting.rows, setting.length, setting.dtype)
        for name, model in models.items()
    }
    for one in steps.values():
        one()  # warm
    rounds = take_turns(steps, setting.rounds)
    print(f"{setting.name}, {setting.layers} layers")
    for name in steps:
        print(f"  {name:<20} {median(rounds, name):8.4f} s")
    found = {name: ratio(rounds, name + CHECKPOINTED, name) for name in TIME}
    for name, value in found.items():
        print(f"  {name:<20} {shown(value)}")
    return {"layers": setting.layers, "ratios": found, "rounds": rounds}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="time: one layer, 5 rounds")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    keep_freed_memory()
    dtypes = ["float32", "bfloat16"] if bfloat16_here(torch.device("cpu")) else ["float32"]
    held = measure_memory()
    taken = {
        setting.name: measure_time(setting)
        for setting in step.settings(given.quick, dtypes)
        if setting.length == 128
    }
    if given.json:
        write(given.json, {"memory": held, "time": taken})


if __name__ == "__main__":
    main()
