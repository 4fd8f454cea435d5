"""How kernels are checked, by the same tests: on a CPU in Triton's interpreter, on a GPU for real.

A kernel can be wrong in ways that an `allclose` against PyTorch does not show. The tools here, and the mistakes they find:

    install_interpreter_patches   the interpreter multiplies the bit patterns of bf16 numbers and truncates when it casts to
                                  bf16; with the patches it computes what the GPU computes. Does nothing on a GPU.
    assert_close_to_oracle        a small systematic error (eps, N-1, a missing term) hides below any absolute tolerance in
                                  bf16. The error is measured against fp64, bounded by the plain path's own, and must have no bias.
    guarded_outputs               launchers allocate with torch.empty: here that memory is filled with a marked NaN, which shows
                                  elements never written, and lies between canaries, which show stores out of bounds.
    with_nan_margins              a load out of bounds reads NaN.
    assert_grid_order_is_free     programs in ascending, reversed and shuffled order must give the same bits, and no two may store
                                  to one address: on a GPU they run at once, in no order.
    addresses_of_one_program      offsets past 2^31 show in the addresses that a program computes, without allocating the memory.
    pairwise                      few cases that cover every pair of parameter values.
    planted_fault                 checks the checks: they must notice a fault written into the kernel's source.

Everything patched in the interpreter is an attribute of Triton's own modules that exists from 3.6 to 3.9.
"""
import contextlib
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
from nanogpt_fast.kernels.interpreter import (INTERPRETED, before_patches, bf16_to_fp32, fp32_to_bf16,
                                              install_interpreter_patches, interpreter_patches, interpreter_problem)
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from nanogpt_fast.checks.error_rule import first_index, measure

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def examples(on_gpu, interpreted):
    """The number of examples of a hypothesis test. On a GPU a head size or a width is a constexpr, so each example compiles a kernel:
    NANOGPT_FAST_EXAMPLES lowers the number where time is short."""
    return int(os.environ.get("NANOGPT_FAST_EXAMPLES", interpreted if INTERPRETED else on_gpu))


# ---------------------------------------------------------------------------------------------------------------------------
# The error rule
# ---------------------------------------------------------------------------------------------------------------------------
def assert_close_to_oracle(out, oracle, plain, direction, *, what="out", **options):
    """Asserts that the kernel's `out` is as close to the fp64 `oracle` as plain PyTorch in low precision (`plain`), and not biased.

    out, plain: the kernel's result and the plain path's on the same inputs, any dtype. oracle: fp64. direction: "forward"
    (2 times the plain error) or "gradient" (3 times). options: those of `error_rule.measure`; error_rule.py explains the rule.
    Raises an AssertionError that says which bound was exceeded, and by how much.
    """
    problem = measure(out, oracle, plain, direction, **options).problem
    assert problem is None, f"{what}: {problem}"


# ---------------------------------------------------------------------------------------------------------------------------
# Memory: poison, margins, canaries
# ---------------------------------------------------------------------------------------------------------------------------
MARGIN_BYTES = 4096  # on either side; a multiple of every alignment a kernel may assume, wider than a row of C=768 in bf16
# A quiet NaN with a payload that arithmetic does not produce; for integers a large odd number.
POISON = {
    torch.float64: (torch.int64, 0x7FF8_DEAD_BEEF_DEAD), torch.float32: (torch.int32, 0x7FC0_DEAD),
    torch.float16: (torch.int16, 0x7EAD), torch.bfloat16: (torch.int16, 0x7FED),
    torch.int64: (torch.int64, 0x5EAD_BEEF_DEAD_BEEF), torch.int32: (torch.int32, 0x5EAD_BEEF),
    torch.int16: (torch.int16, 0x5EAD), torch.int8: (torch.int8, 0x5A), torch.uint8: (torch.uint8, 0xA5),
    torch.bool: (torch.uint8, 1),
}
_real_empty = torch.empty


