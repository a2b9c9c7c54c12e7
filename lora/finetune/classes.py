"""The classes of a classification run: their names, and their weights in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora.errors import ConfigError
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Corpus


def check_names(names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises ConfigError if the names do not fit the labels: another number, or a name that is the
    label of another class, so that the two are probably in another order."""
    if not names:
        return
    if len(names) != len(labels):
        raise ConfigError(
            f"--class-names: {len(names)} given, but the data has {len(labels)} labels:"
            f" {first_labels(labels)}. Give a name for each, in that order."
        )
    for name, label in zip(names, labels, strict=True):
        if name != label and name in labels:
            raise ConfigError(
                f"--class-names: {name!r} would be the name of the label {label!r}, but is another"
                f" label. The labels are in the order {first_labels(labels)}. Give the names in"
                " that order."
            )


def first_labels(labels: Sequence[str]) -> str:
    """Returns the first labels for an error."""
    return ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")


def class_weights(config: RunConfig[Any], corpus: Corpus) -> tuple[float, ...]:
    """Returns the weight of each class in the training loss, in the order of the labels.

    () if all are 1. balanced: N / (K · n) for a class with n of the N training rows, if K classes
    have rows; 1 for a class without rows. Raises ConfigError if a label is no class of the data.
    """
    weights = config.class_weights
    if not weights or corpus.task != "classification":
        return ()
    if weights == "balanced":
        counts = Counter(str(example.label) for example in corpus.train)
        share = len(corpus.train) / len(counts)
        return tuple(share / counts[label] if counts[label] else 1.0 for label in corpus.labels)
    if unknown := [label for label in weights if label not in corpus.labels]:
        raise ConfigError(
            f"--class-weights names {unknown[0]!r}, which is no label of the data. Labels:"
            f" {first_labels(corpus.labels)}."
        )
    return tuple(weights.get(label, 1.0) for label in corpus.labels)
