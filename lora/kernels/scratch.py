"""Scratch memory for temporary tensors of every step, reused from call to call.

On a CPU the allocator returns large blocks to the system, and the system clears every page of the
next block: allocating the memory of a dropout mask takes longer than computing the mask. torch's
GPU allocators keep freed memory themselves, so on a GPU scratch() just allocates.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class _Memory(threading.local):
    """The blocks of a thread, by use and dtype. Backward runs on another thread than forward."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, torch.dtype], Tensor] = {}


_memory = _Memory()


def scratch(
    use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Returns an uninitialized tensor; on a CPU this thread's last call for the same use and dtype
    returned the same memory."""
    blocks = None
    # Tensors of torch.compile or of a mode such as FakeTensorMode must not stay in our table, where
    # a later call outside would get them. A mode may have its own table, named `scratch_blocks`.
    if torch.device(device).type == "cpu" and not torch.compiler.is_compiling():
        mode = _get_current_dispatch_mode()
        blocks = _memory.blocks if mode is None else getattr(mode, "scratch_blocks", None)
    if blocks is None:
        return torch.empty(shape, dtype=dtype, device=device)
    count, key = math.prod(shape), (use, dtype)
    block: Tensor | None = blocks.get(key)
    if block is None or block.numel() < count:
        with torch.inference_mode(False):  # training cannot use inference tensors
            block = blocks[key] = torch.empty(count, dtype=dtype, device="cpu")
    return block[:count].view(*shape)


def keep_freed_memory() -> None:
    """Make glibc keep all freed memory for the next step, instead of returning it to the system.

    It changes the whole process, so only programs should call it, not libraries: `lora train` does.
    Does nothing with other C libraries.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_TRIM_THRESHOLD, -1)  # -1: never
            mallopt(M_MMAP_MAX, 0)
