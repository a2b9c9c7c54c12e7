"""What the two training scripts of the first version share: their flags and their default base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora.finetune.cli import main
from lora.interop.hub import hub_answers

BASE, DATA = "distilbert-base-uncased", "glue/sst2"


def parser(description: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--epochs", type=int, default=3)
    flags.add_argument("--batch_size", type=int, default=16)
    flags.add_argument("--learning_rate", type=float)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--limit", type=int, help="use only the first N rows of every split")
    flags.add_argument("--base", default=BASE)
    flags.add_argument("--data", default=DATA)
    flags.add_argument("--run_dir", type=Path)
    return flags


def train(flags: argparse.Namespace, *extra: str) -> int:
    """`lora train` with the flags; the embedded default, said loudly, where the hub is away."""
    base, data, note = flags.base, flags.data, []
    away = [name for name, value in ((BASE, base), (DATA, data)) if name == value]
    if away and not hub_answers():
        base = "demo" if base == BASE else base
        data = "demo" if data == DATA else data
        said = f"the hub does not answer: the embedded default stands in for {' and '.join(away)}"
        print(f"!!! {said} !!!", file=sys.stderr)
        note = ["--note", said]
    arguments = ["--base", base, "--data", data, *extra, *note]
    for name in ("epochs", "batch_size", "learning_rate", "seed", "limit", "run_dir"):
        value = getattr(flags, name)
        if value is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    return main(["train", *arguments])
