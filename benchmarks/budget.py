"""Does a comparison end within its --budget? LoRA against full fine-tuning on the film reviews.

python -m benchmarks.budget [--budget 20m] [--json FILE]

Runs `lora compare` as a user would, on an otherwise idle machine, and measures the whole command.
Needs the data of `lora data fetch reviews`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, write
from lora.finetune.comparison.analysis import read_analysis
from lora.finetune.comparison.budget import BUDGET_FILE
from lora.finetune.comparison.grid import seconds_in

FLAGS = ("--methods", "lora", "full", "--rates", "auto", "--seeds", "3")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--budget", default="20m")
    flags.add_argument("--json", type=Path, default=RESULTS / "budget.json")
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "runs"
        command = ["compare", *FLAGS, "--data", "demo", "--base", "demo", "--budget", given.budget]
        start = time.perf_counter()
        run = [sys.executable, "-m", "lora", *command, "--run-dir", str(folder)]
        code = subprocess.run(run, check=False).returncode  # not 0 if a seed was left
        seconds = time.perf_counter() - start
        analysis = read_analysis(folder / "comparison.json")
        rows = json.loads((folder / BUDGET_FILE).read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "command of the comparison": " ".join(["lora", *command]),
        "budget, s": seconds_in(given.budget),
        "s": seconds,
        "exit code": code,
        "rows": {split: rows[split] for split in ("train", "dev", "test") if split in rows},
        "methods": {
            each.name: {
                "rates tried": len(each.search.tried) if each.search else 0,
                "bracketed": bool(each.search and each.search.bracketed),
                "seeds": len(each.seeds),
                f"test {analysis.metric}": each.mean,
            }
            for each in analysis.methods
        },
    }
    write(given.json, result)


if __name__ == "__main__":
    main()
