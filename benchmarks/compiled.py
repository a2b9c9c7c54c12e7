"""What `lora train --compile` gains: a compiled step over a plain one, and the seconds to compile.

python -m benchmarks.compiled [--quick] [--json FILE]

DistilBERT-base's shapes with random weights, r = 8 on all six linears, no dropout, 16 x 128 tokens,
compiled by inductor with dynamic shapes, as `lora train --compile` does. A step is forward,
backward, AdamW. In bfloat16 only where the processor has its products.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write
from benchmarks.step import Setting, ours
from benchmarks.turns import ratio, shown, take_turns
from lora.finetune.memory import bfloat16_here
from lora.kernels.scratch import keep_freed_memory


def step_of(model: Any, setting: Setting) -> float:
    """Seconds of one step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (setting.rows, setting.length), generator=generator)
    labels = torch.randint(0, 2, (setting.rows,), generator=generator)
    half = setting.dtype == "bfloat16"
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def measure(setting: Setting) -> dict[str, Any]:
    plain, compiled = ours(setting), ours(setting)
    compiled.compile(dynamic=True)
    seconds = sum(step_of(compiled, setting) for _ in range(2))
    steps = {
        "plain": lambda: step_of(plain, setting),
        "compiled": lambda: step_of(compiled, setting),
    }
    steps["plain"]()
    rounds = take_turns(steps, setting.rounds)
    found = ratio(rounds, "compiled", "plain")
    print(f"{setting.name}: {seconds:.0f} s to compile, a step {shown(found)}")
    return {"seconds to compile": seconds, "compiled / plain": found, "rounds": rounds}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="one layer, 3 rounds")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    keep_freed_memory()
    native = bfloat16_here(torch.device("cpu"))
    layers, rounds = (1, 3) if given.quick else (6, 7)
    dtypes = ("float32", "bfloat16") if native and not given.quick else ("float32",)
    settings = [Setting(16, 128, dtype, layers, rounds) for dtype in dtypes]
    result = {setting.name: measure(setting) for setting in settings}
    if given.json:
        write(given.json, {"settings": result})


if __name__ == "__main__":
    main()
