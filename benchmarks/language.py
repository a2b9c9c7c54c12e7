"""An epoch of LoRA on texts: ours beside transformers.Trainer with peft, in examples per second.

python -m benchmarks.language [--quick] [--json FILE] [--seeds N]

The model of `make demo-lm-tiny` (base demo-lm-tiny, random weights, which cost what trained ones
do), LoRA, r = 16, on all linears, on the demonstration's tasks, a batch of 32 texts, float32,
AdamW, a linear schedule. Each contender is a process on one thread, as the demonstration is, and
times its epoch from the first step to the last; they take turns, in an order that rotates with the
seed. "trainer" is Trainer at its defaults with peft: texts in random order, each batch padded to
its longest, labels -100 where the prompt is. "trainer, best" groups texts of a length. "ours,
packed" is `--packing`. The loss on dev afterwards says that all have learned about the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("ours", "ours, packed", "trainer", "trainer, best")
TASKS = ("tasks/shout", "tasks/spell", "tasks/last")
RATE, WARMUP, BATCH, LENGTH = 2e-3, 0.06, 32, 64


def config_of(seed: int, limit: int | None, folder: str, packed: bool) -> Any:
    from lora.finetune.config import RunConfig
    from lora.methods.lora import LoRAConfig

    return RunConfig(
        base="demo-lm-tiny", data=TASKS, task="text", epochs=1, batch_size=BATCH,
        learning_rate=RATE, warmup=WARMUP, seed=seed, limit=limit, packing=packed,
        max_length=LENGTH, answered=0, dtype="float32", run_dir=Path(folder) / "run",
        settings=LoRAConfig(r=16, lora_alpha=16),
    )  # fmt: skip


def ours(seed: int, limit: int | None, folder: str, packed: bool) -> dict[str, float]:
    from lora.finetune.record import metrics_of
    from lora.finetune.run import run
    from lora.kernels.scratch import keep_freed_memory

    keep_freed_memory()  # as `lora train` does
    found = run(config_of(seed, limit, folder, packed))
    rows = metrics_of(Path(folder) / "run")
    examples = sum(row["examples"] for row in rows if row["kind"] == "step")
    loss = found["evaluations"][-1]["dev_loss"]
    return {"rate": examples / found["train_seconds"], "loss": loss}


def trainer(seed: int, limit: int | None, folder: str, best: bool) -> dict[str, float]:
    import peft
    import torch
    import transformers

    from lora.finetune.evaluate import evaluate
    from lora.finetune.inputs import encoded_of, read_corpus
    from lora.finetune.models import load_base

    config = config_of(seed, limit, folder, packed=False)
    corpus, base = read_corpus(config), load_base("demo-lm-tiny", 1, "text", seed)
    encoded, _ = encoded_of(config, corpus, base.tokenizer, base.model, corpus.train)
    transformers.set_seed(seed)
    settings = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base.model, settings)
    ids, labels = encoded.fields["input_ids"].tolist(), encoded.targets.roll(1).tolist()
    ends = encoded.offsets.tolist()
    rows = [
        # transformers shifts labels itself.
        {"input_ids": ids[a:b], "labels": [-100, *labels[a + 1 : b]]}
        for a, b in itertools.pairwise(ends)
    ]
    more = {"train_sampling_strategy": "group_by_length"} if best else {}
    given = transformers.TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE,
        warmup_steps=WARMUP, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100)
    run = transformers.Trainer(
        model, given, train_dataset=rows, processing_class=base.tokenizer, data_collator=collator
    )
    started = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - started
    dev, _ = encoded_of(config, corpus, base.tokenizer, base.model, corpus.dev)
    loss = evaluate(model.get_base_model(), corpus, dev, corpus.dev).loss
    return {"rate": len(rows) / seconds, "loss": loss}


def one(contender: str, seed: int, limit: int | None) -> dict[str, float]:
    """A contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.language", "--one", contender]
    command += ["--seeds", str(seed), *(["--limit", str(limit)] if limit else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    result: dict[str, float] = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="320 texts of each task, one seed")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--json", type=Path)
    flags.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    flags.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.one:
        run = ours if given.one.startswith("ours") else trainer
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(given.seeds, given.limit, folder, "," in given.one)))
        return
    from benchmarks.machine import write

    seeds, limit = (1, 320) if given.quick else (given.seeds, None)
    rounds: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        turn = seed % len(CONTENDERS)
        order = CONTENDERS[turn:] + CONTENDERS[:turn]
        rounds.append({name: one(name, seed, limit) for name in order})
        for name in CONTENDERS:
            row = rounds[-1][name]
            print(
                f"seed {seed}  {name:<14} {row['rate']:7.0f} examples/s  dev loss {row['loss']:.4f}"
            )
    result: dict[str, Any] = {"seeds": rounds}
    for name in CONTENDERS:
        for other in CONTENDERS[2:]:
            if name.startswith("ours"):
                ratios = [row[name]["rate"] / row[other]["rate"] for row in rounds]
                result[f"{name} / {other}"] = statistics.median(ratios)
                print(f"{name} / {other}: {statistics.median(ratios):.2f}")
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
