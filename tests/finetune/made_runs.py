"""Writes run folders as training would, with results that a test chooses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lora.finetune.record import write_lines

LABELS = ("negative", "positive")
TRAINABLE = {"lora": 314_498, "full": 22_713_218, "bitfit": 174_338, "head": 148_610}


@dataclass(frozen=True)
class Made:
    """A run to write."""

    method: str = "lora"
    seed: int = 0
    rate: float = 0.002
    accuracy: float = 0.82  # of which predictions.jsonl is drawn
    split: str = "test"
    texts: Sequence[str] = tuple(f"Sentence number {i} of the split." for i in range(400))
    labels: Sequence[str] = LABELS
    steps: int = 40
    settings: tuple[tuple[str, Any], ...] = ()


def make_run(folder: Path, made: Made) -> Path:
    """Writes a complete run into the folder, and returns it."""
    folder.mkdir(parents=True)
    chance = random.Random(f"{made.method} {made.seed} {made.rate}")
    answers = list(_answers(made, chance))
    right = sum(row["label"] == row["prediction"] for row in answers) / len(answers)
    rows = list(_metrics(made, chance, right))
    evaluations = [
        {k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "evaluation"
    ]
    trainable = TRAINABLE.get(made.method, 250_000)
    seconds = 60.0 + trainable / 400_000 + chance.random()
    summary = {
        "method": made.method, "task": "classification", "base": "demo", "data": "opinions/films",
        "seed": made.seed, "note": "", "trainable": trainable, "adapter_parameters": trainable,
        "parameters": 23_027_716, "learning_rate": made.rate, "evaluations": evaluations,
        "step": made.steps, "split": made.split, "rows": len(answers), "loss": 0.4,
        "metrics": {"accuracy": right, "macro_f1": right, "matthews": 2 * right - 1},
        "majority": {"dev": 0.49, "test": 0.5}, "train_seconds": seconds, "seconds": seconds + 9,
        "peak_bytes": 700 * 2**20, "training_bytes": 600 * 2**20 + 16 * trainable,
        "adapter_bytes": 4 * trainable, "tokens_per_second": 60_000 / seconds, "dtype": "float32",
    }  # fmt: skip
    summary |= {key: value for key, value in made.settings if key == "name"}
    settings = {
        "base": "demo", "data": ["opinions/films"], "method": made.method,
        "task": "classification", "labels": list(made.labels), "epochs": 2,
        "learning_rate": made.rate, "seed": made.seed, **dict(made.settings),
        **({"test_limit": 0} if made.split == "dev" else {}),
    }  # fmt: skip
    environment = {
        "command": f"lora train --seed {made.seed}", "python": "3.11.7", "torch": "2.13.0",
        "processor": "AMD EPYC", "threads": 1, "device": "cpu", "time": "2026-11-26T22:14:35+0000",
        "data": "0" * 64, "tokens": "1" * 64, "note": "",
    }  # fmt: skip
    (folder / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment))
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "predictions.jsonl", answers)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _answers(made: Made, chance: random.Random) -> Any:
    """Yields the rows of predictions.jsonl. The labels and how hard a text is are those of all
    runs."""
    shared = random.Random(0)
    for text in made.texts:
        label, hard = shared.choice(made.labels), shared.random()
        right = 0.7 * hard + 0.3 * chance.random() < made.accuracy
        wrong = [other for other in made.labels if other != label]
        prediction = label if right else chance.choice(wrong)
        scores = [round(1 / len(made.labels), 6)] * len(made.labels)
        yield {"text": text, "label": label, "prediction": prediction, "scores": scores}


def _metrics(made: Made, chance: random.Random, right: float) -> Any:
    """Yields the rows of metrics.jsonl: two epochs, with an evaluation after each half."""
    half = made.steps // 4
    for step in range(1, made.steps + 1):
        loss = 0.35 + 0.35 * 0.93 ** (40 * step / made.steps) + 0.04 * chance.random()
        yield {
            "kind": "step", "step": step, "steps": made.steps,
            "epoch": 1 if 2 * step <= made.steps else 2, "loss": loss, "learning_rate": made.rate,
            "gradient_norm": 1.0, "examples": 32, "targets": 32, "tokens": 800, "padding": 0.1,
            "seconds": 1.0, "epoch_ends": step in (made.steps // 2, made.steps),
        }  # fmt: skip
        if step % half == 0:
            now = right - 0.1 * 0.5 ** (step // half) + 0.005 * chance.random()
            yield {
                "kind": "evaluation", "step": step, "epoch": 2 * step / made.steps, "loss": loss,
                "first_loss": loss, "seconds": half * 1.0, "padding": 0.1, "dev_loss": loss + 0.05,
                "dev": {"accuracy": now, "macro_f1": now, "matthews": 2 * now - 1},
            }  # fmt: skip


ACCURACY = {"lora": 0.825, "full": 0.83, "bitfit": 0.79, "dora": 0.826, "head": 0.70}


def make_comparison(
    folder: Path, methods: Sequence[str], seeds: int, rates: int = 0, **more: Any
) -> Path:
    """Writes the runs of a comparison, and, if `rates`, those that searched the learning rates."""
    for method in methods:
        best = 0.0002 if method == "full" else 0.002
        accuracy = ACCURACY.get(method, 0.82)
        for power in range(rates):
            rate = best * 2.0 ** (power - rates // 2)
            tried = Made(
                method, 0, rate, accuracy - 0.02 * abs(power - rates // 2), split="dev", **more
            )
            make_run(folder / "search" / f"{method}-{rate:g}", tried)
        for seed in range(seeds):
            make_run(folder / f"{method}-{seed}", Made(method, seed, best, accuracy, **more))
    return folder
