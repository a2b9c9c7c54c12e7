"""Layers of one input, computed together: while their parent's forward runs, and no longer.

The q, k and v of an attention read one tensor. The first of them that is called has the others
computed with its own output (fused.low_rank), and they take what is theirs when the model calls
them. It waits in a Reading, which hooks of the parent open before its forward and close after it:
nothing outlives the forward that it was made in, and who calls a layer by itself finds nothing.

It is a guess at what the parent's forward will do, from the names in READ_TOGETHER. Where it was
wrong (a layer was not called, or with another input) the layer computed by itself, and the guess is
not made again. And it is made in a plain forward only: under activation checkpointing a layer may
be recomputed alone, and would not find the mask that it shared. Some checkpoints show in that their
forward takes no gradients: there it is made where nothing is dropped.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.fused import compute_dtype

# Children of one module that its forward calls with one input.
READ_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
TWO_INPUTS = re.compile("cross|encoder_attn|encdec", re.IGNORECASE)  # in a path: not there
GROUPS = "lora_read_together"  # of a parent: the names that it may read together


class Reading:
    """What the layers of one group are to take, in one forward of their parent."""

    def __init__(self, names: tuple[str, ...], modules: Mapping[str, nn.Module | None]) -> None:
        self.names = names
        self.layers = [module for name in names if (module := modules.get(name)) is not None]
        self.begun = False
        self.missed = False
        self.ys: list[tuple[nn.Module, Tensor]] = []
        self.of: tuple[Any, ...] = ()

    def put(self, x: Tensor, ys: list[tuple[nn.Module, Tensor]]) -> None:
        self.ys, self.of = ys, (x, self._state(x))

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What waits for the layer, if it is of this x as it is now."""
        for index, (owner, y) in enumerate(self.ys):
            if owner is layer:
                del self.ys[index]
                of, state = self.of
                if x is of and state == self._state(x) and plain(x):
                    return y
                self.missed = True
        return None

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        return x._version, x.requires_grad, compute_dtype(x), torch.is_grad_enabled()


class _Open(threading.local):
    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, list[Reading]]] = []


_open = _Open()


def plain(x: Tensor) -> bool:
    """Whether x is read in a forward that no checkpoint runs, under hooks on what autograd keeps,
    nor runs again, within backward; and shows whether it was written since."""
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and torch._C._current_graph_task_id() == -1
        and not x.is_inference()
    )


def reading_of(layer: nn.Module) -> Reading | None:
    """The group of the layer in the forward that calls it; None outside of one."""
    if torch.compiler.is_compiling() or not _open.forwards:
        return None
    _, readings = _open.forwards[-1]
    for reading in readings:
        if any(other is layer for other in reading.layers):
            return reading
    return None


def join(parent: nn.Module, path: str, adapted: Sequence[str]) -> None:
    """Let the adapted children of a parent be read together where their names say that they are."""
    part(parent)
    named = [tuple(name for name in names if name in adapted) for names in READ_TOGETHER]
    groups = tuple(names for names in named if len(names) > 1)
    if groups and not TWO_INPUTS.search(path):
        parent.__dict__[GROUPS] = groups
        parent.register_forward_pre_hook(_begin)
        parent.register_forward_hook(_end, always_call=True)


def part(parent: nn.Module) -> None:
    """Undo join()."""
    parent.__dict__.pop(GROUPS, None)
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_begin, _end)]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def groups(model: nn.Module) -> dict[str, list[list[str]]]:
    """What each parent's children may read together now, by its path: fewer than at the start where
    a guess was wrong. It decides last bits."""
    return {
        path: [list(names) for names in module.__dict__[GROUPS]]
        for path, module in model.named_modules()
        if GROUPS in module.__dict__
    }


def set_groups(model: nn.Module, found: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Bring back what groups() gave."""
    for path, names in found.items():
        model.get_submodule(path).__dict__[GROUPS] = tuple(map(tuple, names))


def _begin(parent: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        readings = [Reading(names, parent._modules) for names in parent.__dict__.get(GROUPS, ())]
        _open.forwards.append((parent, readings))


def _end(parent: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    while _open.forwards:  # above it lie those that an interrupt kept from their end
        found, readings = _open.forwards.pop()
        if found is parent:
            if output is not None:  # as it is where the forward failed
                parent.__dict__[GROUPS] = tuple(
                    one.names for one in readings if not one.ys and not one.missed
                )
            return
