"""The C++/CUDA extension `nanogpt_fast._C`: only this file loads it, and it gives the reason if the extension or a part is missing.

Tensors are passed to it by address, because it is built without torch.
"""
import functools
import os
import warnings

import torch

try:
    from .. import _C
    _import_error = None
except ImportError as error:
    _C, _import_error = None, error


def _why_missing():
    try:
        with open(os.path.join(os.path.dirname(os.path.dirname(__file__)), "_C_missing.txt")) as file:
            return f"the extension nanogpt_fast._C was not built: {file.readline().strip()}"
    except OSError:
        return f"the extension nanogpt_fast._C cannot be imported ({_import_error}); install nanogpt_fast with pip"


_MISSING = _why_missing()       # read once: torch.compile cannot trace a file's


def missing():
    """Why the extension is missing, in one line: the reason that the build recorded, or the import error."""
    return _MISSING


if _C is None and os.environ.get("LOCAL_RANK", "0") == "0":     # pip hides what the build said; this is the first use
    warnings.warn_explicit(f"parts run on plain PyTorch, slower: {missing()} (`nanogpt-fast doctor` prints the command)", RuntimeWarning,
                           "nanogpt_fast", 1)


def lacks(function):
    """None if the extension has `function`, else the reason. Call it at import time: torch.compile cannot trace it."""
    if _C is None:
        return f"the extension is missing ({missing()})"
    return None if hasattr(_C, function) else f"the installed extension is too old to have {function}: reinstall the package"


def has_amx():
    """True if the extension can multiply matrices on AMX tiles here."""
    return hasattr(_C, "gemm_works") and _C.gemm_works()


@functools.cache
def cuda_why_not(device):
    """None if the extension can launch on CUDA device number `device`, else the reason. Cached: the check makes several CUDA calls."""
    reason, info = _C.cuda_why_not(device), _C.build_info()
    if reason and info["cuda"]:
        reason = f"the extension (CUDA {info['cuda']}, {info['cuda_archs']}) cannot launch: {reason}"
    return reason or None


def address(tensor):
    """The address of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def plain(tensor):
    """True for a tensor that can be passed by address. A subclass may have no memory of its own, or wrap another tensor."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def plain_fp32(tensor, device_type):
    """True for a contiguous fp32 tensor on such a device that can be passed by address."""
    return (plain(tensor) and tensor.dtype == torch.float32 and tensor.device.type == device_type
            and tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_neg())
