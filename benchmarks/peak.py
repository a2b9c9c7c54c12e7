"""The memory of LoRA, QLoRA and full fine-tuning in whole runs of `lora train`.

python -m benchmarks.peak [--quick] [--json FILE]

On the demo's classifier and on demo-lm-tiny. Runs are short, since the first steps need what the
others need. Each is a process, forked from one that has imported the libraries. The methods take
turns, three times. The three numbers of a run's summary.json are reported: training_bytes,
peak_bytes and process_bytes (lora.finetune.peak says what each counts). --quick: one turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401  (the runs need these three)
import transformers.models.distilbert.modeling_distilbert
import transformers.models.llama.modeling_llama  # noqa: F401

from benchmarks.machine import write
from lora.finetune.config import parse_run
from lora.finetune.record import summary_of
from lora.finetune.run import run
from lora.kernels.scratch import keep_freed_memory

METHODS = ("lora", "qlora", "full")
SIZES = ("training_bytes", "peak_bytes", "process_bytes")
TEXTS = ["--data", "tasks/shout", "tasks/spell", "tasks/last", "--max-length", "64",
         "--answered", "0"]  # fmt: skip
BASES = {
    "MiniLM as DistilBERT, 22.7 M": [
        "--base", "demo", "--data", "demo-tiny", "--batch-size", "16", "--limit", "64",
    ],
    "demo-lm-tiny, 0.5 M": ["--base", "demo-lm-tiny", *TEXTS, "--batch-size", "32",
                            "--limit", "150"],
}  # fmt: skip
FLAGS = ["--epochs", "1", "--dtype", "float32", "--keep-last", "0", "--keep-best", "0"]
ADAPTER = ["--r", "8", "--target-modules", "all-linear"]


def train(flags: list[str]) -> None:
    """One run, as `lora train` does it."""
    keep_freed_memory()
    run(parse_run(flags))


def in_a_process(function: Callable[..., None], *arguments: object) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{arguments} failed.")


def measure(method: str, flags: list[str]) -> dict[str, int]:
    """The memory of one run."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        adapter = [] if method == "full" else ADAPTER
        given = ["--method", method, *flags, *FLAGS, *adapter, "--run-dir", str(directory)]
        in_a_process(train, given)
        summary: dict[str, Any] = {**summary_of(directory)}
    return {size: summary[size] for size in SIZES}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="one turn")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    results: dict[str, dict[str, list[dict[str, int]]]] = {}
    for name, asked in BASES.items():
        results[name] = {method: [] for method in METHODS}
        for _ in range(1 if given.quick else 3):
            for method in METHODS:
                results[name][method].append(measure(method, asked))
        for method, runs in results[name].items():
            shown = (
                f"{statistics.median(run[size] for run in runs) / 2**20:8.1f}" for size in SIZES
            )
            print(f"{name:<30} {method:<6} {' '.join(shown)} MiB", flush=True)
    if given.json:
        write(given.json, {"runs": results})


if __name__ == "__main__":
    main()
