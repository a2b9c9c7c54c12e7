"""Measures how long a run will take, by its first steps.

    python -m lora.finetune.comparison.measure run.toml     prints the Cost as JSON

In a process of its own, as the run will be: its threads and its memory are those of the run.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import RunError
from lora.finetune.config import RunConfig, from_table, read_toml, to_toml

STEPS = 6
"""Optimizer steps that are measured; the first one also fills caches and is not counted."""
SCORED = 128
"""Rows of dev of each data set that are scored: enough for batches of texts of like length."""
PROMPTS_MEASURED = 32
"""Prompts that a language model answers."""


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run."""

    load: float  # until the first step: imports, data, base
    step: float
    row: float  # to score a row
    answer: float = 0.0  # to write the answer to a prompt, in the last evaluation

    def seconds(self, config: RunConfig[Any], rows: Mapping[str, int]) -> float:
        """Returns how long a run takes with this many rows in train, dev and test."""
        steps = config.epochs * -(-rows["train"] // config.batch_size)
        evaluations = -(-steps // config.eval_steps) if config.eval_steps else config.epochs
        last = rows["test"] if rows["test"] and config.test_limit != 0 else rows["dev"]
        prompts = last if config.answered is None else config.answered * len(config.data)
        final = last * self.row + min(last, prompts) * self.answer
        final *= 2 if config.baseline else 1
        return self.load + steps * self.step + evaluations * rows["dev"] * self.row + final


def measure(config: RunConfig[Any], environment: Mapping[str, str] = {}) -> Cost:
    """Returns the cost of a run, measured in a process of its own. Raises RunError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-m", __name__, str(file)],
            capture_output=True, text=True, env=os.environ | dict(environment),
        )  # fmt: skip
    if result.returncode:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise RunError(f"the first steps of {config.name or config.method} failed: {reason}")
    return Cost(**json.loads(result.stdout.strip().rpartition("\n")[2]))


def _measured(config: RunConfig[Any]) -> Cost:
    """Returns the cost of a run whose first steps this process makes."""
    import psutil
    import torch

    from lora.finetune import distributed
    from lora.finetune.evaluate import evaluate
    from lora.finetune.generate import scored
    from lora.finetune.run import hyperparameters, prepare
    from lora.finetune.train import fit

    config = replace(config, dev_limit=min(config.dev_limit or SCORED, SCORED), test_limit=0)
    parts = prepare(config, distributed.device(config.device), lambda done, total: None)
    load = time.time() - psutil.Process().create_time()
    config, model, split = parts.config, parts.training.model, parts.splits["dev"]
    settings = hyperparameters(config, parts.corpus)
    training = fit(parts.training, parts.splits["train"], parts.corpus.task, settings, lambda: 0)
    seconds = [step.seconds for step in itertools.islice(training, STEPS)]
    corpus, rows = parts.corpus, parts.corpus.dev
    evaluate(model, corpus, split, rows)  # the first call imports what computes the metrics
    start = time.perf_counter()
    evaluate(model, corpus, split, rows)
    row = (time.perf_counter() - start) / len(rows)
    answer = 0.0
    if corpus.task == "text":
        config = replace(config, answered=-(-PROMPTS_MEASURED // len(config.data)))
        start = time.perf_counter()
        with torch.no_grad():
            *_, records = scored(config, model, parts.base.tokenizer, corpus, split, rows)
        answer = (time.perf_counter() - start - row * len(rows)) / max(1, len(records))
    return Cost(load, statistics.mean(seconds[1:] or seconds), row, max(0.0, answer))


if __name__ == "__main__":
    table = read_toml(Path(sys.argv[1]))
    print(json.dumps(asdict(_measured(from_table(table, table["method"])))))
