"""SIGKILL at random moments of `lora train`, and on again each time.

python -m benchmarks.kills [--quick] [--kills N] [--json FILE]

A small DistilBERT learns six words; a checkpoint every second step. The process is killed after a
time drawn at random, from its training's first step on, and resumed, until it was killed N times,
and its result is held against that of a run that nobody disturbed: the adapter's bytes, the losses,
the evaluations, the predictions. When a run ends before it is killed, the next one begins. How many
kills fell into the writing of a checkpoint is counted by what they left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from lora.finetune.record import metrics_of


def files(run: Path) -> dict[str, Any]:
    """What the end of a run has to be equal in."""
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "predictions": (run / "predictions.jsonl").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k != "seconds"} for row in metrics_of(run)],
    }


def survive(flags: Sequence[str], run: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a run `kills` times and go on with it each time, to its end; what happened."""
    rng = random.Random(seed)
    found = {"kills": 0, "within a save": 0, "before the first checkpoint": 0, "runs": 1}
    metrics = run / "metrics.jsonl"
    while True:
        began = run.exists()
        how = ["--resume", str(run)] if began else [*flags, "--run-dir", str(run)]
        process = subprocess.Popen(
            [sys.executable, "-m", "lora", "train", *how],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if found["kills"] < kills:
            _wait_for_a_step(process, metrics)
            time.sleep(rng.random() * 0.5)
            process.kill()
        _, error = process.communicate()
        if process.returncode == -9:
            found["kills"] += 1
            print(f"{found['kills']} of {kills} kills", file=sys.stderr)
            found["within a save"] += any((run / "checkpoints").glob(".step-*"))
            found["before the first checkpoint"] += not any((run / "checkpoints").glob("step-*"))
        elif process.returncode:
            raise SystemExit(f"lora train ended with {process.returncode}: {error}")
        if (run / "summary.json").is_file():  # its result is written, and it may be killed then too
            if found["kills"] >= kills:
                return found
            shutil.rmtree(run)
            found["runs"] += 1


def _wait_for_a_step(process: subprocess.Popen[str], metrics: Path) -> None:
    """Until a line is added; one that goes on cuts the file to its checkpoint's length first."""
    least = sys.maxsize
    while process.poll() is None:
        size = metrics.stat().st_size if metrics.is_file() else sys.maxsize
        if size > least:
            return
        least = min(least, size)
        time.sleep(0.001)


def task(folder: Path) -> list[str]:
    """A base and data of a second's training, as flags."""
    import torch
    import transformers

    from lora.finetune.models import load_base

    torch.manual_seed(0)
    shape = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=30522
    )
    transformers.DistilBertModel(shape).save_pretrained(folder / "base")
    load_base("demo", 2, "classification", 0).tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    words = ("good", "fine", "splendid", "bad", "poor", "dreadful")
    for split in ("train", "dev", "test"):
        rows = [f"a {words[i % 6]} film, number {i}\t{int(i % 6 < 3)}" for i in range(160)]
        (folder / "data" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    flags = f"--epochs 3 --batch-size 8 --micro-batch-size 5 --r 2 --lora-dropout 0.1 \
        --learning-rate 0.01 --save-steps 2 --base {folder}/base --data {folder}/data"
    return flags.split()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="5 kills")
    flags.add_argument("--kills", type=int, default=200)
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    kills = 5 if given.quick else given.kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LORA_CACHE"] = str(folder / "cache")
        settings = task(folder)
        survive(settings, folder / "whole", 0, 0)
        found: dict[str, Any] = dict(survive(settings, folder / "run", kills, seed=0))
        whole, survived = files(folder / "whole"), files(folder / "run")
    found["equal"] = {name: whole[name] == survived[name] for name in whole}
    for key, value in found.items():
        print(f"{key:<28} {value}")
    if given.json:
        write(given.json, found)
    if not all(found["equal"].values()):
        sys.exit("the killed run did not come to the undisturbed one's result.")


if __name__ == "__main__":
    main()
