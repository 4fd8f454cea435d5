"""A pytest plugin that counts what a GPU would have to compile: `-p benchmarks.gpu.specialisations`, in Triton's interpreter.

    TRITON_INTERPRET=1 NANOGPT_FAST_EXAMPLES=3 python -m pytest tests/kernels -q -p benchmarks.gpu.specialisations

Each launch is recorded by what Triton compiles separately: the kernel, its constants, the types of its arguments, which of them are 1 or
multiples of 16, warps and stages. NANOGPT_FAST_SPECIALISATIONS names a file: one line of JSON a key.
"""
import inspect
import json
import os

LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "enable_fp_fusion")
keys = set()


def key_of(function, args, kwargs, unspecialised=()):
    """The key of a compilation of a kernel, as text. unspecialised: the names of integers that are not part of it."""
    signature = inspect.signature(function)
    given = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind_partial(*args, **given)
    bound.apply_defaults()
    found = [function.__name__]
    for name, parameter in signature.parameters.items():
        value = bound.arguments.get(name)
        if "constexpr" in str(parameter.annotation) or value is None or isinstance(value, (bool, str)):
            found.append((name, str(value)))
        elif hasattr(value, "data_ptr"):
            found.append((name, str(value.dtype), value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            special = name not in unspecialised
            found.append((name, "i64" if abs(value) >= 2 ** 31 else "i32", special and value == 1, special and value % 16 == 0))
        else:
            found.append((name, "fp32"))
    found.append(sorted((name, str(value)) for name, value in kwargs.items() if name in LAUNCH_OPTIONS))
    return json.dumps(found)


def pytest_configure(config):
    from triton.runtime.interpreter import InterpretedFunction
    run = InterpretedFunction.run

    def noted(self, *args, **kwargs):
        keys.add(key_of(self.fn, args, kwargs, self.kwargs.get("do_not_specialize") or ()))
        return run(self, *args, **kwargs)

    InterpretedFunction.run = noted


def pytest_unconfigure(config):
    if path := os.environ.get("NANOGPT_FAST_SPECIALISATIONS"):
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(f"{key}\n" for key in sorted(keys)))
    by_kernel = {}
    for key in keys:
        name = json.loads(key)[0]
        by_kernel[name] = by_kernel.get(name, 0) + 1
    print(f"\n{len(keys)} specialisations: {dict(sorted(by_kernel.items()))}")
