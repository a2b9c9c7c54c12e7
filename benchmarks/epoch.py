"""One epoch of LoRA on SST-2's sentences, ours beside transformers.Trainer with peft.

python -m benchmarks.epoch [--quick] [--seeds N] [--json FILE]

MiniLM's weights in DistilBERT, r = 8 on all six linears of each layer, dropout 0.1, a new head that
trains too, batch 16, AdamW at 5e-4, a linear schedule. Each contender is a process, as its user
would start it, and times its epoch from the tokenised texts to the last step; the contenders take
turns, in an order that rotates with the seed. "trainer" is Trainer at its defaults: rows in random
order, each batch padded to its longest. "trainer, best" groups rows of a length, and computes in
bfloat16 where the processor has it. Accuracy is on test.tsv, after that one epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.step import LINEARS

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2-sentences"
HEADS = ["pre_classifier", "classifier"]
CONTENDERS = ("ours", "trainer", "trainer, best")
RATE, WARMUP = 5e-4, 0.06


def ours(seed: int, limit: int | None, folder: str) -> dict[str, float]:
    from lora.finetune.config import RunConfig
    from lora.finetune.run import run
    from lora.kernels.scratch import keep_freed_memory
    from lora.methods.lora import LoRAConfig

    keep_freed_memory()  # as `lora train` does
    settings = LoRAConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=tuple(LINEARS))
    config: RunConfig[Any] = RunConfig(
        data=(str(DATA),), epochs=1, batch_size=16, learning_rate=RATE, warmup=WARMUP, seed=seed,
        limit=limit, run_dir=Path(folder) / "run", settings=settings,
    )  # fmt: skip
    found = run(config)
    return {"seconds": found["train_seconds"], "accuracy": found["metrics"]["accuracy"]}


def trainer(seed: int, limit: int | None, folder: str, best: bool) -> dict[str, float]:
    import peft
    import torch
    import transformers

    from lora.finetune.data.corpus import read_examples
    from lora.finetune.memory import bfloat16_here
    from lora.finetune.models import load_base

    corpus = read_examples(str(DATA), limits=dict.fromkeys(("train", "dev", "test"), limit))
    base = load_base("demo", 2, "classification", seed)
    transformers.set_seed(seed)
    model = peft.get_peft_model(
        base.model,
        peft.LoraConfig(
            r=8, lora_alpha=8, lora_dropout=0.1, target_modules=LINEARS, modules_to_save=HEADS
        ),
    )

    def rows(split: Any) -> list[dict[str, Any]]:
        labels = corpus.targets(split)
        found = base.tokenizer([e.text for e in split], truncation=True, max_length=128)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": int(label)}
            for ids, mask, label in zip(
                found["input_ids"], found["attention_mask"], labels, strict=True
            )
        ]

    settings: dict[str, Any] = {}
    if best:
        settings["train_sampling_strategy"] = "group_by_length"
        settings["bf16"] = bfloat16_here(torch.device("cpu"))
    given = transformers.TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=RATE,
        warmup_steps=WARMUP, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **settings,
    )  # fmt: skip
    run = transformers.Trainer(
        model, given, train_dataset=rows(corpus.train), processing_class=base.tokenizer,
        data_collator=transformers.DataCollatorWithPadding(base.tokenizer),
    )  # fmt: skip
    started = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - started
    found = run.predict(rows(corpus.test))  # grouped by length: in an order of its own
    right = found.predictions.argmax(-1) == found.label_ids
    return {"seconds": seconds, "accuracy": float(right.mean())}


def one(contender: str, seed: int, limit: int | None) -> dict[str, float]:
    """A contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.epoch", "--one", contender, "--seeds", str(seed)]
    command += ["--limit", str(limit)] if limit else []
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="160 rows, one seed")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--json", type=Path)
    flags.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    flags.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA} is not here: SST-2's sentences as train.tsv, dev.tsv and test.tsv.")
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            call = (given.seeds, given.limit, folder)
            found = ours(*call) if given.one == "ours" else trainer(*call, "best" in given.one)
        print(json.dumps(found))
        return
    import torch

    from benchmarks.machine import write
    from lora.finetune.memory import bfloat16_here

    seeds, limit = (1, 160) if given.quick else (given.seeds, None)
    rounds: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        order = CONTENDERS[seed % 3 :] + CONTENDERS[: seed % 3]
        rounds.append({name: one(name, seed, limit) for name in order})
        for name in CONTENDERS:
            row = rounds[-1][name]
            print(f"seed {seed}  {name:<14} {row['seconds']:7.1f} s  {row['accuracy']:.2%}")
    result: dict[str, Any] = {"seeds": rounds}
    for name in CONTENDERS[1:]:
        ratios = [row[name]["seconds"] / row["ours"]["seconds"] for row in rounds]
        result[f"{name} / ours"] = statistics.median(ratios)
        print(f"{name} / ours: {statistics.median(ratios):.2f}")
    for name in CONTENDERS:
        result[f"{name} accuracy"] = statistics.mean(row[name]["accuracy"] for row in rounds)
        print(f"{name} accuracy: {result[f'{name} accuracy']:.2%}")
    if given.json:
        native = bfloat16_here(torch.device("cpu"))
        write(given.json, {"bfloat16 in hardware": native, **result})


if __name__ == "__main__":
    main()
