"""All cases of all kernel families, and the modules whose kernels they must cover."""
import functools
import importlib
import os
import pkgutil

import triton

from .. import __name__ as KERNELS, __path__ as KERNEL_FOLDERS
from . import attention, cross_entropy, decode, layer_norm, mlp

FAMILIES = (attention, cross_entropy, decode, layer_norm, mlp)
EVERY_FORM = 90                 # variants are compiled for this architecture too: the one whose floors are printed


def kernels_of(module):
    """{name: kernel} of the kernels that a module defines: its jitted functions called `..._kernel`."""
    return {name: value for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__}


def kernel_modules():
    """The modules of nanogpt_fast.kernels that define kernels, by name."""
    for found in pkgutil.iter_modules(KERNEL_FOLDERS):
        if not found.ispkg:
            module = importlib.import_module(f"{KERNELS}.{found.name}")
            if kernels_of(module):
                yield module


def gate_cases(arch):
    """The cases of every family for one architecture."""
    for family in FAMILIES:
        yield from family.gate_cases(arch)


@functools.cache
def all_cases(arch, every=False):
    """{name: Case} for one architecture: every case, except that variants are for EVERY_FORM alone unless `every`."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        raise RuntimeError("TRITON_INTERPRET is set, so Triton interprets kernels and can't compile them; unset it")
    cases = {}
    for case in gate_cases(arch):
        if case.name in cases:
            raise ValueError(f"two gate cases for sm_{arch} are called {case.name!r}; expected one name for each")
        if every or arch == EVERY_FORM or not case.variant_of:
            cases[case.name] = case
    return cases
