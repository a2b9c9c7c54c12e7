"""The smallest kernel, which shows that Triton works on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _one(out_ptr):
    tl.store(out_ptr, 1)


def writes_one(device: torch.device) -> bool:
    """True if a kernel that writes 1 wrote 1."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        _one[(1,)](out, enable_fp_fusion=False)
    return bool(out.item() == 1)
