"""The loss of a text at a vocabulary of 128k tokens: memory, and time, beside the plain one.

python -m benchmarks.vocabulary [--quick] [--json FILE]

A LLaMA of one block, 512 wide, frozen but for LoRA, r = 8, on all its linears, on 2 x 512 tokens in
float32. "plain" is the model's own forward with labels, as transformers' Trainer and peft compute
it. "ours" is losses.batch_loss with a label at every token, "ours, answers" with labels at
the last quarter of each row: what is learned where a prompt is masked. Memory is the most that
forward and backward hold at any moment above what was held before, by the allocator's own events.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lora
from benchmarks.machine import write
from benchmarks.memory import most_held
from benchmarks.turns import median, ratio, shown, take_turns
from lora.finetune.losses import batch_loss
from lora.kernels.scratch import keep_freed_memory

VOCABULARY = 131_072
ROWS, LENGTH = 2, 512


def model() -> Any:
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=1,
        num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    found = transformers.LlamaForCausalLM(shape)
    lora.inject(found, lora.LoRAConfig(r=8))
    return found.train()


def contenders(found: Any) -> dict[str, Callable[[], None]]:
    """A forward and a backward of each."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, :-1]
    answers = places[:, -(LENGTH // 4) :]

    def ours(at: torch.Tensor) -> None:
        at = at.flatten()
        targets = torch.stack([at, ids.flatten()[at + 1]])
        (batch_loss(found, {"input_ids": ids}, targets, "text") / len(at)).backward()

    return {
        "plain": lambda: found(input_ids=ids, labels=ids).loss.backward(),
        "ours": lambda: ours(places),
        "ours, answers": lambda: ours(answers),
    }


def timed(step: Callable[[], None]) -> Callable[[], float]:
    def took() -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    return took


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="3 rounds")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    keep_freed_memory()
    steps = contenders(model())
    for step in steps.values():
        step()  # gradients and what is made once are there from the second on
    memory = {name: most_held(step) for name, step in steps.items()}
    rounds = take_turns({n: timed(s) for n, s in steps.items()}, 3 if given.quick else 11)
    ratios = {name: ratio(rounds, name, "plain") for name in steps}
    logits = ROWS * LENGTH * VOCABULARY * 4
    print(f"logits in float32 {logits / 2**20:,.0f} MiB")
    for name in steps:
        print(
            f"{name:<14} {memory[name] / 2**20:8,.0f} MiB  {median(rounds, name):6.2f} s "
            f" time over plain {shown(ratios[name])}"
        )
    if given.json:
        write(given.json, {"logits": logits, "bytes": memory, "ratios": ratios, "rounds": rounds})


if __name__ == "__main__":
    main()
