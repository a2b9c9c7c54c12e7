"""Seconds until the command answers, and what `import lora` adds to `import torch`.

python -m benchmarks.startup [--quick] [--json FILE]

Fresh processes, the contenders in turn, medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import write

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


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="3 rounds, not 15")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    names = list(CONTENDERS)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(3 if given.quick else 15):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(seconds(CONTENDERS[name]))
    medians = {name: statistics.median(times) for name, times in found.items()}
    added = [
        whole - torch
        for whole, torch in zip(
            found["import torch, lora and all its core"], found["import torch"], strict=True
        )
    ]
    medians["import lora and all its core, added"] = statistics.median(added)
    for name, value in medians.items():
        print(f"{name:<38} {value:6.3f} s")
    if given.json:
        write(given.json, {"seconds": medians, "rounds": found})


if __name__ == "__main__":
    main()
