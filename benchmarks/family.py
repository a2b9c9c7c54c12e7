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
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import lora
from benchmarks.machine import write
from lora.injection import after_step, penalty

LINEARS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        n_layers=2, num_labels=2, dropout=0.0, attention_dropout=0.0, vocab_size=1000
    )
    model: nn.Module = transformers.DistilBertForSequenceClassification(config).train()
    return model


def ours(method: str, **settings: Any) -> nn.Module:
    model = base()
    config = lora.METHODS[method].Config(target_modules=tuple(LINEARS), **settings)
    lora.inject(model, config)  # type: ignore[arg-type]
    return model


def pefts(kind: str, **settings: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(target_modules=LINEARS, **settings)
        model: nn.Module = peft.get_peft_model(base(), config)
    return model


def frozen() -> nn.Module:
    model = base()
    model.requires_grad_(False)
    return model


def selection(method: str, **settings: Any) -> nn.Module:
    model = base()
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


def stepper(model: nn.Module) -> Callable[[], float]:
    """Seconds of one step, at each call."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    table.register_forward_hook(lambda _, args, y: y.detach().requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (16, 128), generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)

    def step() -> float:
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=labels).loss
        extra = penalty(model)
        (loss if extra is None else loss + extra).backward()
        if optimizer is not None:
            optimizer.step()
            after_step(model, 1, 100)
            optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="3 rounds, not 11")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    steps = {name: stepper(build()) for name, build in CONTENDERS.items()}
    for step in steps.values():
        step()  # warm
    names = list(steps)
    rounds: list[dict[str, float]] = []
    for turn in range(3 if given.quick else 11):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        rounds.append({name: steps[name]() for name in order})
    result: dict[str, dict[str, float]] = {}
    for name in names:
        row = {"seconds": statistics.median(times[name] for times in rounds)}
        for other in ("lora", "frozen"):
            ratios = [times[name] / times[other] for times in rounds]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row |= {f"over {other}": middle, f"{other} low": low, f"{other} high": high}
        result[name] = row
        print(
            f"{name:<20} {row['seconds']:6.3f} s   / lora {row['over lora']:5.2f}"
            f" [{row['lora low']:.2f}, {row['lora high']:.2f}]   / frozen {row['over frozen']:5.2f}"
        )
    if given.json:
        write(given.json, {"steps": result, "rounds": rounds})


if __name__ == "__main__":
    main()
