"""The grid behind recipes/demo.toml: a learning rate for each method, chosen by dev alone.

python -m benchmarks.tune_demo [--runs DIR] [--jobs N] [--only METHOD ...] [--json FILE]

Every method is trained with the recipe's other settings and each rate of RATES, one seed. The rate
with the best accuracy on dev is the recipe's. The runs do not see the test split. A run that is
complete is taken as it is; one that was interrupted starts again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from lora.finetune.data.opinions import read_opinions
from lora.finetune.record import summary_of

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
# A factor of 2 between neighbours. The middle ones run first.
RATES = {
    "lora": (2e-3, 4e-3, 1e-3, 8e-3, 5e-4),
    "full": (1e-4, 2e-4, 5e-5, 4e-4, 2.5e-5),
    "bitfit": (4e-3, 8e-3, 2e-3, 1.6e-2, 1e-3),
}


def write_data(folder: Path, limit: int) -> None:
    """Writes the rows of train and dev that the recipe uses. One row of dev stands for test, since
    a run without a test split would score dev twice."""
    folder.mkdir(parents=True, exist_ok=True)
    opinions = read_opinions("films")
    rows = {
        split: [f"{o.text}\t{o.label}\n" for o in opinions if o.split == split][:limit]
        for split in ("train", "dev")
    }
    rows["test"] = rows["dev"][:1]
    for split, lines in rows.items():
        text = "".join(["text\tlabel\n", *lines])
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")


def train(run: Path, data: Path, method: str, rate: float, threads: int) -> dict[str, float]:
    """The last evaluation on dev of one run, trained unless it is complete."""
    if not (run / "summary.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-m", "lora", "train", "--config", str(RECIPE)]
        command += ["--method", method, "--learning-rate", str(rate), "--eval-steps", "1000000"]
        command += ["--data", str(data), "--run-dir", str(run)]
        with run.with_name(f"{run.name}.log").open("w") as log:
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, check=True, env=env, stdout=log, stderr=log)
    last = summary_of(run)["evaluations"][-1]
    print(f"{run.name:<16} dev accuracy {last['dev']['accuracy']:.4f}", flush=True)
    return {"dev_accuracy": last["dev"]["accuracy"], "dev_loss": last["dev_loss"]}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--runs", type=Path, default=Path("runs/tune-demo"))
    flags.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    flags.add_argument("--only", nargs="+", choices=RATES, default=list(RATES))
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    data = given.runs / "data"
    write_data(data, recipe["limit"])
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    order = [(method, RATES[method][i]) for i in range(5) for method in given.only]
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            (method, rate): pool.submit(
                train, given.runs / f"{method}-{rate:g}", data, method, rate, threads
            )
            for method, rate in order
        }
        results: dict[str, dict[str, Any]] = {
            method: {f"{rate:g}": runs[method, rate].result() for rate in sorted(RATES[method])}
            for method in given.only
        }
    if given.json:
        write(given.json, {"rates": results})


if __name__ == "__main__":
    main()
