"""The parts of a fused layer, and the forms that were weighed: what docs/performance.md decides by.

python -m benchmarks.parts [--quick] [--json FILE]

2,048 tokens, float32, r = 8, layers of DistilBERT-base. Before each measurement a product with the
layer's weight runs, as it does in a step, so that the operands lie where they would. Milliseconds,
medians; the forms of one question take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import write
from benchmarks.turns import median, take_turns
from lora.dropout import draw
from lora.fused import _summed

TOKENS, R = 2048, 8


def questions(inside: int, outside: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """By question, the forms that answer it."""
    torch.manual_seed(0)
    x, g = torch.randn(TOKENS, inside), torch.randn(TOKENS, outside)
    W, b = torch.randn(outside, inside), torch.randn(outside)
    A, B = torch.randn(R, inside), torch.randn(outside, R)
    Bt, h = B.T.contiguous(), torch.randn(TOKENS, R)
    three = [torch.randn(R, inside) for _ in range(3)]
    stacked = torch.cat(three)
    y, gx = torch.empty(TOKENS, outside), torch.empty(TOKENS, inside)
    mask = draw(0.1, x)

    def split() -> Tensor:
        found = F.linear(x, W, b)
        return found.addmm_(x @ A.T, Bt)

    return {
        "dropout": {
            "F.dropout": lambda: F.dropout(x, 0.1),
            "the mask, from its seed": lambda: mask.keep(x),
            "the mask from torch's bernoulli_": lambda: torch.empty_like(x).bernoulli_(0.9),
        },
        "order of products, forward": {
            "x Wᵀ alone": lambda: F.linear(x, W, b),
            "x Wᵀ + (x Aᵀ) Bᵀ": split,
            "x (W + B A)ᵀ": lambda: F.linear(x, torch.addmm(W, B, A), b),
        },
        "order of products, backward to x": {
            "g W alone": lambda: g @ W,
            "g W + (g B) A": lambda: (g @ W).addmm_(g @ Bt.T, A),
            "g (W + B A)": lambda: g @ torch.addmm(W, B, A),
        },
        "g B": {"by columns of B": lambda: g @ B, "by rows of Bᵀ": lambda: g @ Bt.T},
        "hᵀ g": {
            "one product": lambda: h.T @ g,
            "in parts of 256 tokens": lambda: _summed(h, g, 1.0),
        },
        "h for three layers of one input": {
            "three products": lambda: [x @ one.T for one in three],
            "one with A stacked": lambda: x @ stacked.T,
        },
        "h Bᵀ onto y": {
            "in place": lambda: y.addmm_(h, Bt),
            "a product, then a sum": lambda: y + h @ Bt,
        },
        "gx": {"(g B) A onto it": lambda: gx.addmm_(h, A)},
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="7 rounds, not 41")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    result: dict[str, dict[str, dict[str, float]]] = {}
    for inside, outside in ((768, 768), (768, 3072), (3072, 768)):
        layer = result[f"{inside} -> {outside}"] = {}
        warm, weight = torch.randn(TOKENS, inside), torch.randn(outside, inside)

        def timed(form: Callable[[], Any], warm: Tensor = warm, weight: Tensor = weight) -> float:
            F.linear(warm, weight)
            started = time.perf_counter()
            form()
            return time.perf_counter() - started

        print(f"{inside} -> {outside}")
        for question, forms in questions(inside, outside).items():
            contenders = {name: (lambda form=form: timed(form)) for name, form in forms.items()}
            rounds = take_turns(contenders, 7 if given.quick else 41)
            layer[question] = {name: 1000 * median(rounds, name) for name in forms}
            for name, value in layer[question].items():
                print(f"  {question:<34} {name:<34} {value:8.3f} ms")
    if given.json:
        write(given.json, {"milliseconds": result})


if __name__ == "__main__":
    main()
