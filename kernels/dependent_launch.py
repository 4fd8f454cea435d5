"""Programmatic dependent launch: a kernel starts before the one ahead of it in the stream has ended, and waits when it must.

Between two small kernels a GPU idles for a microsecond or so: the first drains, the second starts and waits for its first
bytes. Here the second's programs start as soon as all of the first's have called `launch_dependents`; they load what the first
does not write, call `wait_for_predecessor`, and go on when the first has ended and its stores can be seen. A kernel of which a
program waits ends after everything ahead of it, so one wait is enough for what kernels further ahead have written.

Compute capability 9.0, Triton 3.4 and later (`launch_pdl`, `gdc_wait`, `gdc_launch_dependents`). Elsewhere, and in Triton's
interpreter, DEPENDENT is False and the functions are nothing. A captured CUDA graph keeps the early start as an edge (CUDA
12.3).

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """The next kernel may start."""
    if DEPENDENT:
        tl_cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """From here on, what the kernels before have stored is there."""
    if DEPENDENT:
        tl_cuda.gdc_wait()


def options(tensor, early=True):
    """Arguments for the launch of a kernel that takes DEPENDENT. early=False: it starts when the kernel ahead has ended."""
    if not (tensor.is_cuda and _capable(tensor.get_device())):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": early}


@functools.cache
def _capable(device_index):
    return torch.cuda.get_device_capability(device_index) >= (9, 0)
