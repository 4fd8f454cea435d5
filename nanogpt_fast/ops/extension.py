"""The C++/CUDA extension `nanogpt_fast._C`: this file alone loads it, and says why where it, or a part of it, is missing.

What takes tensors passes their addresses: the extension is built without torch.
"""
import functools
import os

import torch

try:
    from .. import _C
    _import_error = None
except ImportError as error:
    _C, _import_error = None, error


def missing():
    """Why there is no extension: what the build wrote down, or what the import said."""
    try:
        with open(os.path.join(os.path.dirname(os.path.dirname(__file__)), "_C_missing.txt")) as file:
            return f"the extension nanogpt_fast._C was not built: {file.read().strip()}"
    except OSError:
        return f"the extension nanogpt_fast._C cannot be imported ({_import_error}); install nanogpt_fast with pip"


def lacks(function):
    """None where the extension has `function`, else the reason. Ask while importing: torch.compile cannot trace the question."""
    if _C is None:
        return f"the extension is not there ({missing()})"
    return None if hasattr(_C, function) else f"the extension was built before it had {function}: install the package again"


def has_amx():
    """True where the extension multiplies matrices on AMX tiles."""
    return hasattr(_C, "gemm_works") and _C.gemm_works()


@functools.cache
def cuda_why_not(device):
    """None where the extension can launch on CUDA device number `device`, else the reason. Asking takes several calls of the CUDA runtime."""
    reason, info = _C.cuda_why_not(device), _C.build_info()
    if reason and info["cuda"]:
        reason = f"the extension (CUDA {info['cuda']}, {info['cuda_archs']}) cannot launch: {reason}"
    return reason or None


def address(tensor):
    """Of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def plain(tensor):
    """True for a tensor whose memory can be pointed at: a subclass may hold none, or another's."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)
