"""NF4 beside bitsandbytes: the codec, a layer's step, and what a packed model takes.

python -m benchmarks.nf4 [--quick] [--json FILE]

A weight of 4096 x 4096. "dequantise" writes into a buffer that is there, but for bitsandbytes,
which on a processor takes none. So it is measured twice: as a process starts, where the system
clears the pages of each new tensor, and with freed memory kept, as `lora train` does it for all
that runs in it. The layer is forward and backward to its input, 512 tokens, weights doubly
quantised. Bits per parameter are of the linear layers that are packed in a LLaMA of 12 layers of
768, counted in memory and in the file. The initial error is the nuclear norm of W less what the
packed layer and its initial adapter compute, over MiniLM's linear layers: plain QLoRA's over that
of each init which takes up what the rounding leaves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as theirs
import safetensors.torch
import torch
import transformers

import lora
from benchmarks.machine import write
from benchmarks.turns import median, ratio, shown, take_turns
from lora import nf4
from lora.finetune.memory import bfloat16_here
from lora.finetune.models import load_base
from lora.finetune.quantized import packable
from lora.inventory import wrapper_at
from lora.kernels.scratch import keep_freed_memory
from lora.nf4 import NF4Linear

DTYPES = (torch.float32, torch.bfloat16)
MEMORY = ("as started", "freed memory kept")
STARTS = ("pissa", "olora", "loftq", "loftq_5")


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    seconds()  # warm
    return seconds


def codec(size: int, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Packing and unpacking one weight."""
    w = torch.randn(size, size).to(dtype)
    ours = nf4.quantize(w)
    codes, state = theirs.quantize_4bit(w, quant_type="nf4", blocksize=64)
    out = torch.empty_like(w)
    return {
        "quantise, ours": timed(lambda: nf4.quantize(w)),
        "quantise, bitsandbytes": timed(
            lambda: theirs.quantize_4bit(w, quant_type="nf4", blocksize=64)
        ),
        "dequantise, ours": timed(lambda: nf4.dequantize(ours, out=out)),
        "dequantise, bitsandbytes": timed(
            lambda: theirs.dequantize_4bit(codes, state, quant_type="nf4")
        ),
    }


def layer(size: int, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Forward and backward of a layer that is packed."""
    dense = torch.nn.Linear(size, size, bias=False).to(dtype)
    ours = NF4Linear.of(dense)
    other = bitsandbytes.nn.Linear4bit(
        size, size, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    other.weight = bitsandbytes.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, quant_type="nf4"
    )
    other = other.to("cpu")
    x = torch.randn(512, size, dtype=dtype, requires_grad=True)

    def step(module: torch.nn.Module) -> None:
        x.grad = None
        module(x).sum().backward()

    return {
        "layer, ours": timed(lambda: step(ours)),
        "layer, bitsandbytes": timed(lambda: step(other)),
        "layer, dense": timed(lambda: step(dense)),
    }


def bits() -> dict[str, float]:
    """Of a parameter, in memory and in the file, of the layers that are packed."""
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=1000,
    )  # fmt: skip
    found = {}
    for double_quant in (False, True):
        model = transformers.LlamaForCausalLM(config)
        names = packable(model)
        count = sum(model.get_submodule(name).weight.numel() for name in names)
        nf4.quantize_layers(model, names, double_quant=double_quant)
        packed = [model.get_submodule(name) for name in names]
        held = sum(p.numel() * p.element_size() for m in packed for p in m.parameters())
        tensors = {
            f"{name}.{key}": tensor
            for name, module in zip(names, packed, strict=True)
            for key, tensor in module.state_dict().items()
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "packed.safetensors"
            safetensors.torch.save_file(tensors, path)
            stored = path.stat().st_size
        how = "double quantisation" if double_quant else "absmax in float32"
        found |= {f"{how}, memory": 8 * held / count, f"{how}, file": 8 * stored / count}
    return found


def errors(ranks: Sequence[int]) -> dict[str, float]:
    """Plain QLoRA's initial error over each start's, by start and rank."""

    def error(init: str, r: int) -> float:
        model = load_base("demo", 2, "classification", 0).model
        weights = {name: model.get_submodule(name).weight.detach() for name in packable(model)}
        config = lora.LoRAConfig(r=r, lora_alpha=r, init_lora_weights=init)
        lora.inject(model, config, pack=list(weights))
        total = 0.0
        for name, W in weights.items():
            layer = wrapper_at(model, name)
            merged, _ = layer.adapter("default").merged(*layer.view.read())
            total += torch.linalg.svdvals(W - merged.detach()).sum().item()
        return total

    plain = error("default", 1)
    return {f"{init}, r = {r}": plain / error(init, r) for init in STARTS for r in ranks}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="1024 x 1024, 5 rounds")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    size, count = (1024, 5) if given.quick else (4096, 21)
    result: dict[str, Any] = {"size": size, "bits": bits()}
    for memory in MEMORY:
        if memory == "freed memory kept":
            keep_freed_memory()
        result[memory] = {"milliseconds": {}, "bitsandbytes / ours": {}}
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            contenders = codec(size, dtype)
            if dtype == torch.float32 or bfloat16_here(torch.device("cpu")):
                contenders |= layer(size, dtype)
            rounds = take_turns(contenders, count)
            print(f"{size} x {size}, {name}, {memory}")
            for contender in contenders:
                milliseconds = 1000 * median(rounds, contender)
                result[memory]["milliseconds"][f"{contender}, {name}"] = milliseconds
                print(f"  {contender:<26} {milliseconds:9.2f} ms")
            for what in dict.fromkeys(c.partition(",")[0] for c in contenders):
                found = ratio(rounds, f"{what}, bitsandbytes", f"{what}, ours")
                result[memory]["bitsandbytes / ours"][f"{what}, {name}"] = found
                print(f"  {what}, bitsandbytes / ours {shown(found)}")
    result["initial error"] = errors((64,) if given.quick else (8, 16, 32, 64))
    for what, value in result["bits"].items():
        print(f"  {what:<32} {value:.4f} bits")
    for what, value in result["initial error"].items():
        print(f"  {what:<32} {value:.3f} of plain QLoRA's error")
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