def _poisoned_storage(span, dtype, device):
    """(flat tensor of margin + span + margin elements, all poison; margin in elements)."""
    bits_dtype, poison = POISON[dtype]
    margin = MARGIN_BYTES // dtype.itemsize
    flat = _real_empty(span + 2 * margin, dtype=bits_dtype, device=device).fill_(poison)
    return flat.view(dtype), margin


def _span(size, stride):
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride))


def is_poison(tensor):
    """True where an element still holds the poison it was allocated with."""
    bits_dtype, poison = POISON[tensor.dtype]
    return tensor.contiguous().view(bits_dtype) == poison


def with_nan_margins(tensor):
    """A copy of `tensor` with the same values, shape and strides, surrounded by NaNs, which also fill the gaps between its rows."""
    flat, margin = _poisoned_storage(_span(tensor.shape, tensor.stride()), tensor.dtype, tensor.device)
    view = flat.as_strided(tensor.shape, tensor.stride(), margin)
    if 0 in tensor.stride():  # expanded: write each element once
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        view[index].copy_(tensor.detach()[index])
    else:
        view.copy_(tensor.detach())
    return view


@dataclass
class Allocations:
    """What was allocated inside `guarded_outputs`: (flat storage, margin, the tensor handed out)."""
    made: list = field(default_factory=list)

    def assert_canaries_alive(self):
        for flat, margin, tensor in self.made:
            ends = torch.cat([flat[:margin], flat[flat.numel() - margin:]])
            assert is_poison(ends).all(), f"a kernel stored outside an output of shape {tuple(tensor.shape)}, {tensor.dtype}"

    def assert_all_written(self):
        for _, _, tensor in self.made:
            if tensor.dtype.itemsize == 1 or tensor.numel() == 0:  # in one byte every value may be a result
                continue
            left = is_poison(tensor)
            assert not left.any(), (f"{int(left.sum())} of {left.numel()} elements of an output {tuple(tensor.shape)}, "
                                    f"{tensor.dtype} were never written (or computed from such an element), first at {first_index(left)}")


@contextlib.contextmanager
def guarded_outputs(*, all_written=True):
    """Inside, torch.empty, torch.empty_like, torch.empty_strided and Tensor.new_empty return poison between canaries.

    At the end every canary must be intact and every element written, unless `all_written=False` (for scratch memory that kernels
    fill only in part). Yields the Allocations.
    """
    allocations = Allocations()
    real = {"empty": torch.empty, "empty_like": torch.empty_like, "empty_strided": torch.empty_strided,
            "new_empty": torch.Tensor.new_empty}

    def guard(tensor):
        if type(tensor) is not torch.Tensor or tensor.numel() == 0 or tensor.is_meta or tensor.dtype not in POISON:
            return tensor
        flat, margin = _poisoned_storage(_span(tensor.shape, tensor.stride()), tensor.dtype, tensor.device)
        guarded = flat.as_strided(tensor.shape, tensor.stride(), margin)
        allocations.made.append((flat, margin, guarded))
        return guarded

    def guarding(name):
        return lambda *args, **kwargs: guard(real[name](*args, **kwargs))

    torch.empty, torch.empty_like, torch.empty_strided = guarding("empty"), guarding("empty_like"), guarding("empty_strided")
    torch.Tensor.new_empty = guarding("new_empty")
    try:
        yield allocations
    finally:
        torch.empty, torch.empty_like, torch.empty_strided = real["empty"], real["empty_like"], real["empty_strided"]
        torch.Tensor.new_empty = real["new_empty"]
    allocations.assert_canaries_alive()
    if all_written:
        allocations.assert_all_written()


