"""The CUDA kernels for Hopper (H100, H200), built on TMA and wgmma: whether they can run on a given GPU, and why not."""
import functools

import torch

from .. import extension

DTYPES = (torch.bfloat16, torch.float16)


def card_why_not(index):
    """"" if the extension can launch its Hopper kernels on CUDA device number `index`, else the reason."""
    return _cached_card_why_not(index)


card_why_not._dynamo_marked_constant = True            # evaluated once while tracing; Dynamo would not see the mark on the cached function


@functools.cache
def _cached_card_why_not(index):
    if torch.cuda.get_device_capability(index) != (9, 0):
        return "the kernel is for GPUs of compute capability 9.0 (H100, H200)"
    if extension._C is None:
        return extension.missing()
    if not hasattr(extension._C, "linear_act_sm90"):
        return "the extension has no code for it: it was built without nvcc 12 or later, or not for sm_90"
    return extension.cuda_why_not(index) or ""
