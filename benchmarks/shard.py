"""Peak memory of each rank while a base is read in pieces, and in a step on it.

python -m benchmarks.shard [--quick] [--json FILE]

A LLaMA of half a billion random bfloat16 weights in files of 300 MB at most, made for the run. One
fresh process reads it whole, two read it in pieces, dense (in float32) and packed in NF4; each puts
adapters on and takes the gradients of one short text, its blocks checkpointed. Anonymous memory is
sampled above its value after the imports; `held` is what the parameters come to on a rank. glibc's
allocator is told to give large blocks back (MALLOC_MMAP_THRESHOLD_), in all of them: what it keeps
for itself after they were freed would else be counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MB = 10**6


def make(folder: str, quick: bool) -> None:
    """The model's files."""
    import torch
    import transformers

    from lora.finetune.models import load_base

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6 if quick else 28,
        num_attention_heads=16, vocab_size=32000, num_labels=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(folder, max_shard_size="300MB")
    load_base("demo", 2, "classification", 0).tokenizer.save_pretrained(folder)


def measure(folder: str, quantize: str) -> list[dict[str, float]]:
    """Peak bytes of each rank, and what it holds in the end."""
    import torch
    import torch.distributed.fsdp
    import transformers.models.llama.modeling_llama  # noqa: F401  (else in load_base)

    import lora
    from lora.finetune import distributed
    from lora.finetune.models import load_base
    from lora.finetune.peak import PeakMemory

    with distributed.group():
        size = distributed.size()
        part = (distributed.rank(), size) if size > 1 else None
        with PeakMemory() as memory:
            base = load_base(folder, 2, "classification", 0, quantize, part=part)
            model = base.model
            lora.inject(model, lora.LoRAConfig(r=8, modules_to_save=("score",)))
            model.activation_checkpointing_enable({"use_reentrant": False})
            if size > 1:
                distributed.shard(model, base.pieces)
            memory.sample()
            found = {"read": float(memory.peak())}
        with PeakMemory() as step:
            step.start = memory.start
            model.train()(input_ids=torch.arange(1, 17)[None]).logits.sum().backward()
        found["step"] = float(step.peak())
        local = (getattr(p, "_local_tensor", p) for p in model.parameters())
        found["held"] = float(sum(p.numel() * p.element_size() for p in local))
        return distributed.gather(found)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="6 layers, not 28")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.measure:
        found = measure(*given.measure)
        print(json.dumps(found))
        return
    from benchmarks.machine import write

    around = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        make(folder, given.quick)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        result: dict[str, Any] = {"stored": stored}
        for quantize in ("none", "nf4"):
            for name, ranks in (("whole", []), ("in pieces", torchrun)):
                command = [sys.executable, *ranks, "-m", "benchmarks.shard"]
                command += ["--measure", folder, quantize]
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=around
                )
                found = json.loads(done.stdout.strip().splitlines()[-1])
                result[f"{'dense' if quantize == 'none' else quantize}, {name}"] = found
    print(f"stored {stored / MB:,.0f} MB; MB of each rank:")
    for name, found in result.items():
        for number, one in enumerate(found if isinstance(found, list) else ()):
            shown = "  ".join(f"{what} {size / MB:6,.0f}" for what, size in one.items())
            print(f"{name:<16} rank {number}  {shown}")
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
