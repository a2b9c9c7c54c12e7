"""One training step of each method over LoRA's and over a frozen model's, ours beside peft's.

python -m benchmarks.family [--quick] [--json FILE]

DistilBERT-base's shapes (d = 768) in two layers, all six linears of each, 16 x 128 tokens,
float32, random weights; a step is forward, backward and AdamW. The contenders take turns in one
process, in an order that rotates; each ratio is taken within a round, and the median of the rounds
reported with their quartiles. "frozen" is the model with every weight frozen and the gradient
flowing to the embeddings' output: no adapter can be faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import lora
from benchmarks.machine import write
from benchmarks.step import LINEARS, base, stepper, with_lora, with_peft
from benchmarks.turns import median, ratio, take_turns

LAYERS = 2


def ours(method: str, **settings: Any) -> nn.Module:
    return with_lora(base(LAYERS), LINEARS, method, **settings)


def pefts(kind: str, **settings: Any) -> nn.Module:
    return with_peft(base(LAYERS), LINEARS, kind, **settings)


def frozen() -> nn.Module:
    model = base(LAYERS)
    model.requires_grad_(False)
    return model


def selection(method: str, **settings: Any) -> nn.Module:
    model = base(LAYERS)
    lora.inject(model, lora.METHODS[method].Config(**settings))
    return model


LOW = {"r": 8, "lora_alpha": 8}
CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "frozen": frozen,
    "full": lambda: selection("full"),
    "lora": lambda: ours("lora", **LOW),
    "dora": lambda: ours("dora", **LOW),
    "adalora": lambda: ours("adalora", init_r=8, target_r=4, lora_alpha=8),
    "hira": lambda: ours("hira", r=8),
    "ia3": lambda: ours("ia3"),
    "bitfit": lambda: selection("bitfit"),
    "head": lambda: selection("head"),
    "topk": lambda: selection("topk", k=1),
    "vera": lambda: ours("vera"),
    "peft lora": lambda: pefts("LoraConfig", **LOW),
    "peft dora": lambda: pefts("LoraConfig", **LOW, use_dora=True),
    "peft hira": lambda: pefts("HiraConfig", r=8),
    "peft ia3": lambda: pefts("IA3Config", feedforward_modules=[]),
    "peft vera": lambda: pefts("VeraConfig"),
    "lora, dropout": lambda: ours("lora", **LOW, lora_dropout=0.1),
    "dora, dropout": lambda: ours("dora", **LOW, lora_dropout=0.1),
    "peft lora, dropout": lambda: pefts("LoraConfig", **LOW, lora_dropout=0.1),
    "peft dora, dropout": lambda: pefts("LoraConfig", **LOW, lora_dropout=0.1, use_dora=True),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="3 rounds, not 11")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    steps = {name: stepper(build(), 16, 128, "float32") for name, build in CONTENDERS.items()}
    for step in steps.values():
        step()  # warm
    rounds = take_turns(steps, 3 if given.quick else 11)
    result: dict[str, dict[str, float]] = {}
    for name in steps:
        row = {"seconds": median(rounds, name)}
        for other in ("lora", "frozen"):
            found = ratio(rounds, name, other)
            row |= {f"over {other}": found["median"]}
            row |= {f"{other} {end}": found[end] for end in ("low", "high")}
        result[name] = row
        print(
            f"{name:<20} {row['seconds']:6.3f} s   / lora {row['over lora']:5.2f}"
            f" [{row['lora low']:.2f}, {row['lora high']:.2f}]   / frozen {row['over frozen']:5.2f}"
        )
    if given.json:
        write(given.json, {"steps": result, "rounds": rounds})


if __name__ == "__main__":
    main()