# ---------------------------------------------------------------------------------------------------------------------------
# Grid order
# ---------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def grid_order(order="ascending"):
    """Inside, the interpreter runs the programs of each launch in this order: ascending, reversed, shuffled (torch's generator).

    It also records the stores: if two programs of a launch store to one address, an AssertionError at the end names the kernel. On
    a GPU this does nothing.
    """
    if not INTERPRETED:
        yield
        return
    builder_class, executor_class = interpreter.InterpreterBuilder, interpreter.GridExecutor
    real_idx, real_dim = builder_class.set_grid_idx, builder_class.set_grid_dim
    real_store, real_call = builder_class.create_masked_store, executor_class.__call__
    launches, collisions = [], []

    def call(self, *args, **kwargs):
        launches.append({"kernel": self.fn.__name__, "stores": [], "program": -1, "order": None})
        real_call(self, *args, **kwargs)
        collisions.extend(_collisions(launches.pop()))

    def set_grid_dim(self, nx, ny, nz):
        programs = np.arange(nx * ny * nz)
        launches[-1]["order"] = {"ascending": lambda: programs, "reversed": lambda: programs[::-1],
                                 "shuffled": lambda: torch.randperm(programs.size).numpy()}[order]()
        real_dim(self, nx, ny, nz)

    def set_grid_idx(self, x, y, z):  # called in ascending order; the program that runs is the one at this place in `order`
        launch, (_, ny, nz) = launches[-1], self.grid_dim
        launch["program"] = program = int(launch["order"][(x * ny + y) * nz + z])
        real_idx(self, program // (ny * nz), program // nz % ny, program % nz)

    def create_masked_store(self, ptrs, value, mask, *rest):
        addresses, stored = np.broadcast_arrays(ptrs.data, mask.data)
        launches[-1]["stores"].append((launches[-1]["program"], addresses[stored].ravel()))
        return real_store(self, ptrs, value, mask, *rest)

    builder_class.set_grid_idx, builder_class.set_grid_dim = set_grid_idx, set_grid_dim
    builder_class.create_masked_store, executor_class.__call__ = create_masked_store, call
    try:
        yield
    finally:
        builder_class.set_grid_idx, builder_class.set_grid_dim = real_idx, real_dim
        builder_class.create_masked_store, executor_class.__call__ = real_store, real_call
    assert not collisions, "; ".join(collisions)


def _collisions(launch):
    """A list of messages about addresses to which two programs of one launch stored."""
    if not launch["stores"]:
        return []
    addresses = np.concatenate([a for _, a in launch["stores"]])
    programs = np.concatenate([np.full(a.size, p) for p, a in launch["stores"]])
    by_address = np.lexsort((programs, addresses))
    addresses, programs = addresses[by_address], programs[by_address]
    twice = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])
    if not twice.any():
        return []
    first = int(np.argmax(twice))
    return [f"{launch['kernel']}: programs {programs[first]} and {programs[first + 1]} store to the same address "
            f"({int(twice.sum())} addresses are shared)"]


def assert_grid_order_is_free(run):
    """Asserts that `run()` -> tensor or tuple of tensors gives the same bits in ascending, reversed and two shuffled program orders.

    On a GPU, where the hardware chooses the order, four runs must give the same bits.
    """
    first = None
    for order in ("ascending", "reversed", "shuffled", "shuffled"):
        with grid_order(order):
            outputs = run()
        outputs = [o.detach().clone() for o in ((outputs, ) if isinstance(outputs, torch.Tensor) else outputs) if o is not None]
        first = outputs if first is None else first
        for i, (a, b) in enumerate(zip(first, outputs, strict=True)):
            assert same_bits(a, b), f"output {i} depends on the order of the programs: {order} differs from ascending"


