"""Kernels for NVIDIA GPUs, written in Triton. Torch operations are their specification.

    nf4      dequantizes a weight in one pass, bit-equal to lora.nf4
    dropout  draws a mask, bit-equal to the CPU's, and applies it inside the matmuls with A

Triton comes with torch's CUDA builds. Nothing imports it before a kernel runs on a GPU, and where
`usable` is False torch operations run instead. Matmuls with W stay with cuBLAS: a Triton matmul
would lose more there than fused additions save.
"""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

CAPABILITY = (8, 0)  # Triton supports Ampere and newer
# The largest rank for which a product's tile stays in registers.
RANKS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def usable(device: torch.device) -> bool:
    """True if the kernels run on the device."""
    return device.type == "cuda" and not _traced() and _works(device)


def _traced() -> bool:
    """True if something follows every operation of torch, and would not see a kernel."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None  # fake tensors have no memory
    )


def thin(rank: int, *tensors: Tensor | None) -> bool:
    """True if the products take this rank, and tensors like these."""
    return all(
        tensor is None
        or (
            rank <= RANKS.get(tensor.dtype, 0)
            and tensor.numel() > 0
            and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of is_grads_batched
        )
        for tensor in tensors
    )


@functools.cache
def _works(device: torch.device) -> bool:
    """True if Triton is installed, supports the GPU, and can compile and start a kernel there."""
    if torch.version.hip is not None or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    return runs_a_kernel(device)


def runs_a_kernel(device: torch.device) -> bool:
    """True if a very small kernel compiles and runs on the device. Warns if it does not."""
    # Triton needs a C compiler at run time, which many container images lack.
    try:
        from lora.kernels.triton import probe

        return probe.writes_one(device)
    except Exception as error:  # Triton's errors have no common class
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        warnings.warn(
            f"Triton is installed, but cannot run a kernel on {device}: {reason}. Plain operations"
            " are used, which are slower. Install a C compiler (gcc), or set CC to one.",
            stacklevel=2,
        )
        return False
