"""The loss of a task, from logits and targets."""

import torch.nn.functional as F
from torch import Tensor


def task_loss(logits: Tensor, targets: Tensor, task: str) -> Tensor:
    """Sum over the examples, float32: cross-entropy in nats, or the squared error. A batch's parts
    are summed, and divided by its examples once.

    logits (examples, classes) and targets (examples,) long; for regression (examples, 1) and
    float32.
    """
    if task == "regression":
        return F.mse_loss(logits.float().squeeze(-1), targets, reduction="sum")
    return F.cross_entropy(logits.float(), targets, reduction="sum")
