"""The device that a run computes on: --device, --deterministic, and its random state."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lora.errors import ConfigError, TrainingError

DEVICE = r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?"
"""What --device takes."""
CPU = torch.device("cpu")


def device_named(name: str = "auto", rank: int | None = None) -> torch.device:
    """Returns the device that --device names, with its number if it has one, and makes it torch's
    current device: allocator statistics, generators and kernels mean that one.

    auto is a CUDA device, else the CPU. `rank` is this process's number on its machine if there are
    several processes: each then takes the device of its number. Raises ConfigError if the device is
    not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return CPU
    if number and rank is not None:
        raise ConfigError(
            f"--device {name}: each of several processes takes a device of its own. Set --device"
            f" {kind}."
        )
    count = count_of(kind)
    if not count:
        raise ConfigError(
            f"--device {name}: torch finds no {kind} device on this machine. Set --device auto, or"
            " install a torch that is built for it."
        )
    if kind == "mps":
        return torch.device("mps", 0)
    here: Any = torch.get_device_module(kind)
    index = int(number) if number else here.current_device() if rank is None else rank
    if index >= count:
        raise ConfigError(
            f"--device {name}: this machine has {count} {kind} devices, numbered from 0. Set"
            f" --device {kind}:{count - 1}, or fewer processes."
        )
    here.set_device(index)
    return torch.device(kind, index)


def count_of(kind: str) -> int:
    """Returns how many devices of a kind, such as "cuda", torch finds; 0 for the CPU."""
    if kind == "cpu":
        return 0
    here: Any = torch.get_device_module(kind)
    return int(here.device_count()) if here.is_available() else 0


def check_device(name: str) -> None:
    """Raise ConfigError if --device cannot be this, on any machine."""
    if re.fullmatch(DEVICE, name) is None:
        raise ConfigError(
            f"--device must be auto, cpu, cuda, cuda:N, xpu, xpu:N or mps, found {name!r}. Set"
            " --device auto."
        )


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Inside, if `on`, torch uses only algorithms that give the same bits each time.

    Enter it before anything is computed on a GPU. Raises TrainingError if an operation has no such
    algorithm.
    """
    if not on:
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads it when it starts; with the default it may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The kernels write all of what they allocate. Filling it first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().partition(". ")[0]
        raise TrainingError(
            f"--deterministic: {reason}. Remove --deterministic, or set --device cpu."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def name_of(device: torch.device) -> str:
    """Returns what a user calls the device: "cpu", or the card's name."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return device.type


def accelerator_state(device: torch.device) -> tuple[str, str] | None:
    """Returns the kind of an accelerator and the state of its generator in hexadecimal, None for
    the CPU."""
    if device.type == "cpu":
        return None
    state = torch.get_device_module(device).get_rng_state()
    return device.type, state.numpy().tobytes().hex()
