"""Measures the memory of a run: of its training, of the whole run, and of the process.

training_bytes  what training needs: the model's tensors, and the most by which the memory in use
                grew beyond them. Evaluations do not count, nor do imports, data and tokenizer.
                They are the same for every method, and on a small model several times as much.
peak_bytes      the peak of the process's private memory, above its value at the start of the run
process_bytes   the peak of the process's resident memory, with the libraries: what the system shows

Memory in use is allocated and not yet freed, as in torch.cuda.max_memory_allocated.
Private memory also has the free blocks that the allocator keeps, and it has no memory-mapped files.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from lora.finetune.devices import CPU
from lora.layers import in_pieces

STATUS = Path("/proc/self/status")
"""Linux's memory statistics of this process."""
EVERY = 0.02
"""Seconds between two samples."""
MOST_OF_TIME = 0.02
"""The share of the time that may be spent on samples."""


class PeakMemory:
    """Measures the memory of a run while it goes on. A thread samples it; on a GPU torch's
    allocator keeps the peaks itself.

        with PeakMemory(device) as memory:
            ...                              # load the base
            with memory.training(model):
                ...                          # steps
                with memory.paused():
                    ...                      # an evaluation
        memory.peak(), memory.training_peak
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        # torch's allocators for CUDA and XPU count in the same way.
        counts = device.type in ("cuda", "xpu")
        self.allocator: Any = torch.get_device_module(device) if counts else None

    def __enter__(self) -> PeakMemory:
        self.start = self.most = private_bytes()
        self.training_peak = 0
        self.model = self.before = 0  # bytes of the model's tensors, and in use at training's start
        self.counting, self.lock, self.done = False, threading.Lock(), threading.Event()
        self.most_on_device = 0
        if self.allocator:
            self.allocator.reset_peak_memory_stats(self.device)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Inside, what is allocated counts for training_peak."""
        self._flush()
        self.model, self.before = tensor_bytes(model), bytes_in_use()
        self.counting = True
        try:
            yield
        finally:
            self._flush()
            self.counting = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing counts for training_peak, nor does what is left afterwards: imports."""
        self._flush()
        before, was = bytes_in_use(), self.counting
        self.counting = False
        try:
            yield
        finally:
            self._flush()
            with self.lock:
                self.before += bytes_in_use() - before
                self.counting = was

    def _watch(self) -> None:
        pause = EVERY
        while not self.done.wait(pause):
            started = time.perf_counter()
            self.sample()
            pause = max(EVERY, (time.perf_counter() - started) / MOST_OF_TIME)

    def sample(self) -> None:
        """Read the memory now, and store it if it is the largest so far."""
        with self.lock:
            self.most = max(self.most, private_bytes())
            if self.counting and not self.allocator:
                grown = bytes_in_use() - self.before
                self.training_peak = max(self.training_peak, self.model + grown)

    def _flush(self) -> None:
        """Take the sample that ends a phase. On a GPU, read the phase's peak and begin another."""
        self.sample()
        if self.allocator:
            peak = self.allocator.max_memory_allocated(self.device)
            self.most_on_device = max(self.most_on_device, peak)
            if self.counting:
                self.training_peak = max(self.training_peak, peak)
            self.allocator.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Returns the peak in bytes above the start, or on a GPU the peak of torch's allocator."""
        if self.allocator:
            now = self.allocator.max_memory_allocated(self.device)
            return max(self.most_on_device, int(now))
        return self.most - self.start


def private_bytes() -> int:
    """Returns the bytes of private memory: RssAnon on Linux (without mapped files and shared
    libraries), private bytes on Windows, the resident set elsewhere."""
    value = _status("RssAnon")
    if value is not None:
        return value
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "private", memory.rss))


def process_peak() -> int:
    """Returns the largest resident set of this process since it started; where the system does not
    keep it, the present one."""
    value = _status("VmHWM")
    if value is not None:
        return value
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def _status(name: str) -> int | None:
    """Returns a value of Linux's statistics in bytes, None on other systems."""
    try:
        lines = STATUS.read_text(encoding="utf-8").split("\n")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def bytes_in_use() -> int:
    """Returns the bytes that are allocated and not freed: glibc's count, with other allocators the
    private memory."""
    count = _glibc_count()
    return private_bytes() if count is None else count()


class _Mallinfo2(ctypes.Structure):
    """malloc.h: the sum over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _glibc_count() -> Callable[[], int] | None:
    """Returns what counts the bytes in use; None with another C library, a glibc before 2.33, or if
    torch takes its memory from another allocator (jemalloc by LD_PRELOAD)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2

    def count() -> int:
        statistics = mallinfo2()
        return int(statistics.uordblks + statistics.hblkhd)

    before, size = count(), 2**24
    block = torch.empty(size, dtype=torch.uint8, device="cpu")
    return count if count() - before >= block.nbytes else None


def tensor_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters and buffers on this rank, shared ones once."""
    sizes: dict[int, int] = {}
    tensors: Iterator[Any] = itertools.chain(model.parameters(), model.buffers())
    for tensor in tensors:
        local = tensor.to_local() if in_pieces(tensor) else tensor
        if local.device.type != "meta":
            sizes[local.data_ptr()] = max(sizes.get(local.data_ptr(), 0), local.nbytes)
    return sum(sizes.values())
