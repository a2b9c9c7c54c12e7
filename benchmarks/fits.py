"""What fits on a card: `lora plan`'s dry run of LLaMAs from 1B to 70B, in 16 and in 4 bits; in
float16 too, for a T4.

python -m benchmarks.fits [--json FILE]

Rows of 2048 tokens, one at a time, r = 16 on all linears, activation checkpointing, AdamW. The
weights are not needed: only their shapes are. Every block needs the same, so the plans of two and
of three blocks give the need of all. The CUDA context and 5 % for the allocator's free blocks are
added.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import RESULTS, write
from lora.finetune import losses
from lora.finetune import plan as dry_run
from lora.finetune.config import from_table
from lora.finetune.models import load_skeleton

GB = 10**9
CARDS = (8, 16, 24, 80)
CONTEXT = 600 * 2**20  # CUDA's own memory, and the workspaces of its libraries
FREE = 0.05  # share of the tensors that the allocator keeps beside them
# hidden, MLP, layers, heads, key-value heads, vocabulary, tied head: the shapes of Llama 3.2, 3.1
# and 2.
MODELS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "13B": (5120, 13824, 40, 40, 40, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
}


def make_base(folder: Path, sizes: Sequence[Any], layers: int) -> Path:
    """Writes a base with some of its blocks and no weights: its config, and the byte tokenizer."""
    hidden, mlp, _, heads, kv_heads, vocabulary, tied = sizes
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    load_skeleton("demo-lm-tiny", 1, "text").tokenizer.save_pretrained(folder)
    return folder


def needed(base: Path, data: Path, dtype: str, quantize: str) -> int:
    """Returns the bytes of a training step on a card."""
    table = {
        "base": str(base), "data": [str(data)], "task": "text", "dtype": dtype,
        "quantize": quantize, "batch_size": 1, "max_length": 2048, "epochs": 1,
        "activation_checkpointing": True, "r": 16, "target_modules": "all-linear",
    }  # fmt: skip
    (memory,) = dry_run.plan(from_table(table, "lora")).memory
    return int(sum(memory.training.values()) + memory.mapped)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--json", type=Path, default=RESULTS / "fits.json")
    flags.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    given = flags.parse_args()
    # The dry run is on this machine's device. As on a GPU, all of the base is in bfloat16, and as
    # many logits are computed at once.
    losses.AT_ONCE = losses.AT_ONCE_ON_ACCELERATORS
    set_dtype = dry_run.set_dtype
    dry_run.set_dtype = lambda model, dtype, _: set_dtype(model, dtype, torch.device("cuda"))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        texts = (
            {"messages": [{"role": "user", "content": f"{i:02}"},
                          {"role": "assistant", "content": "x" * 2020}]}
            for i in range(20)
        )  # fmt: skip
        data.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        for model in given.only:
            blocks = MODELS[model][2]
            bases = [make_base(Path(folder) / f"{model}-{n}", MODELS[model], n) for n in (2, 3)]
            for dtype, quantize in itertools.product(("bfloat16", "float16"), ("none", "nf4")):
                two, three = (needed(base, data, dtype, quantize) for base in bases)
                tensors = two + (blocks - 2) * (three - two)
                bytes_ = int((1 + FREE) * tensors) + CONTEXT
                cards = [card for card in CARDS if bytes_ <= card * GB]
                name = f"{model}, {dtype}" + (", NF4" if quantize == "nf4" else "")
                result[name] = {"bytes": bytes_, "smallest card, GB": min(cards, default=None)}
                print(f"{name:<20} {bytes_ / GB:6.1f} GB", flush=True)
    write(given.json, {"cards, GB": CARDS, "models": result})


if __name__ == "__main__":
    main()
