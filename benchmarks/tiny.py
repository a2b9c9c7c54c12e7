"""The spread of `make demo-lm-tiny` over seeds, threads and kernels, in exact match.

python -m benchmarks.tiny [--runs DIR] [--json FILE]

Each condition trains its own base by recipes/demo-lm-tiny-base.toml, merges it, and compares the
methods by recipes/demo-lm-tiny.toml. The conditions differ in the seed, in the number of threads,
and in torch's kernels (ATEN_CPU_CAPABILITY=default: without AVX2), which round differently. Run it
in the repository. Complete runs are reused, and interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from lora.finetune.comparison.analysis import read_analysis
from lora.finetune.record import summary_of

RECIPES = Path(__file__).parents[1] / "recipes"
CONDITIONS = {
    "seed 0, 1 thread": (0, {"OMP_NUM_THREADS": "1"}),
    "seed 1, 2 threads": (1, {"OMP_NUM_THREADS": "2"}),
    "seed 2, 1 thread, without AVX2": (
        2,
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    ),
}
"""What is shown -> the seed of the base and of the methods, and the environment."""


def measure(folder: Path, seed: int, environment: dict[str, str]) -> dict[str, Any]:
    """Trains a base, adapts it with every method, and returns the scores."""
    environment = os.environ | environment
    training, base, comparison = folder / "training", folder / "base", folder / "comparison"

    def lora(*arguments: object) -> None:
        command = [sys.executable, "-m", "lora", *map(str, arguments)]
        subprocess.run(command, check=True, env=environment)

    if training.is_dir() and not (training / "summary.json").is_file():
        lora("train", "--resume", training)
    elif not training.is_dir():
        lora("train", "--config", RECIPES / "demo-lm-tiny-base.toml", "--seed", seed,
             "--run-dir", training)  # fmt: skip
    if not base.is_dir():
        lora("merge", training, "--output", base)
    recipe = (RECIPES / "demo-lm-tiny.toml").read_text(encoding="utf-8")
    config = folder / "comparison.toml"  # --seeds 2 would be two seeds
    config.write_text(f"seeds = [{seed}]\n{recipe}", encoding="utf-8")
    lora("compare", "--config", config, "--base", base, "--run-dir", comparison)
    methods = read_analysis(comparison / "comparison.json").methods
    return {
        "base": scores(summary_of(training)),
        "methods": {
            summary["method"]: scores(summary) for method in methods for summary in method.summaries
        },
    }


def scores(summary: Any) -> dict[str, Any]:
    """Returns the share of exact answers, in all and by task, and the loss."""
    tasks = {
        name.partition("/")[2]: value
        for name, value in summary["metrics"].items()
        if name.startswith("exact_match/")
    }
    return {
        "exact match": summary["metrics"]["exact_match"],
        "by task": tasks,
        "loss": summary["loss"],
    }


def spread(conditions: dict[str, Any]) -> dict[str, float]:
    """Returns the difference between the best and the worst exact match of the base and methods."""
    results = list(conditions.values())
    values = {"base": [result["base"]["exact match"] for result in results]}
    for method in results[0]["methods"]:
        values[method] = [result["methods"][method]["exact match"] for result in results]
    return {name: max(each) - min(each) for name, each in values.items()}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--runs", type=Path, default=Path("runs/tiny"))
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    conditions = {}
    for number, (name, (seed, environment)) in enumerate(CONDITIONS.items()):
        print(f"== {name}", flush=True)
        conditions[name] = measure(given.runs / str(number), seed, environment)
    result = {"conditions": conditions, "best less worst": spread(conditions)}
    print(json.dumps(result["best less worst"], indent=2))
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
