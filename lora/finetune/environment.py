"""Describes the machine of a run: versions, hardware, command, memory."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lora import __version__
from lora.finetune import devices, distributed
from lora.injection import machine_memory


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Returns what a result may depend on besides the configuration: versions, hardware, command,
    for environment.json. Without `device`, that of --device auto."""
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
        "device": devices.name_of(device or distributed.device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    """Returns the processor's name; on Linux from /proc, since platform.processor() is empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of matrix multiplications on the device: the best of a few, timed now."""
    # On an accelerator so large and so many that the time to launch them does not count.
    m, n, many = (2048, 1024, 1) if device.type == "cpu" else (4096, 4096, 20)
    x, W = (torch.ones(rows, n, device=device, dtype=dtype) for rows in (m, n))
    seconds = []
    for _ in range(6):  # the first ones warm up
        started = time.perf_counter()
        for _ in range(many):
            y = x @ W.t()
        y[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * m * n * n * many / min(seconds)


def total_memory(device: torch.device) -> int:
    """Returns the bytes of memory of the machine; of a GPU those that torch's context and other
    processes leave free."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return machine_memory() or int(psutil.virtual_memory().total)
