"""Peak memory while a base is packed as it is read, and what it comes to.

python -m benchmarks.load [--quick] [--json FILE]

A LLaMA of 1.1 billion random bfloat16 weights in files of 300 MB at most, made for the run. A fresh
process reads it with --quantize nf4; its anonymous memory is sampled, above its value after the
imports. The bound is 1.15 of what the model holds in the end, and the largest tensor of the files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MB = 10**6


def make(folder: str, quick: bool) -> int:
    """The model's files; the bytes of their largest tensor."""
    import torch
    import transformers

    from lora.finetune.models import load_base

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2 if quick else 14,
        num_attention_heads=16, vocab_size=32000, num_labels=2,
    )  # fmt: skip
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(dtype)
    model.save_pretrained(folder, max_shard_size="300MB")
    load_base("demo", 2, "classification", 0).tokenizer.save_pretrained(folder)
    return max(p.numel() * p.element_size() for p in model.parameters())


def read(folder: str) -> dict[str, float]:
    """Read the model packed: peak and final bytes."""
    import lora.finetune.models
    from lora.finetune.peak import PeakMemory
    from lora.nf4 import NF4Linear

    with PeakMemory() as memory:
        model = lora.finetune.models.load_base(folder, 2, "classification", 0, "nf4").model
        memory.sample()
    final = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    packed = sum(isinstance(m, NF4Linear) for m in model.modules())
    return {"peak": memory.peak(), "final": final, "packed layers": packed}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="2 layers, not 14")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--read", help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.read:
        print(json.dumps(read(given.read)))
        return
    from benchmarks.machine import write

    with tempfile.TemporaryDirectory() as folder:
        largest = make(folder, given.quick)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.load", "--read", folder]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = {"stored": stored, "largest": largest}
    result |= json.loads(found.stdout.strip().splitlines()[-1])
    result["bound"] = 1.15 * result["final"] + largest
    for name in ("stored", "largest", "final", "peak", "bound"):
        print(f"{name:<8} {result[name] / MB:9.0f} MB")
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
