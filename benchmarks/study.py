"""The study of methods on film reviews and on SST-2, method by method.

python -m benchmarks.study films|sst2 [--methods NAME ...] [--runs DIR]

Hours of two cores. Each step runs `lora compare` of recipes/study-NAME.toml with one method more,
then copies comparison.json to results/study-NAME/: what is finished can be committed while
the next method trains. Runs that are complete are not run again, so that a stopped study goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks.machine import RESULTS

ROOT = Path(__file__).parents[1]


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("name", choices=("films", "sst2"))
    flags.add_argument("--methods", nargs="+", help="in this order. Default: that of the recipe")
    flags.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    flags.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    given = flags.parse_args()
    recipe = ROOT / "recipes" / f"study-{given.name}.toml"
    methods = given.methods or list(tomllib.loads(recipe.read_text(encoding="utf-8"))["methods"])
    folder, results = given.runs / f"study-{given.name}", RESULTS / f"study-{given.name}"
    results.mkdir(parents=True, exist_ok=True)
    for count in range(1, len(methods) + 1):
        command = [sys.executable, "-m", "lora", "compare", "--config", recipe, "--methods",
                   *methods[:count], "--jobs", str(given.jobs), "--run-dir", folder]  # fmt: skip
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
        # Folders of runs as from the root of a checkout, whatever --runs is.
        text = (folder / "comparison.json").read_text(encoding="utf-8")
        text = text.replace(f'"{folder}/', f'"runs/{folder.name}/')
        (results / "comparison.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
