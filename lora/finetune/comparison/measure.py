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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import RunError
from lora.finetune.config import RunConfig, from_table, read_toml, to_toml

STEPS = 6
"""Optimizer steps that are measured; the first one also fills caches and is not counted."""
SCORED = 32
"""Rows of dev that are scored."""
SLOW = 20
"""Seconds after which the rows are not scored again."""


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run."""

    load: float  # until the first step: imports, data, base
    step: float
    dev_row: float  # a row of an evaluation during training
    test_row: float  # a row of the last evaluation, in which a language model writes its answers

    def seconds(self, config: RunConfig[Any], rows: Mapping[str, int]) -> float:
        """Returns how long a run takes with this many rows in train, dev and test."""
        steps = config.epochs * -(-rows["train"] // config.batch_size)
        evaluations = -(-steps // config.eval_steps) if config.eval_steps else config.epochs
        last = rows["test"] if rows["test"] and config.test_limit != 0 else rows["dev"]
        if config.task == "text" and config.answered is not None:
            last = min(last, config.answered)
        last *= 2 if config.baseline else 1
        scoring = evaluations * rows["dev"] * self.dev_row + last * self.test_row
        return self.load + steps * self.step + scoring


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
        raise RunError(
            f"{config.name or config.method}: its first steps failed, so that no run was started."
            f" {reason}"
        )
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
    rows = parts.corpus.dev

    def evaluated() -> None:
        evaluate(model, parts.corpus, split, rows)

    def answered() -> None:
        with torch.no_grad():
            scored(config, model, parts.base.tokenizer, parts.corpus, split, rows, None)

    # The first call imports what computes the metrics, which takes longer than 32 rows.
    evaluation, first = _seconds(evaluated), _seconds(answered)
    evaluation, last = _seconds(evaluated), _seconds(answered) if first < SLOW else first
    step = statistics.mean(seconds[1:] or seconds)
    return Cost(load, step, evaluation / len(rows), last / len(rows))


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    table = read_toml(Path(sys.argv[1]))
    print(json.dumps(asdict(_measured(from_table(table, table["method"])))))
