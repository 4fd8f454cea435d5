"""Programmatic dependent launch: a kernel starts before the one ahead of it in the stream has ended, and waits where it must.

Between two small kernels a GPU idles for about a microsecond: the first drains, the second starts and waits for its first bytes.
Here the second kernel's programs start as soon as all programs of the first have called `launch_dependents`. They load what the
first does not write, call `wait_for_predecessor`, and continue when the first has ended and its stores are visible. A kernel that
waits ends after every kernel ahead of it, so one wait also covers what kernels further ahead have written.

It needs compute capability 9.0 and Triton 3.4 (`launch_pdl`, `gdc_wait`, `gdc_launch_dependents`). Elsewhere, and in Triton's
interpreter, DEPENDENT is False and both functions do nothing. A captured CUDA graph keeps the early start as an edge (CUDA 12.3).

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """Allow the next kernel to start."""
    if DEPENDENT:
        tl_cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Wait until the stores of all kernels before this one are visible."""
    if DEPENDENT:
        tl_cuda.gdc_wait()


def options(tensor, early=True):
    """Launch arguments of a kernel that takes DEPENDENT. early=False: it starts only when the kernel ahead has ended."""
    if not (tensor.is_cuda and _capable(tensor.get_device())):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": early}


@functools.cache
def _capable(device_index):
    return torch.cuda.get_device_capability(device_index) >= (9, 0)
