"""What launchers ask the host for around a launch, and what it costs: at small sizes the GPU waits for the host.

A step of GPT-2 124M calls some 75 ops, and Triton itself takes the host microseconds for each launch. So a launcher decides what
does not depend on the lengths once (`functools.cache`), makes no views, and rounds up with -(-a // b): triton.cdiv and
triton.next_power_of_2, functions for use in kernels too, take 2 us a call. `benchmarks/overhead.py` measures it.
"""
import functools

import torch


def elsewhere(tensor):
    """True where Triton, which launches on the current GPU, would not launch on the tensor's."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


@functools.cache
def multiprocessors(device):
    """Of the GPU with this number, as `tensor.get_device()` gives it; 1 without one (-1), so that the interpreter's programs walk
    several tiles too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1
