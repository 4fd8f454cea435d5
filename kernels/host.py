"""The host's side of a launch: which GPU is current, how many multiprocessors it has.

At small sizes the GPU waits for the host: a step of GPT-2 124M calls some 75 ops, and Triton itself takes microseconds of host
time for each launch. So a launcher computes what does not depend on the lengths once (`functools.cache`), makes no views, and
rounds up with -(-a // b): triton.cdiv and triton.next_power_of_2, which are callable from kernels too, take 2 us a call.
`benchmarks/overhead.py` measures the host's time.
"""
import functools

import torch
import triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)     # that the kernels take


def elsewhere(tensor):
    """True where the tensor is on a GPU that is not the current one, which is where Triton launches."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


@functools.cache
def multiprocessors(device):
    """Multiprocessors of a GPU, numbered as by `tensor.get_device()`; device=-1 (interpreter) returns 1.

    With one multiprocessor, interpreted programs loop over several tiles, as on a GPU.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


@functools.cache
def padded(n):
    """n rounded up to a power of two, at least 16: the block that holds a row of n numbers, and that `tl.dot` accepts."""
    return max(16, triton.next_power_of_2(n))
