"""The gate's cases of AdamW's step."""
import triton.language as tl

from .. import adamw
from .case import Case

PARAMETERS, MATRICES, TENSORS = 124_475_904, 123_532_032, 148       # of GPT-2 124M; those that have a copy


def gate_cases(arch):
    """One Case for each kernel, the same for every `arch`; the step with clipping and without."""
    pointers = {"table_ptr": "*i64", "groups_ptr": "*fp64", "rates_ptr": "*fp32", "numbers_ptr": "*fp32", "pieces_ptr": "*i32"}
    yield Case(name="adamw.numbers", kernel=adamw._adamw_numbers_kernel, num_warps=adamw.TENSORS // 32, in_model=True, bytes=TENSORS * 112,
               signature={name: pointers.get(name, "i32") for name in adamw._adamw_numbers_kernel.arg_names if name != "TENSORS"},
               constexprs={"TENSORS": adamw.TENSORS}, flops=TENSORS * 20, allowed_narrow_loads=10,
               narrow_reason="what is known of a tensor and its group")
    for clipped in (True, False):
        absent = {} if clipped else {"factor_ptr": None}
        given = {name: pointers.get(name, "*fp32") for name in adamw._adamw_kernel.arg_names if name.endswith("_ptr") and name not in absent}
        yield Case(name="adamw.step" + " clipped" * clipped, kernel=adamw._adamw_kernel, signature=given, num_warps=4, in_model=clipped,
                   constexprs={**absent, "COPY_DTYPE": tl.bfloat16, "PIECE": adamw.PIECE, "BLOCK": adamw.BLOCK},
                   bytes=28 * PARAMETERS + 2 * MATRICES if clipped else None, flops=16 * PARAMETERS if clipped else None,
                   allowed_narrow_loads=40, narrow_reason="the table's row, and a tensor's last piece")
