"""Describes the machine of a run, its versions and hardware, and measures the run's memory."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lora import __version__
from lora.finetune import distributed
from lora.injection import machine_memory

STATUS = Path("/proc/self/status")
"""Linux's memory statistics of this process."""


def environment() -> dict[str, Any]:
    """Returns what a result may depend on besides the configuration: versions, hardware, command,
    for environment.json."""
    import transformers

    return {
        "command": shlex.join(sys.argv),
        "lora-from-scratch": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": distributed.size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    """Returns the processor's name; on Linux from /proc, since platform.processor() is empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def total_memory(device: torch.device) -> int:
    """Returns the bytes of memory of a GPU, or for the CPU of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory() or int(psutil.virtual_memory().total)


class PeakMemory:
    """Measures the peak of the process's private memory above its value at the start, in bytes.

    A thread samples it every 20 ms. On CUDA the peak of torch's allocator is reported instead.
    """

    def __enter__(self) -> PeakMemory:
        self.start = self.most = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.sample()

    def sample(self) -> None:
        """Read the memory now, and store it if it is the largest so far."""
        self.most = max(self.most, self.now())

    def now(self) -> int:
        """Returns the bytes of private memory: RssAnon on Linux (without mapped files and shared
        libraries), private bytes on Windows, the resident set elsewhere."""
        try:
            status = STATUS.read_text(encoding="utf-8")
        except OSError:
            memory = psutil.Process().memory_info()
            return int(getattr(memory, "private", memory.rss))
        lines = [line for line in status.split("\n") if line.startswith("RssAnon")]
        return int(lines[0].split()[1]) * 1024 if lines else 0

    def peak(self, device: torch.device) -> int:
        """Returns the peak in bytes above the start, or on CUDA the peak of torch's allocator."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return self.most - self.start
