"""Counts a running model's bytes by use (base, activations, gradients) and its matmuls' FLOPs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


def _by_last_axis(left: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Operations of a product that sums over the last axis of its first factor."""
    return 2 * out_val.numel() * left.shape[-1]


aten = torch.ops.aten
FLOPS = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    # inference_mode does not take these three apart.
    aten.linear: _by_last_axis,
    aten.matmul: _by_last_axis,
    aten.scaled_dot_product_attention: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu: (
        flop_registry[aten._scaled_dot_product_flash_attention]
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
}
"""What counts the operations of a product from its tensors, by operator. torch's own counter hooks
modules too."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the bytes of every tensor storage until it is freed, by what it is used for.

    It is a dispatch mode, since a tracker that hooks modules (torch's MemTracker) would turn the
    fused kernels off.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0  # of all products so far
        self.use = "base"  # the use of storages made from here on
        self.now: Counter[str] = Counter()  # bytes by use
        self.most: Counter[str] = Counter()  # the same at the peak
        self.scratch_blocks: dict[Any, Tensor] = {}  # used by lora.kernels.scratch
        self.known: Any = WeakIdKeyDictionary()  # storage -> [use, bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten.nonzero.default
        ):  # depends on values; without values there are none
            return torch.empty((0, args[0].dim()), dtype=torch.long, device=args[0].device)
        result = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.enter(leaf)
        return result

    def enter(self, tensor: Tensor, use: str | None = None) -> None:
        """Count a tensor's storage; move it to `use` if that is given."""
        storage = tensor.untyped_storage()
        entry: list[Any] | None = self.known.get(storage)
        if entry is None:
            size = storage.nbytes()
            entry = [use or self.use, size]
            self.known[storage] = entry
            weakref.finalize(storage, self._leave, entry)
            self.now[entry[0]] += size
            if self.now.total() > self.most.total():
                self.most = Counter(self.now)
        elif use is not None:
            self.now[entry[0]] -= entry[1]
            entry[0] = use
            self.now[use] += entry[1]

    def _leave(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]

    @contextmanager
    def phase(self, use: str) -> Iterator[Counter[str]]:
        """Yields a counter that holds the bytes at the phase's peak once the phase has ended."""
        self.use, self.most, peak = use, Counter(self.now), Counter[str]()
        yield peak
        peak.update({name: size for name, size in self.most.items() if size})
