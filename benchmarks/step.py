"""One training step over that of a frozen model, ours beside peft's and full fine-tuning.

python -m benchmarks.step [--quick] [--dtype DTYPE] [--json FILE]

DistilBERT-base's shapes with random weights, r = 8 on all six linears of each layer; a step is
forward, backward, AdamW. "limit" has every weight frozen and the gradient flowing to the
embeddings' output: no adapter can be faster. In bfloat16 the limit and ours hold their frozen
linears in it, as `lora train --dtype bfloat16` does; peft and full fine-tuning keep float32 weights
under autocast, as their users do. The process keeps the memory that it frees, as `lora train` does,
so that no contender pays for pages that another gave back. Without --dtype bfloat16 is measured
where the processor has its products; elsewhere it would say what the fallback does and no more.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import lora
from benchmarks.machine import write
from benchmarks.turns import Rounds, median, ratio, shown, take_turns
from lora.finetune.memory import bfloat16_here, set_dtype
from lora.kernels.scratch import keep_freed_memory
from lora.training import after_step, penalty

LINEARS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
RATIOS = (
    ("ours", "limit"), ("ours, dropout", "limit"), ("peft", "limit"), ("peft, dropout", "limit"),
    ("full", "limit"), ("peft", "ours"), ("peft, dropout", "ours, dropout"), ("ours", "full"),
    ("ours, dropout", "full"),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a step is taken on."""

    rows: int
    length: int
    dtype: str
    layers: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.length} {self.dtype}"


def settings(quick: bool, dtypes: Sequence[str]) -> Iterator[Setting]:
    for dtype in dtypes:
        for length in (128, 32):
            yield Setting(16, length, dtype, 1 if quick else 6, 5 if quick else 11)


def base(layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        n_layers=layers, num_labels=2, dropout=0.0, attention_dropout=0.0, vocab_size=1000
    )
    return transformers.DistilBertForSequenceClassification(config).train()


def limit(setting: Setting) -> nn.Module:
    model: nn.Module = base(setting.layers).requires_grad_(False)
    set_dtype(model, setting.dtype)
    return model


def full(setting: Setting) -> nn.Module:
    model: nn.Module = base(setting.layers)
    return model


def with_lora(
    model: nn.Module, targets: Sequence[str], method: str = "lora", **settings: Any
) -> nn.Module:
    """The model with a method of ours on the targets."""
    config = lora.METHODS[method].Config(target_modules=tuple(targets), **settings)
    lora.inject(model, config)  # type: ignore[arg-type]
    return model


def with_peft(
    model: nn.Module, targets: Sequence[str], kind: str = "LoraConfig", **settings: Any
) -> nn.Module:
    """The model with a method of peft's on the targets."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(target_modules=list(targets), **settings)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def embeddings_pass_gradient(model: Any) -> None:
    """Let the gradient flow to the embeddings' output, as it does below a trained layer."""
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda _, args, y: y.detach().requires_grad_())


def ours(setting: Setting, dropout: float = 0.0) -> nn.Module:
    model = with_lora(base(setting.layers), LINEARS, r=8, lora_dropout=dropout)
    set_dtype(model, setting.dtype)
    return model


def pefts(setting: Setting, dropout: float = 0.0) -> nn.Module:
    return with_peft(base(setting.layers), LINEARS, r=8, lora_dropout=dropout)


CONTENDERS: dict[str, Callable[[Setting], nn.Module]] = {
    "limit": limit,
    "full": full,
    "ours": ours,
    "ours, dropout": lambda setting: ours(setting, 0.1),
    "peft": pefts,
    "peft, dropout": lambda setting: pefts(setting, 0.1),
}


def stepper(model: Any, rows: int, length: int, dtype: str) -> Callable[[], float]:
    """Seconds of one step, at each call."""
    embeddings_pass_gradient(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (rows, length), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    mixed = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    def step() -> float:
        started = time.perf_counter()
        with mixed:
            loss = model(input_ids=ids, labels=labels).loss
        extra = penalty(model)
        (loss if extra is None else loss + extra).backward()
        if optimizer is not None:
            optimizer.step()
            after_step(model, 1, 100)
            optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def measure(setting: Setting) -> dict[str, Any]:
    """The rounds of a setting, and the ratios that are reported."""
    steps = {
        name: stepper(build(setting), setting.rows, setting.length, setting.dtype)
        for name, build in CONTENDERS.items()
    }
    for step in steps.values():
        step()  # warm
    rounds: Rounds = take_turns(steps, setting.rounds)
    print(f"{setting.name}, {setting.layers} layers")
    for name in steps:
        print(f"  {name:<14} {median(rounds, name):8.4f} s")
    found = {f"{name} / {other}": ratio(rounds, name, other) for name, other in RATIOS}
    for name, value in found.items():
        print(f"  {name:<30} {shown(value)}")
    return {"layers": setting.layers, "ratios": found, "rounds": rounds}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    native = bfloat16_here(torch.device("cpu"))
    flags.add_argument("--quick", action="store_true", help="one layer, 5 rounds")
    flags.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                       default=["float32", "bfloat16"] if native else ["float32"])  # fmt: skip
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    keep_freed_memory()
    result = {setting.name: measure(setting) for setting in settings(given.quick, given.dtype)}
    if given.json:
        write(given.json, {"bfloat16 in hardware": native, "settings": result})


if __name__ == "__main__":
    main()
