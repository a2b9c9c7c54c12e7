"""Memory that the next call uses again, for what is needed for a moment and at every step.

A processor's allocator hands large blocks back to the system, which clears every page of the next
one: taking the memory for a mask costs more than making the mask. An accelerator's allocator keeps
what was freed, so that there it is asked.
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


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype], Tensor] = {}


_held = _Held()


def scratch(
    use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Memory (shape) of this thread, as its last call for the same use and dtype left it.

    New where the allocator keeps what was freed, and where what is computed is a tracer's or a
    mode's (FakeTensorMode), which must not be found there later; a mode may hold its own.
    """
    by_use = None
    if torch.device(device).type == "cpu" and not torch.compiler.is_compiling():
        mode = _get_current_dispatch_mode()
        by_use = _held.by_use if mode is None else getattr(mode, "held", None)
    if by_use is None:
        return torch.empty(shape, dtype=dtype, device=device)
    count, key = math.prod(shape), (use, dtype)
    found: Tensor | None = by_use.get(key)
    if found is None or found.numel() < count:
        with torch.inference_mode(False):  # an evaluation's serves training too
            found = by_use[key] = torch.empty(count, dtype=dtype, device="cpu")
    return found[:count].view(*shape)


def keep_freed_memory() -> None:
    """Let the process keep all the memory that it frees, for its next step to use.

    For programs of their own: `lora train` does so. glibc's allocator alone is told.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_TRIM_THRESHOLD, -1)  # -1: never
            mallopt(M_MMAP_MAX, 0)
