"""The studies of methods: on film reviews and SST-2, and of a language model; method by method.

python -m benchmarks.study NAME [--methods NAME ...] [--runs DIR] [--jobs N]

Hours of two cores. Each step runs `lora compare` of recipes/study-NAME.toml with one method more,
then writes comparison.json and runs.tar.xz to results/study-NAME/, to be committed
while the next method trains. runs.tar.xz holds what `lora compare` reads of the runs, so that the
study goes on from there on another machine. Runs that are complete are not run again.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from benchmarks.machine import RESULTS

ROOT = Path(__file__).parents[1]
PACKED = ("config.toml", "environment.json", "metrics.jsonl", "predictions.jsonl", "summary.json")


def pack(folder: Path, archive: Path) -> None:
    """Writes what `lora compare` reads of the complete runs below a folder. The probabilities of
    classes, nine tenths of the bytes, are none of it."""
    files = [
        run.parent / name
        for run in sorted(folder.rglob("summary.json"))
        for name in PACKED
        if (run.parent / name).is_file()
    ]
    with tarfile.open(archive, "w:xz") as packed:
        for file in files:
            content = file.read_bytes()
            if file.name == "predictions.jsonl":
                content = b"".join(map(without_scores, content.splitlines()))
            entry = tarfile.TarInfo(file.relative_to(folder).as_posix())
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))


def without_scores(line: bytes) -> bytes:
    """A row of predictions without the probabilities of its classes."""
    row = {key: value for key, value in json.loads(line).items() if key != "scores"}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def unpack(archive: Path, folder: Path) -> None:
    """Writes the runs of an archive below a folder, but those that are there."""
    with tarfile.open(archive) as packed:
        for entry in packed:
            if not (folder / entry.name).exists():
                packed.extract(entry, folder, filter="data")


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("name", choices=("films", "sst2", "smollm2-films", "smollm2-e2e"))
    flags.add_argument("--methods", nargs="+", help="in this order. Default: that of the recipe")
    flags.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    flags.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    given = flags.parse_args()
    recipe = ROOT / "recipes" / f"study-{given.name}.toml"
    methods = given.methods or list(tomllib.loads(recipe.read_text(encoding="utf-8"))["methods"])
    folder, results = given.runs / f"study-{given.name}", RESULTS / f"study-{given.name}"
    archive = results / "runs.tar.xz"
    results.mkdir(parents=True, exist_ok=True)
    if archive.is_file():
        unpack(archive, folder)
    for count in range(1, len(methods) + 1):
        command = [sys.executable, "-m", "lora", "compare", "--config", recipe, "--methods",
                   *methods[:count], "--jobs", str(given.jobs), "--run-dir", folder]  # fmt: skip
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
        # Folders of runs as from the root of a checkout, whatever --runs is.
        text = (folder / "comparison.json").read_text(encoding="utf-8")
        text = text.replace(f'"{folder}/', f'"runs/{folder.name}/')
        (results / "comparison.json").write_text(text, encoding="utf-8")
        pack(folder, archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
