"""Patches that make Triton's interpreter compute correctly in bf16, so that kernels can be tested on a machine without a GPU.

The interpreter keeps a bf16 number as the uint16 of its bits. That is right for loads, stores, reshapes and selects, but wrong
for arithmetic: `tl.dot` and `+` compute with the bit patterns, and the cast to bf16 truncates where a GPU rounds. Each patch
decodes to fp32, calls the original function, and rounds the result to bf16.

Nothing here runs unless Triton interprets (TRITON_INTERPRET=1) and `install_interpreter_patches` is called: by the tests (tests/kernels/harness.py),
and by backend.triton_import_error before the first op that could run an interpreted kernel. The patched attributes of Triton's
module exist from 3.6 to 3.9.
"""
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

INTERPRETED = triton.knobs.runtime.interpret


def interpreter_problem():
    """None, or why the interpreter cannot work with these versions."""
    if INTERPRETED and triton.__version__.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return (f"Triton {triton.__version__}'s interpreter turns one-element arrays into scalars in a way that NumPy "
                f"{np.__version__} refuses; use NumPy below 2.4 with it (pip install 'numpy<2.4'), or a newer Triton")
    return None


def bf16_to_fp32(bits):
    """uint16 bit patterns of bf16 -> float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values):
    """float32 -> uint16 bit patterns of bf16, to nearest, ties to even, as the GPU's cast; NaN stays NaN."""
    bits = np.array(values, np.float32, copy=True, order="C").view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(is_nan, bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _decoded(handle):
    """The handle with its bf16 numbers in fp32; a handle of another dtype itself."""
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _encoded(handle):
    """The handle's fp32 numbers rounded to bf16; comparisons (booleans) stay as they are."""
    return handle if handle.data.dtype == np.bool_ else TensorHandle(fp32_to_bf16(handle.data), tl.bfloat16)


def _patched_cast(original):

    def cast_impl(self, src, dst_type):
        src = _decoded(src)
        if dst_type.scalar == tl.bfloat16:  # through fp32, which holds fp16 and bf16 exactly
            return TensorHandle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return original(self, src, dst_type)

    return cast_impl


def _patched_arithmetic(original, positions):
    """`original(self, *handles, ...)` with the bf16 handles at `positions` decoded and a result in bf16 encoded."""

    def arithmetic(self, *args):
        if not any(_is_bf16(args[i]) for i in positions):
            return original(self, *args)
        args = [_decoded(arg) if i in positions else arg for i, arg in enumerate(args)]
        return _encoded(original(self, *args))

    return arithmetic


def _patched_dot(original):

    def create_dot(self, a, b, d, *rest):  # a and b may be bf16; the accumulator d is fp32
        return original(self, _decoded(a), _decoded(b), d, *rest)

    return create_dot


def _patched_reduction(original):

    def apply(self, input):
        for tensor in input if isinstance(input, tuple) else (input, ):
            if tensor.dtype.scalar == tl.bfloat16:
                raise TypeError("a reduction or scan over bf16: the interpreter would add bit patterns, and a GPU would round "
                                "at every step. Widen to fp32 first")
        return original(self, input)

    return apply


def interpreter_patches():
    """{attribute of the interpreter's builder: its replacement}. A test for each shows that it is needed and correct."""
    builder = interpreter.InterpreterBuilder
    return {
        "create_dot": _patched_dot(builder.create_dot),
        "cast_impl": _patched_cast(builder.cast_impl),
        "binary_op": _patched_arithmetic(builder.binary_op, (0, 1)),
        "unary_op": _patched_arithmetic(builder.unary_op, (0, )),
        "create_fma": _patched_arithmetic(builder.create_fma, (0, 1, 2)),
        "create_clampf": _patched_arithmetic(builder.create_clampf, (0, 1, 2)),
    }


_callees_patched = set()  # modules of device functions in which the interpreter's language has replaced Triton's


def _call_device_function(self, *args, **kwargs):
    """Calls a jitted function from a kernel, and patches the language of its module only once.

    Triton patches its whole language at every such call, which takes half the time of a test. Once is enough: what a launch
    patches stays patched until its end, and what a callee's module patches (tl.core, for tl.sum and tl.philox) stays for good.
    """
    if self.fn.__module__ not in _callees_patched:
        interpreter._patch_lang(self.fn)
        _callees_patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


before_patches = {}  # the original attributes: filled by install_interpreter_patches, for the tests that show the patches' need


def install_interpreter_patches():
    """Make the interpreter compute with bf16 numbers instead of their bit patterns, in the whole process. Does nothing on a GPU."""
    if not INTERPRETED or before_patches:
        return
    builder = interpreter.InterpreterBuilder
    for name, replacement in interpreter_patches().items():
        before_patches[name] = getattr(builder, name)
        setattr(builder, name, replacement)
    if not hasattr(builder, "get_bf16"):  # Triton 3.6 has no bf16 constants
        builder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)
    interpreter.ReduceScanOpInterface.apply = _patched_reduction(interpreter.ReduceScanOpInterface.apply)
    interpreter.InterpretedFunction.__call__ = _call_device_function
