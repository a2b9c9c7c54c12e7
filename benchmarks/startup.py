"""Seconds until the command answers, what `import lora` adds to `import torch`, and an injection.

python -m benchmarks.startup [--quick] [--json FILE]

Fresh processes, the contenders in turn, medians of the rounds. The injection is r = 16 on all
linear layers of Llama-2-7B's shape on the meta device, in one process, beside peft's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from benchmarks.turns import median, take_turns

CORE = "lora.inject, lora.save, lora.load, lora.merge, lora.METHODS"
CONTENDERS = {
    "python": ["-c", "pass"],
    "lora --help": ["-m", "lora", "--help"],
    "lora train --help": ["-m", "lora", "train", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, lora": ["-c", "import torch, lora"],
    "import torch, lora and all its core": ["-c", f"import torch, lora; {CORE}"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def injections() -> dict[str, Callable[[], float]]:
    """Seconds to adapt Llama-2-7B's shape without its weights."""
    import peft
    import torch
    import transformers

    import lora

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def model() -> Any:
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig())

    def ours() -> float:
        base = model()
        started = time.perf_counter()
        lora.inject(base, lora.LoRAConfig(r=16))
        return time.perf_counter() - started

    def pefts() -> float:
        base, config = model(), peft.LoraConfig(r=16, target_modules=linears)
        started = time.perf_counter()
        with torch.device("meta"):
            peft.get_peft_model(base, config)
        return time.perf_counter() - started

    return {"inject into Llama-2-7B's shape": ours, "peft, the same": pefts}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="3 rounds, not 15")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    names = list(CONTENDERS)
    starts = {name: partial(seconds, CONTENDERS[name]) for name in names}
    found = take_turns(starts, 3 if given.quick else 15)
    medians = {name: median(found, name) for name in names}
    whole, torch = "import torch, lora and all its core", "import torch"
    added = [times[whole] - times[torch] for times in found]
    medians["import lora and all its core, added"] = statistics.median(added)
    contenders = injections()
    injected = take_turns(contenders, 3 if given.quick else 7)
    medians |= {name: median(injected, name) for name in contenders}
    for name, value in medians.items():
        print(f"{name:<38} {value:6.3f} s")
    if given.json:
        write(given.json, {"seconds": medians, "rounds": found, "injections": injected})


if __name__ == "__main__":
    main()
