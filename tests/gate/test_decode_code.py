"""What the decode kernels compile to: weights, and keys of earlier steps, are loaded before the wait for the kernel ahead,
everything else comes after it.

Starting early is safe because of this order alone, and no run without a GPU of compute capability 9.0 would notice it broken.
"""
import ast
import inspect
import os
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from nanogpt_fast.kernels import decode, decode_rows  # noqa: E402
from nanogpt_fast.kernels.gate.decode import gate_cases  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

PARAMETERS = {"w_ptr", "b_ptr", "ln_weight_ptr", "ln_bias_ptr"}


def ptx(case, arch):
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in case.signature.items()
             if kind.startswith("*") or name in case.divisible}
    return triton.compile(ASTSource(case.kernel, signature, dict(case.constexprs), attrs), target=GPUTarget("cuda", arch, 32),
                          options=dict(num_warps=case.num_warps, num_stages=case.num_stages, **case.options)).asm["ptx"]


def accesses(code):
    """The loads and stores of global memory, the waits and the permissions to start, in order."""
    return re.findall(r"\b(ld\.global[\w.:]*|st\.global[\w.:]*|griddepcontrol\.\w+)", code)


def gpt2_cases(arch):
    return [case for case in gate_cases(arch) if case.bytes is not None]


def early_elements(case):
    """Of half-precision tiles that a program loads before the wait."""
    c = case.constexprs
    if case.kernel is decode_rows.attend_kernel:
        return 2 * c["BLOCK"] * c["HEAD"]
    if "SPLIT" in c:
        return c["OUT"] * c.get("EARLY", 1) * c["SPLIT"] * c["SLICE"]
    return c["OUT"] * c["BLOCK_K"] if "OUT" in c else 0     # 0: attention at batch 1 and embed


@pytest.mark.parametrize("case", gpt2_cases(90), ids=lambda case: case.name)
def test_on_sm_90_weights_are_loaded_before_the_wait_and_nothing_is_stored(case):
    found = accesses(ptx(case, 90))
    assert found.count("griddepcontrol.wait") == 1 and found.count("griddepcontrol.launch_dependents") == 1
    before, after = found[:found.index("griddepcontrol.wait")], found[found.index("griddepcontrol.wait"):]
    assert not [access for access in before if access.startswith("st.")]
    wide = sum(".v4.b32" in access for access in before)
    # a thread's share; the last piece of K may lie outside for the upper warps, but is loaded under a mask
    assert wide >= early_elements(case) * 2 // 16 // (32 * case.num_warps)
    if early_elements(case) == 0:
        assert wide == 0
    assert [access for access in after if access.startswith("st.")]


def test_before_sm_90_there_is_no_wait():
    assert not [access for case in gpt2_cases(80)[:3] for access in accesses(ptx(case, 80)) if "griddep" in access]


def calls(node, name):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == name


KERNELS = [(module, name) for module in (decode, decode_rows) for name in vars(module) if name.endswith("_kernel")]
EARLIER_STEPS = {"position_ptr", "k_ptr", "v_ptr"}          # of decode_rows.attend_kernel: written before this step began


@pytest.mark.parametrize("module,name", KERNELS, ids=lambda of: getattr(of, "__name__", of))
def test_every_kernel_waits_and_before_that_names_no_pointer_but_parameters(module, name):
    body = ast.parse(inspect.getsource(getattr(module, name).fn)).body[0].body
    at = [i for i, statement in enumerate(body) if calls(statement, "wait_for_predecessor")]
    assert len(at) == 1, "one wait, on every path"
    names = {node.id for statement in body[:at[0]] for node in ast.walk(statement) if isinstance(node, ast.Name)}
    allowed = PARAMETERS | EARLIER_STEPS if name == "attend_kernel" else PARAMETERS
    assert {name for name in names if name.endswith("_ptr")} <= allowed
    assert not any(isinstance(node, ast.Return) for statement in body[:at[0]] for node in ast.walk(statement))
