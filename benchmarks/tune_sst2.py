"""The grid behind recipes/sst2.toml: learning rates on sst2-sentences, chosen by dev alone.

python -m benchmarks.tune_sst2 [--data DIR] [--runs DIR] [--json FILE]

The test split is not in what the runs see. A run that is complete is taken as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import write
from lora.run import summary_of

LORA = ["--r", "8", "--lora-alpha", "16"]
GRID = {
    "lora-r8a16-5e4": [*LORA, "--learning-rate", "5e-4"],
    "lora-r8a16-1e3": [*LORA, "--learning-rate", "1e-3"],
    "lora-r8a16-2e3": [*LORA, "--learning-rate", "2e-3"],
    "lora-r4a8-1e3": ["--r", "4", "--lora-alpha", "8", "--learning-rate", "1e-3"],
    "lora-r8a16-1e3-d1": [*LORA, "--learning-rate", "1e-3", "--lora-dropout", "0.1"],
    "full-3e5": ["--method", "full", "--learning-rate", "3e-5"],
    "full-5e5": ["--method", "full", "--learning-rate", "5e-5"],
    "full-1e4": ["--method", "full", "--learning-rate", "1e-4"],
    "full-2e4": ["--method", "full", "--learning-rate", "2e-4"],
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, default=Path("../shared/data/sst2-sentences"))
    flags.add_argument("--runs", type=Path, default=Path("runs/tune-sst2"))
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    seen = given.runs / "data"
    seen.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        if not (seen / f"{split}.tsv").exists():
            shutil.copy(given.data / f"{split}.tsv", seen)
    found = {}
    for name, extra in GRID.items():
        run = given.runs / name
        if not (run / "summary.json").is_file():
            command = [sys.executable, "-m", "lora", "train", "--data", str(seen)]
            command += ["--run-dir", str(run), "--epochs", "3", *extra]
            subprocess.run(command, check=True, env=os.environ)
        summary = summary_of(run)
        assert summary["split"] == "dev"
        found[name] = {
            "flags": " ".join(extra),
            "dev_accuracy": [epoch["dev"]["accuracy"] for epoch in summary["epochs"]],
            "dev_loss": [epoch["dev_loss"] for epoch in summary["epochs"]],
        }
        print(f"{name:<20} dev accuracy {found[name]['dev_accuracy'][-1]:.4f}")
    if given.json:
        write(given.json, {"grid": found})


if __name__ == "__main__":
    main()
