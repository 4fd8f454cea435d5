"""All cases of all kernel families."""
import functools

from ..interpreter import INTERPRETED
from . import adamw, attention, cross_entropy, decode, embedding, layer_norm, mlp

FAMILIES = (adamw, attention, cross_entropy, decode, embedding, layer_norm, mlp)
EVERY_FORM = 90                 # variants are compiled for this architecture too: the one whose floors are printed


def gate_cases(arch):
    """The cases of every family for one architecture."""
    for family in FAMILIES:
        yield from family.gate_cases(arch)


@functools.cache
def all_cases(arch, every=False):
    """{name: Case} for one architecture: every case, except that variants are for EVERY_FORM alone unless `every`."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so Triton interprets kernels and can't compile them; unset it")
    cases = {}
    for case in gate_cases(arch):
        if case.name in cases:
            raise ValueError(f"two gate cases for sm_{arch} are called {case.name!r}; expected one name for each")
        if every or arch == EVERY_FORM or not case.variant_of:
            cases[case.name] = case
    return cases
