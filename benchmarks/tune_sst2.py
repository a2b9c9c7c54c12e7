"""The grid behind recipes/sst2.toml: settings on sst2-sentences, chosen by dev alone.

python -m benchmarks.tune_sst2 [--data DIR] [--runs DIR] [--jobs N] [--only NAME ...]
    [--seeds N ...] [--json FILE]

Every setting is run with three seeds, QLoRA's and BitFit's with one; the best mean accuracy on dev
after the last epoch is the recipe's. The test split is not in what the runs see. A run that is
complete is taken as it is, one that was cut off starts again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import write
from lora.finetune.record import summary_of

NORMS = "--modules-to-save sa_layer_norm output_layer_norm"
GRID = {
    "full-1e4": "--method full --learning-rate 1e-4",
    "lora-r8a64-25e5": "--r 8 --lora-alpha 64 --learning-rate 2.5e-4",
    "lora-r8a32-5e4": "--r 8 --lora-alpha 32 --learning-rate 5e-4",
    "lora-r8a16-1e3-norms": f"--r 8 --lora-alpha 16 --learning-rate 1e-3 {NORMS}",
    "lora-r16a32-5e4-norms": f"--r 16 --lora-alpha 32 --learning-rate 5e-4 {NORMS}",
    "full-5e5": "--method full --learning-rate 5e-5",
    "qlora-r8a32-5e4": "--method qlora --r 8 --lora-alpha 32 --learning-rate 5e-4",
    "qlora-r8a32-25e5": "--method qlora --r 8 --lora-alpha 32 --learning-rate 2.5e-4",
    "qlora-r8a32-1e3": "--method qlora --r 8 --lora-alpha 32 --learning-rate 1e-3",
    "bitfit-1e3": "--method bitfit --learning-rate 1e-3",
    "bitfit-2e3": "--method bitfit --learning-rate 2e-3",
    "bitfit-5e3": "--method bitfit --learning-rate 5e-3",
}


def train(run: Path, data: Path, flags: list[str], threads: int) -> dict[str, Any]:
    """The summary of one run, trained unless it is complete."""
    if not (run / "summary.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-m", "lora", "train", "--data", str(data)]
        command += ["--run-dir", str(run), "--epochs", "3", *flags]
        with run.with_suffix(".log").open("w") as log:
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, check=True, env=env, stdout=log, stderr=log)
    summary = summary_of(run)
    assert summary["split"] == "dev"
    print(f"{run.name:<24} dev accuracy {summary['metrics']['accuracy']:.4f}", flush=True)
    return summary


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, default=Path("../shared/data/sst2-sentences"))
    flags.add_argument("--runs", type=Path, default=Path("runs/tune-sst2"))
    flags.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    flags.add_argument("--only", nargs="+", choices=GRID, default=list(GRID))
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    seen = given.runs / "data"
    seen.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        shutil.copy(given.data / f"{split}.tsv", seen)
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            (name, seed): pool.submit(
                train,
                given.runs / f"{name}-{seed}",
                seen,
                [*GRID[name].split(), "--seed", str(seed)],
                threads,
            )
            for name in given.only
            for seed in given.seeds
        }
        found = {}
        for name in given.only:
            ends = [runs[name, seed].result() for seed in given.seeds]
            accuracy = [[row["dev"]["accuracy"] for row in end["evaluations"]] for end in ends]
            found[name] = {
                "flags": GRID[name],
                "dev_accuracy": accuracy,
                "dev_loss": [[row["dev_loss"] for row in end["evaluations"]] for end in ends],
                "train_loss": [[row["loss"] for row in end["evaluations"]] for end in ends],
                "mean_dev_accuracy": mean(run[-1] for run in accuracy),
            }
            print(f"{name:<24} mean         {found[name]['mean_dev_accuracy']:.4f}", flush=True)
    if given.json:
        write(given.json, {"seeds": given.seeds, "grid": found})


if __name__ == "__main__":
    main()
