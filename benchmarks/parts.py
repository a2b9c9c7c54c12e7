"""The parts of a fused layer, and the forms that were weighed: what docs/performance.md decides by.

python -m benchmarks.parts [--quick] [--json FILE]

2,048 tokens, r = 8, layers of DistilBERT-base, in float32, and in bfloat16 if the processor has
bfloat16 matrix multiplication. Before each measurement a product with the layer's weight runs, as
it does in a step, so that the caches hold what they would. Milliseconds, medians; the forms of one
question alternate. The process keeps the memory that it frees, as `lora train` does.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import write
from benchmarks.turns import median, take_turns
from lora.finetune.memory import bfloat16_here
from lora.kernels.dropout import draw, drop_, dropped
from lora.kernels.products import summed
from lora.kernels.scratch import keep_freed_memory

TOKENS, R = 2048, 8
SHAPES = ((768, 768), (768, 3072), (3072, 768))


def questions(
    inside: int, outside: int, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], Any]]]:
    """By question, the forms that answer it."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, g = random(TOKENS, inside), random(TOKENS, outside)
    W, b = random(outside, inside), random(outside)
    A, B = random(R, inside), random(outside, R)
    Bt, h = B.T.contiguous(), random(TOKENS, R)
    three = [random(R, inside) for _ in range(3)]
    stacked = torch.cat(three)
    gx = torch.zeros(TOKENS, inside, dtype=dtype)
    mask, words = draw(0.1, x), torch.empty(x.numel() // 8, dtype=torch.int64)

    def applied() -> None:
        for part, keep in mask.blocks(TOKENS, dtype):
            dropped(x[part], keep, dtype)

    def thin_last() -> Tensor:
        found = g @ W
        for part, keep in mask.blocks(TOKENS, dtype):
            found[part].add_(drop_(h[part] @ A, keep))
        return found

    def thin_first() -> Tensor:
        found = h @ A
        for part, keep in mask.blocks(TOKENS, dtype):
            drop_(found[part], keep)
        return found.addmm_(g, W)

    def parts() -> Tensor:
        left, right = h.float().view(-1, 256, R), g.float().view(-1, 256, outside)
        return torch.bmm(left.mT, right).sum(0)

    def wide_first() -> Tensor:
        return F.linear(x, W, b).addmm_(x @ A.T, Bt)

    def update_first() -> Tensor:
        return torch.addmm(b, x @ A.T, Bt).addmm_(x, W.T)

    return {
        "dropout": {
            "F.dropout: mask and product": lambda: F.dropout(x, 0.1),
            "ours: draw the mask": lambda: draw(0.1, x),
            "ours: apply the mask": applied,
            "only the bytes, from torch's random_": lambda: words.random_(-(2**63), None),
            "a mask from torch's bernoulli_": lambda: torch.empty_like(x).bernoulli_(0.9),
        },
        "order of products, forward": {
            "x Wᵀ alone": lambda: F.linear(x, W, b),
            "x Wᵀ + (x Aᵀ) Bᵀ": update_first,
            "x (W + B A)ᵀ": lambda: F.linear(x, torch.addmm(W, B, A), b),
        },
        "order of products, backward to x": {
            "g W alone": lambda: g @ W,
            "g W + (g B) A": lambda: (g @ W).addmm_(g @ Bt.T, A),
            "g (W + B A)": lambda: g @ torch.addmm(W, B, A),
        },
        "g B": {"B stored as (out, r)": lambda: g @ B, "Bᵀ stored as (r, out)": lambda: g @ Bt.T},
        "hᵀ g": {
            "one product, rounded to the dtype": lambda: h.T @ g,
            "in float32, in parts of 256 tokens": parts,
            "as the fused kernel computes it": lambda: summed(h, g),
        },
        "h for three layers of one input": {
            "three products": lambda: [x @ one.T for one in three],
            "one with A stacked": lambda: x @ stacked.T,
        },
        "y": {"x Wᵀ, then h Bᵀ onto it": wide_first, "h Bᵀ, then x Wᵀ onto it": update_first},
        "gx": {"(g B) A onto it": lambda: gx.addmm_(h, A)},
        "gx under dropout": {
            "g W, then m ∘ (g B) A summed onto it": thin_last,
            "m ∘ (g B) A, then g W onto it": thin_first,
        },
        "gx of three layers of one input": {
            "three, summed": lambda: g @ W + g @ W + g @ W,
            "each onto the one before": lambda: (g @ W).addmm_(g, W).addmm_(g, W),
        },
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="7 rounds, not 41")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    result: dict[str, dict[str, dict[str, float]]] = {}
    keep_freed_memory()
    dtypes = [torch.float32]
    dtypes += [torch.bfloat16] if bfloat16_here(torch.device("cpu")) else []
    for (inside, outside), dtype in itertools.product(SHAPES, dtypes):
        shape = f"{inside} -> {outside}" + (", bfloat16" if dtype == torch.bfloat16 else "")
        layer = result[shape] = {}
        warm, weight = torch.randn(TOKENS, inside), torch.randn(outside, inside)

        def timed(form: Callable[[], Any], warm: Tensor = warm, weight: Tensor = weight) -> float:
            F.linear(warm, weight)
            started = time.perf_counter()
            form()
            return time.perf_counter() - started

        print(shape)
        for question, forms in questions(inside, outside, dtype).items():
            contenders = {name: (lambda form=form: timed(form)) for name, form in forms.items()}
            rounds = take_turns(contenders, 7 if given.quick else 41)
            layer[question] = {name: 1000 * median(rounds, name) for name in forms}
            for name, value in layer[question].items():
                print(f"  {question:<34} {name:<34} {value:8.3f} ms")
    if given.json:
        write(given.json, {"milliseconds": result})


if __name__ == "__main__":
    main()
