"""Where the methods' default learning rates come from: the score on dev at two rates of each.

python -m benchmarks.rates [--quick] [--runs FOLDER] [--json FILE]

1,200 sentences of ../shared/data/sst2-sentences, two epochs, one seed, one thread: enough to tell
a rate that is far off from one that is not, and no more. A run that FOLDER holds is taken as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import write
from lora.finetune.record import summary_of

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2-sentences"
RATES = {
    "adalora": ("2e-3", "5e-3"),
    "bitfit": ("1e-3", "4e-3"),
    "head": ("1e-3", "5e-3"),
    "hira": ("1e-3", "3e-3"),
    "ia3": ("5e-3", "2e-2"),
    "topk": ("5e-5", "3e-4"),
    "vera": ("1e-2", "3e-2"),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="64 sentences, not 1,200")
    flags.add_argument("--runs", type=Path, default=Path("runs/rates"))
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not here: outside data, never part of the tree")
    found: dict[str, dict[str, float]] = {}
    for method, rates in RATES.items():
        for rate in rates:
            run = given.runs / f"{method}-{rate}"
            if not (run / "summary.json").is_file():
                subprocess.run(
                    [
                        *(sys.executable, "-m", "lora", "train", "--data", str(DATA)),
                        *("--limit", "64" if given.quick else "1200", "--epochs", "2"),
                        *("--method", method, "--learning-rate", rate, "--run-dir", str(run)),
                    ],
                    check=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            summary = summary_of(run)
            score = summary["evaluations"][-1]["dev"]["accuracy"]
            found.setdefault(method, {})[rate] = score
            print(f"{method:<8} {rate:>5}  dev accuracy {score:.4f}")
    if given.json:
        write(given.json, {"dev accuracy": found})


if __name__ == "__main__":
    main()
