"""The gate's cases of the decode step: decode.py's kernels for one row, decode_rows.py's for 8 and 16."""
import triton

from .. import decode, decode_rows, fastest
from ..host import padded
from ..attention_decode import CHUNK_ELEMENTS, WARPS as ATTEND_WARPS, decode_kernel
from .case import Case


# Stack bytes that Triton 3.8's ptxas alone spills, and is allowed: {(case, architecture): bytes}.
SPILLS_3_8 = {("decode.head 768 bf16", 90): 48, ("decode_rows.linear_add 768 B=16 bf16", 80): 8,
              ("decode_rows.linear_add 3072 B=8 bf16", 86): 8, ("decode_rows.linear_add 3072 B=8 bf16", 89): 8}


def spilled(name, arch):
    """The limits of a Case, by `SPILLS_3_8`."""
    bytes = SPILLS_3_8.get((name, arch), 0) if triton.__version__.startswith("3.8.") else 0
    return dict(allowed_spill_bytes=bytes, spill_reason="by Triton 3.8's ptxas alone" if bytes else "")


def gate_cases(arch):
    """See case.py."""
    yield from one_row_cases(arch)
    yield from rows_cases(arch)


def one_row_cases(arch):
    """Each kernel at GPT-2 124M's shapes for one row (in bf16 with bytes, at position 1,023), and in each row of the table."""
    dependent = arch >= 90
    scalars = {"T": "i32", "V": "i32", "n_chunks": "i32", "eps": "fp32"}
    fixed = {"token_ptr": "*i64", "position_ptr": "*i64", "length_ptr": "*i32"}
    floats = [f"{name}_ptr" for name in ("x", "q", "h", "part", "lse", "logits", "wte", "wpe", "ln_weight", "ln_bias")]

    def case(name, kernel, tile, dtype, constexprs, moved=None, reason="", narrow=0, variant_of=""):
        pointers = [arg for arg in kernel.arg_names if arg.endswith("_ptr")]
        kinds = {arg: fixed.get(arg, "*fp32" if arg in floats else f"*{dtype}") for arg in pointers}
        signature = {arg: kind for arg, kind in (kinds | scalars).items() if arg in kernel.arg_names and arg not in constexprs}
        return Case(name=f"decode.{name} {dtype}", kernel=kernel, signature=signature,
                    constexprs={**constexprs, "OUT": tile.BLOCK_N, "DEPENDENT": dependent}, num_warps=tile.num_warps,
                    tile_row=f"all: {tile.BLOCK_N} outputs, {tile.num_warps} warps", bytes=moved, flops=None,
                    options={"launch_pdl": True} if dependent else {}, allowed_narrow_loads=narrow, narrow_reason=reason,
                    variant_of=variant_of, **spilled(f"decode.{name} {dtype}", arch))

    def cases(C, F, H, D, dtype, counted=False):
        """The kernels of one model. counted: with bytes, of the weights and of what the kernel before has written."""
        HEAD = padded(D)
        (K, tile), (combine_K, combine_tile), (F_K, linear_tile) = (
            (padded(width), fastest.shipped_tile(f"decode {kernels} tile", arch, size=width))
            for kernels, width in (("norm", C), ("combine", H * HEAD), ("add", F)))
        CHUNK = CHUNK_ELEMENTS // HEAD
        bytes = lambda weights, rest: 2 * weights + 4 * rest if counted else None
        norm, bias = dict(C=C, BLOCK_K=K), "a bias of OUT outputs"
        short, more = ("", 0) if C >= 256 else ("rows too short for 16 bytes in each thread", 4)
        for first in (True, False):
            none = {} if first else {"token_ptr": None, "wte_ptr": None, "wpe_ptr": None}
            yield case(f"norm_qkv{' first' * first} {C}", decode.norm_qkv_kernel, tile, dtype, {**norm, **none, "D": D},
                       bytes(3 * C * C, 6 * C), f"{bias}, the position{', the token' * first}", 4 + more,
                       "" if first else f"decode.norm_qkv first {C} {dtype}")
        yield case(f"combine_add {C}", decode.combine_add_kernel, combine_tile, dtype,
                   dict(H=H, D=D, HEAD=HEAD, CHUNK=CHUNK, BLOCK_K=combine_K,
                        COMBINED=decode.combined_chunks(combine_K, combine_tile)),
                   bytes(C * C, 1024 // CHUNK * (C + H) + 3 * C), f"{bias} and of x, the row's length, the sums of heads", 40)
        yield case(f"norm_act {C}", decode.norm_act_kernel, tile, dtype, {**norm, "F": F, "ACTIVATION": "gelu"},
                   bytes(F * C, 4 * C + F), bias, 4 + more)
        yield case(f"linear_add {C}", decode.linear_add_kernel, linear_tile, dtype, dict(C=C, F=F, BLOCK_K=F_K),
                   bytes(C * F, F + 3 * C), f"{bias}, OUT elements of x", 4 + more)
        yield case(f"head {C}", decode.head_kernel, tile, dtype, {**norm, "b_ptr": None},
                   bytes(50304 * C, 3 * C + 50304), short, more)

    strides = ("stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_kt")
    yield Case(name="decode.attend D=64 bf16", kernel=decode_kernel, num_warps=ATTEND_WARPS,
               signature={"q_ptr": "*fp32", "k_ptr": "*bf16", "v_ptr": "*bf16", "length_ptr": "*i32", "part_ptr": "*fp32",
                          "lse_ptr": "*fp32", **dict.fromkeys(strides, "i32"), "scale2": "fp32", "H": "i32", "n_chunks": "i32"},
               constexprs={"D": 64, "HEAD": 64, "CHUNK": CHUNK_ELEMENTS // 64, "DEPENDENT": dependent}, divisible=strides,
               tile_row=f"all: {CHUNK_ELEMENTS // 64} keys, {ATTEND_WARPS} warps",
               bytes=2 * 2 * 1024 * 768 + 4 * (16 + 1) * 768,
               options={"launch_pdl": True} if dependent else {}, allowed_narrow_loads=1,
               narrow_reason="the row's length")
    yield from cases(768, 3072, 12, 64, "bf16", counted=True)
    yield from cases(768, 3072, 12, 64, "fp32")
    yield from cases(1600, 6400, 25, 64, "bf16")                        # GPT-2 XL: rows of 2,048 and 8,192, padded
    # Together with those above, every row of the table (a test checks); F is a row of `add` that no other case has.
    for C, F in ((16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (4096, 1024), (8192, 2048)):
        yield from cases(C, F, max(1, C // 64), min(C, 64), "bf16")


def rows_cases(arch):
    """Each kernel at GPT-2 124M's shapes for 8 rows and 16; GPT-2 XL's matrices for 16."""
    dependent = arch >= 90
    scalars = {"B": "i32", "T": "i32", "V": "i32", "eps": "fp32", "scale2": "fp32"}
    fixed = {"token_ptr": "*i64", "position_ptr": "*i64", "length_ptr": "*i32"}
    floats = [f"{name}_ptr" for name in ("x", "stats", "q", "logits", "wte", "wpe", "ln_weight", "ln_bias")]
    narrow = dict(allowed_narrow_loads=80, narrow_reason="pairs of statistics, the norm's parameters, biases, the rows' lengths, x")

    def case(name, kernel, constexprs, warps, moved=None):
        constexprs = {**constexprs, "DEPENDENT": dependent}
        kinds = {arg: (fixed | scalars).get(arg, "*fp32" if arg in floats else "*bf16") for arg in kernel.arg_names}
        signature = {arg: kind for arg, kind in kinds.items() if arg not in constexprs}
        return Case(name=f"decode_rows.{name} bf16", kernel=kernel, signature=signature, num_warps=warps, bytes=moved,
                    constexprs=constexprs, tile_row=f"all: {warps} warps",
                    options={"launch_pdl": True} if dependent else {}, **narrow, **spilled(f"decode_rows.{name} bf16", arch))

    def cases(B, C, F, H, D, wide=False):
        """bytes: at position 1,023."""
        GROUP = decode_rows.OUTPUTS["linear_add"]
        groups = dict(GROUP=GROUP, GROUPS=triton.next_power_of_2(-(-C // GROUP)))
        bytes = lambda weights, rest: None if wide else 2 * weights + B * rest
        norm, warps = decode_rows.tile_for("norm_act", B, C, 4)
        yield case(f"norm_act {C} B={B}", decode_rows.norm_act_kernel, dict(C=C, F=F, ACTIVATION="gelu", **groups, **norm), warps,
                   bytes(F * C, 4 * C + 2 * F))
        linear, warps = decode_rows.tile_for("linear_add", B, F, 2)
        yield case(f"linear_add {F} B={B}", decode_rows.linear_add_kernel, dict(C=C, K=F, **linear), warps,
                   bytes(C * F, 2 * F + 8 * C))
        head, warps = decode_rows.tile_for("head", B, C, 4)
        yield case(f"head {C} B={B}", decode_rows.head_kernel, dict(C=C, b_ptr=None, **groups, **head), warps,
                   bytes(50304 * C, 4 * C + 4 * 50304))
        if not wide:
            yield case(f"embed {C} B={B}", decode_rows.embed_kernel, dict(C=C, **groups), 4, bytes(0, 12 * C))
            norm, warps = decode_rows.tile_for("norm_qkv", B, C, 4)
            yield case(f"norm_qkv {C} B={B}", decode_rows.norm_qkv_kernel, dict(C=C, D=D, **groups, **norm), warps,
                       bytes(3 * C * C, 4 * C + 8 * C))
            BLOCK, warps = decode_rows.attend_tile(padded(D), B * H)
            yield case(f"attend D={D} B={B}", decode_rows.attend_kernel, dict(H=H, D=D, HEAD=padded(D), BLOCK=BLOCK), warps,
                       bytes(0, 4 * 1024 * C + 6 * C))
            linear, warps = decode_rows.tile_for("linear_add", B, C, 2)
            yield case(f"linear_add {C} B={B}", decode_rows.linear_add_kernel, dict(C=C, K=C, **linear), warps, bytes(C * C, 10 * C))

    for B in (8, 16):
        yield from cases(B, 768, 3072, 12, 64)
    yield from cases(16, 1600, 6400, 25, 64, wide=True)