def same_bits(a, b):
    """True if the tensors have one dtype, one shape and equal bits (so NaN equals NaN, and 0.0 is not -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8) if a.dim() else a.reshape(1).view(torch.uint8),
                            b.contiguous().view(torch.uint8) if b.dim() else b.reshape(1).view(torch.uint8)))


@contextlib.contextmanager
def addresses_of_one_program(program, grid):
    """Inside, a launch on grid (1,) runs as program `program` (x, y, z) of `grid`; loads give 0 and stores do nothing.

    Yields a list of ("load" or "store", addresses under the mask as uint64), in order. This shows where the last program of a launch
    that is too large for any memory would read and write. Interpreter only.
    """
    builder_class = interpreter.InterpreterBuilder
    real = {name: getattr(builder_class, name) for name in ("set_grid_idx", "set_grid_dim", "create_masked_load", "create_masked_store")}
    seen = []

    def record(kind, ptrs, mask):
        addresses, active = np.broadcast_arrays(ptrs.data, mask.data)
        seen.append((kind, addresses[active].ravel()))

    def load(self, ptrs, mask, *rest):
        record("load", ptrs, mask)
        return TensorHandle(np.zeros_like(ptrs.data, dtype=interpreter._get_np_dtype(ptrs.get_element_ty())), ptrs.get_element_ty())

    builder_class.set_grid_dim = lambda self, *dims: real["set_grid_dim"](self, *(tuple(grid) + (1, 1))[:3])
    builder_class.set_grid_idx = lambda self, *idx: real["set_grid_idx"](self, *(tuple(program) + (0, 0))[:3])
    builder_class.create_masked_load = load
    builder_class.create_masked_store = lambda self, ptrs, value, mask, *rest: record("store", ptrs, mask)
    try:
        yield seen
    finally:
        for name, method in real.items():
            setattr(builder_class, name, method)


# ---------------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------------


def pairwise(*dimensions):
    """Tuples with one value of each dimension, such that every pair of values of two dimensions is in at least one of them.

    Most faults that depend on parameters depend on at most two. Greedy: take the tuple with the most pairs not yet covered (the
    first of several), until all pairs are.
    """
    def pairs(case):
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    product = [tuple(case) for case in itertools.product(*dimensions)]
    unseen, chosen = set().union(*map(pairs, product)), []
    while unseen:
        best = max(product, key=lambda case: len(pairs(case) & unseen))
        unseen -= pairs(best)
        chosen.append(best)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------------
# Planted faults
# ---------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted_fault(module, pattern, replacement, count=1):
    """Inside, `module` (a kernel file) behaves as if `re.sub(pattern, replacement)` had been applied to its source.

    pattern: a regular expression that matches exactly `count` times, else ValueError: a fault that changes nothing proves
    nothing. The mutated source is imported beside the module, so relative imports work, and its functions replace the
    module's for the duration. Code that imported a function of the module before (`from module import f`) keeps the old one; a
    kernel elsewhere that calls `module.f` gets the new one if it is launched as `fresh(kernel)`.
    """
    source = Path(module.__file__).read_text()
    mutated, found = re.subn(pattern, replacement, source)
    if found != count:
        raise ValueError(f"the fault {pattern!r} applies {found} times to {Path(module.__file__).name}, expected {count}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(module.__file__).name)  # Triton reads a kernel's source from its file
        path.write_text(mutated)
        name = f"{module.__name__}_with_a_fault"
        spec = importlib.util.spec_from_file_location(name, path)
        mutant = importlib.util.module_from_spec(spec)
        sys.modules[name] = mutant
        before = {}
        try:
            spec.loader.exec_module(mutant)
            shared = [key for key in vars(mutant) if key in vars(module) and not key.startswith("__")]
            before = {key: getattr(module, key) for key in shared}
            vars(module).update({key: getattr(mutant, key) for key in shared})
            yield mutant
        finally:
            vars(module).update(before)
            del sys.modules[name]


def fresh(kernel):
    """The kernel, decorated anew. The interpreter looks up the functions that a kernel calls at every run; on a GPU Triton compiles
    them at the first launch and does not check functions of other modules again.
    """
    return triton.jit(kernel.fn)


def assert_fault_is_seen(module, pattern, replacement, check, count=1):
    """Asserts that `check()` passes with the kernel as it is, and raises AssertionError with the fault planted."""
    check()
    with planted_fault(module, pattern, replacement, count):
        try:
            check()
        except AssertionError:
            return
    raise AssertionError(f"no check saw the fault {pattern!r} -> {replacement!r} in {module.__name__}")
