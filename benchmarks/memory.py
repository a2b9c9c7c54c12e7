"""Activations kept for backward, ours beside peft's, full fine-tuning and a frozen model.

python -m benchmarks.memory [--quick] [--json FILE]

LLaMA's shape with d = 512, 4 layers, 4 x 256 tokens, random weights held in bfloat16, r = 8 on all
seven linears, adapters in float32. "limit" has every weight frozen and the gradient flowing to the
embeddings' output. What is kept is what the allocator holds at the end of forward above what it
held before, by torch.profiler's memory events, less the logits: whatever keeps it, and as the
allocator counts it. `full` trains its bfloat16 weights. No times are taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import write
from benchmarks.step import embeddings_pass_gradient, with_lora, with_peft
from lora import nf4
from lora.finetune.quantized import packable

ROWS, LENGTH = 4, 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1000, max_position_embeddings=LENGTH, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()


def ours(method: str = "lora", **settings: Any) -> nn.Module:
    return with_lora(base(), LINEARS, method, **settings)


def packed(**settings: Any) -> nn.Module:
    """QLoRA."""
    model = base()
    nf4.quantize_layers(model, packable(model))
    return with_lora(model, LINEARS, **settings)


def pefts(kind: str = "LoraConfig", **settings: Any) -> nn.Module:
    return with_peft(base(), LINEARS, kind, **settings)


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "limit": lambda: base().requires_grad_(False),
    "full": base,
    "ours": lambda: ours(r=8),
    "ours, dropout": lambda: ours(r=8, lora_dropout=0.1),
    "ours nf4": lambda: packed(r=8),
    "ours nf4, dropout": lambda: packed(r=8, lora_dropout=0.1),
    "peft": lambda: pefts(r=8),
    "peft, dropout": lambda: pefts(r=8, lora_dropout=0.1),
    "ours dora": lambda: ours("dora", r=8),
    "peft dora": lambda: pefts(r=8, use_dora=True),
    "ours dora, dropout": lambda: ours("dora", r=8, lora_dropout=0.1),
    "peft dora, dropout": lambda: pefts(r=8, use_dora=True, lora_dropout=0.1),
    "ours vera": lambda: ours("vera"),
    "peft vera": lambda: pefts("VeraConfig"),
    "ours ia3": lambda: ours("ia3"),
    "peft ia3": lambda: pefts("IA3Config", feedforward_modules=[]),
}
RATIOS = (
    ("ours", "full"), ("ours, dropout", "full"), ("peft", "full"), ("peft, dropout", "full"),
    ("peft", "ours"), ("peft, dropout", "ours, dropout"), ("ours", "limit"), ("full", "limit"),
    ("peft dora", "ours dora"), ("peft dora, dropout", "ours dora, dropout"),
    ("peft vera", "ours vera"), ("peft ia3", "ours ia3"), ("ours nf4", "ours"),
    ("ours nf4, dropout", "ours, dropout"),
)  # fmt: skip


def kept(model: Any) -> int:
    """Bytes that forward left allocated, less its logits."""
    embeddings_pass_gradient(model)
    ids = torch.randint(1, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids)  # for what is made once and stays, whatever the number of layers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits = model(input_ids=ids).logits
    total = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
    return total - logits.numel() * logits.element_size()


def most_held(step: Callable[[], Any]) -> int:
    """The most bytes that the allocator holds at any moment of a step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="the same: it takes no minute")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    found = {name: kept(build()) for name, build in CONTENDERS.items()}
    for name, value in found.items():
        print(f"{name:<20} {value / 2**20:7.1f} MiB")
    ratios = {f"{name} / {other}": found[name] / found[other] for name, other in RATIOS}
    for name, ratio in ratios.items():
        print(f"{name:<42} {ratio:5.2f}")
    if given.json:
        write(given.json, {"bytes": found, "ratios": ratios})


if __name__ == "__main__":
    main()
