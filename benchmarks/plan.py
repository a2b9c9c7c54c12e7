"""What `lora plan` says a run needs, beside what `lora train` came to.

python -m benchmarks.plan [--quick] [--json FILE]

The demo with LoRA, full fine-tuning, QLoRA and BitFit; and on a LLaMA of 1 GB of random float32
weights, made for the run, LoRA in float32, on NF4 and held in bfloat16, over 224 rows of the demo's
reviews (bfloat16 if the processor has bfloat16 matrix multiplication). Each is planned and trained
in processes of their own: the plan's `peak` over the `peak_bytes` of the run's summary. --quick:
the demo alone, one epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write
from lora.finetune.memory import bfloat16_here
from lora.finetune.record import summary_of

MB = 10**6
DEMO = ("lora", "full", "qlora", "bitfit")
LARGE = {
    "1 GB, lora float32": ["--dtype", "float32"],
    "1 GB, lora on nf4": ["--dtype", "float32", "--quantize", "nf4"],
    "1 GB, lora bfloat16": ["--dtype", "bfloat16"],
}
RECIPE = ("--config", "recipes/demo.toml", "--data", "demo-tiny")


def make(folder: Path) -> list[str]:
    """The model's files and the data; the flags that name them."""
    import transformers

    from lora.finetune import demo
    from lora.finetune.models import load_base

    base, data = folder / "base", folder / "data"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=13, num_attention_heads=16,
        vocab_size=30522, num_labels=2, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(base)
    load_base("demo", 2, "classification", 0).tokenizer.save_pretrained(base)
    data.mkdir()
    with demo.REVIEWS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    head, *reviews = rows
    column = head.index("split")
    for split, most in (("train", 96), ("dev", 64), ("test", 64)):
        own = [row for row in reviews if row[column] == split][:most]
        with (data / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([head, *own])
    return ["--base", str(base), "--data", str(data), "--epochs", "2"]


def measure(flags: list[str], folder: Path) -> dict[str, Any]:
    """The dry run and the run."""
    said = subprocess.run(
        [sys.executable, "-m", "lora", "plan", *flags, "--json"],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    (memory, *_) = json.loads(said)["memory"]
    run = folder / "run"
    command = [sys.executable, "-m", "lora", "train", *flags, "--run-dir", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = summary_of(run)["peak_bytes"]
    return {"planned": memory, "peak_bytes": peak, "ratio": memory["peak"] / peak}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="the demo alone, one epoch")
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = {
            f"demo, {method}": [*RECIPE, "--method", method]
            + (["--epochs", "1"] if given.quick else [])
            for method in DEMO
        }
        if not given.quick:
            where = make(folder)
            asked |= {
                what: [*where, *more]
                for what, more in LARGE.items()
                if "bfloat16" not in more or bfloat16_here(torch.device("cpu"))
            }
        print(f"{'run':<20} {'planned':>8} {'measured':>8}   MB")
        for number, (what, own) in enumerate(asked.items()):
            each = folder / str(number)
            each.mkdir()
            found = runs[what] = measure(own, each)
            planned = found["planned"]["peak"] / MB
            print(
                f"{what:<20} {planned:8.0f} {found['peak_bytes'] / MB:8.0f}   {found['ratio']:.3f}",
                flush=True,
            )
    if given.json:
        write(given.json, {"runs": runs})


if __name__ == "__main__":
    main()
