"""The gate's cases of attention: the forward, the backward in both forms, and the decode kernels of attention_decode.py."""
import triton

from .. import fastest
from ..attention_backward import backward_dkdv_kernel, backward_dq_kernel, backward_head_kernel
from ..attention_decode import CHUNK_ELEMENTS, COMBINED, WARPS, combine_kernel, decode_kernel, keys_of_tile, whole_kernel
from ..attention_forward import forward_kernel
from .case import Case

# {form: (dtype, column of the tile table, the form with dropout in the same dtype)}
FORMS = {"bf16": ("bf16", "half", "dropout"), "dropout": ("bf16", "half dropout", None),
         "float32": ("fp32", "float32", "float32 dropout"), "float32 dropout": ("fp32", "float32", None)}
# (form, HEAD) that is also compiled with q, k and v apart; everything else is compiled as the model runs it, on the packed
# projection. All rows of both were compiled by Triton 3.6 and 3.9: q, k and v apart need no more, except in nine rows in fp32 or
# with dropout, which spill 8 to 24 bytes more. The tables of spills cover both.
APART = ("bf16", 64)

OCCUPANCY = "ptxas stops at the register count that lets one more program fit a multiprocessor"
_BY_3_7 = "by Triton 3.7 alone, whose ptxas has a few registers too many"
_ALL = (80, 86, 89, 90, 100)


# ------------------------------------------------------------------------------------------------------------------ forward

# {(form, HEAD): {architecture: bytes a thread}, why}: the rows that spill. The bytes are the most of Triton 3.6, 3.7 and 3.9, of
# packed and apart.
FORWARD_SPILLS = {
    ("dropout", 64): ({86: 24, 89: 24}, _BY_3_7),
    ("float32", 32): ({90: 8}, _BY_3_7),
    ("float32", 256): ({86: 16, 89: 16}, OCCUPANCY),
    ("float32 dropout", 32): ({86: 16, 89: 16}, OCCUPANCY),
    ("float32 dropout", 256): ({86: 8, 89: 8, 100: 8}, OCCUPANCY),
}
# {(form, HEAD): architectures} where the form needs more resources than its dropout variant in some Triton version.
FORWARD_NEEDS_MORE = {("float32", 64): (100,), ("float32", 256): (86, 89)}
# {(form, HEAD, architecture): loads of less than 16 bytes, why}; elsewhere the seed's is the only one.
_V_IN_PIECES = "the seed; by Triton 3.6 alone, v: with dropout it copies a thread's elements of a tile one by one"
FORWARD_NARROW = {("float32 dropout", 32, 100): (17, _V_IN_PIECES), ("float32 dropout", 64, 100): (33, _V_IN_PIECES)}


# ----------------------------------------------------------------------------------------------------------------- backward

# {(kernel, form, HEAD): {architecture: bytes a thread}, why}, as for the forward.
_PHILOX = "Philox's words beside five tiles. 64x64 computes each exponential twice, and the split form draws the mask twice"
_WHOLE_ROWS = "without tensor cores a thread keeps whole rows of both factors in registers, and no tile is smaller than 16x16"
BACKWARD_SPILLS = {
    ("head", "bf16", 32): ({80: 16}, "a few registers too many"),
    ("head", "dropout", 64): ({86: 24, 89: 24, 90: 64, 100: 72}, _PHILOX),
    ("dkdv", "float32 dropout", 32): ({100: 8}, OCCUPANCY),
    ("dkdv", "float32 dropout", 64): (dict.fromkeys(_ALL, 8), OCCUPANCY),
    ("dkdv", "float32 dropout", 256): ({100: 24}, _BY_3_7),
    ("dq", "bf16", 32): ({100: 8}, OCCUPANCY),
    ("dq", "bf16", 128): ({100: 16}, "by Triton 3.9 alone, which has a few registers too many"),
    ("dq", "float32", 32): ({90: 8, 100: 8}, OCCUPANCY),
    ("dq", "float32", 256): (dict.fromkeys(_ALL, 240), _WHOLE_ROWS),
    ("dq", "float32 dropout", 256): ({80: 288, 86: 264, 89: 264, 90: 296, 100: 296}, _WHOLE_ROWS),
    ("dq", "dropout", 64): ({80: 72}, "by Triton 3.6 and, most, 3.7, which have a few registers too many"),
    ("dq", "float32 dropout", 64): ({100: 32}, _BY_3_7),
    ("dq", "dropout", 256): ({90: 48}, "by Triton 3.6 alone, where 64x16 in 8 warps has its wgmma serialised"),
}
if triton.__version__.startswith("3.8."):      # whose ptxas alone spills more here; every other version keeps the limits above
    _BY_3_8 = "by Triton 3.8 alone"
    FORWARD_SPILLS[("float32", 256)] = ({86: 16, 89: 16, 90: 8}, _BY_3_8)
    BACKWARD_SPILLS[("head", "dropout", 64)] = ({86: 24, 89: 24, 90: 72, 100: 72}, _PHILOX)
    BACKWARD_SPILLS[("head", "float32", 64)] = ({90: 32}, _BY_3_8)
    BACKWARD_SPILLS[("head", "float32 dropout", 64)] = ({90: 16, 100: 8}, _BY_3_8)
# Loads of less than 16 bytes. In half precision these are the terms of a thread's columns: two neighbours (8 bytes) per load, in
# two loops. With dropout, minus_delta reaches a factor of a matmul, so its loads are pipelined, and Triton 3.6 repeats them in
# each stage.
BACKWARD_NARROW = {"head": {"bf16": 33, "dropout": 66, "float32": 9, "float32 dropout": 10},
                   "dkdv": {"bf16": 32, "dropout": 49, "float32": 8, "float32 dropout": 9},
                   "dq": {"bf16": 9, "dropout": 10, "float32": 9, "float32 dropout": 10}}
# {(kernel, column): {HEAD: architectures}} where the form needs no more resources than its dropout variant. Elsewhere it loads
# lse and delta in narrower pieces, or spills more in some Triton version.
BACKWARD_NEEDS_NO_MORE = {
    ("head", "half"): {32: (100,)}, ("head", "float32"): {32: (80, 100), 64: (80,)},
    ("dkdv", "half"): {32: (100,), 64: (100,), 128: (80, 86, 89)}, ("dkdv", "float32"): dict.fromkeys((32, 64, 128, 256), _ALL),
    ("dq", "half"): dict.fromkeys((32, 64, 256), _ALL) | {128: (80, 86, 89, 90)},
    ("dq", "float32"): {32: (80, 86, 89)} | dict.fromkeys((64, 128, 256), _ALL),
}


# -------------------------------------------------------------------------------------------------------------------- cases


def tiles(kernel, arch, column):
    """{HEAD: Tile} of the table's rows."""
    return {row.size[1]: row.tile for row in fastest.shipped(f"attention {kernel} tile", arch, column)}


def gate_cases(arch):
    """See case.py."""
    yield from forward_cases(arch)
    yield from backward_cases(arch)
    yield from decode_cases()


def model_case(name, kernel, tile, arch, HEAD, dropout, pointers, packed=True, **more):
    """A Case with strides that are multiples of 16, as GPT-2's are; passes `more` on."""
    constexprs = dict(D=HEAD, HEAD=HEAD, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, DROPOUT=dropout)
    if packed:          # one pointer to the gradients is passed: dq's, or dk's in the split form's second half
        absent = {"k_ptr", "v_ptr", "dv_ptr"} | ({"dk_ptr"} if "dq_ptr" in kernel.arg_names else set())
        constexprs |= {name: None for name in kernel.arg_names if name in absent}
    kinds = {**pointers, "seed_ptr": "*i64", "scale": "fp32", "scale2": "fp32", "dropout_p": "fp32"}
    if not dropout:
        constexprs["seed_ptr"] = None
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
    return Case(name=name, kernel=kernel, signature=signature, constexprs=constexprs, num_warps=tile.num_warps,
                num_stages=tile.num_stages, divisible=tuple(n for n in signature if n.startswith("stride_")),
                tile_row=f"{arch}: {tile.BLOCK_M}x{tile.BLOCK_N}, {tile.num_warps} warps, {tile.num_stages} stages", **more)


def forward_cases(arch):
    """At GPT-2 124M shapes each moves q, k, v and out once, and computes two matmuls of T x T/2 x D a head."""
    rows, heads, T, D = 64 * 1024, 64 * 12, 1024, 64
    for form, (dtype, column, with_dropout) in FORMS.items():
        for HEAD, tile in tiles("forward", arch, column).items():
            model = HEAD == 64 and form == "bf16"
            variant = with_dropout and tile == tiles("forward", arch, FORMS[with_dropout][1])[HEAD] and not model \
                and arch not in FORWARD_NEEDS_MORE.get((form, HEAD), ())
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | {"lse_ptr": "*fp32"}
            spills, why = FORWARD_SPILLS.get((form, HEAD), ({}, ""))
            narrow, what = FORWARD_NARROW.get((form, HEAD, arch), (0, "") if with_dropout else (1, "the seed"))
            name, base = f"attention.forward D={HEAD} {form}", f"attention.forward D={HEAD} {with_dropout}" if variant else ""
            limits = dict(allowed_narrow_loads=narrow, narrow_reason=what, allowed_spill_bytes=spills.get(arch, 0),
                          spill_reason=why if arch in spills else "")
            yield model_case(name, forward_kernel, tile, arch, HEAD, not with_dropout, pointers, in_model=model, variant_of=base,
                             bytes=4 * rows * 768 * 2 + heads * T * 4 if model else None,
                             flops=2 * 2 * heads * T * T // 2 * D if model else None, **limits)
            if (form, HEAD) == APART:
                yield model_case(f"{name} apart", forward_kernel, tile, arch, HEAD, not with_dropout, pointers, packed=False,
                                 variant_of=base or name, **limits)


def backward_cases(arch):
    """At GPT-2 124M shapes: the head form moves q, k, v, out and four gradients once; 5, 4 and 3 matmuls."""
    rows, heads, T, D = 64 * 1024, 64 * 12, 1024, 64
    tensor, matmul = rows * 768 * 2, 2 * heads * T * T // 2 * D
    kernels = (("head", backward_head_kernel, 8 * tensor, 5),
               ("dkdv", backward_dkdv_kernel, 6 * tensor, 4),
               ("dq", backward_dq_kernel, 6 * tensor, 3))
    tensors = [f"{name}_ptr" for name in ("q", "k", "v", "out", "do", "dq", "dk", "dv")]
    for name, kernel, moved, matmuls in kernels:
        for form, (dtype, column, with_dropout) in FORMS.items():
            for HEAD, tile in tiles(name, arch, column).items():
                counted = HEAD == 64 and form == "bf16"
                variant = (with_dropout and arch in BACKWARD_NEEDS_NO_MORE.get((name, column), {}).get(HEAD, ())
                           and tile == tiles(name, arch, FORMS[with_dropout][1])[HEAD])
                spills, why = BACKWARD_SPILLS.get((name, form, HEAD), ({}, ""))
                pointers = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("lse_ptr", "terms_ptr", "dq_sum_ptr"), "*fp32")
                title = f"attention.backward {name} D={HEAD} {form}"
                base = f"attention.backward {name} D={HEAD} {with_dropout}" if variant else ""
                limits = dict(allowed_narrow_loads=BACKWARD_NARROW[name][form], narrow_reason="lse and delta; the seed",
                              allowed_spill_bytes=spills.get(arch, 0), spill_reason=why if arch in spills else "")
                yield model_case(title, kernel, tile, arch, HEAD, not with_dropout, pointers, variant_of=base,
                                 in_model=counted and name == "head", bytes=moved if counted else None,
                                 flops=matmuls * matmul if counted else None, **limits)
                if (form, HEAD) == APART:
                    yield model_case(f"{title} apart", kernel, tile, arch, HEAD, not with_dropout, pointers, packed=False,
                                     variant_of=base or title, **limits)


def decode_cases():
    """The constants are the same on every architecture."""
    strides = ("stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_kt")
    for dtype, HEAD in (("bf16", 32), ("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
        CHUNK, BLOCK = CHUNK_ELEMENTS // HEAD, keys_of_tile(HEAD, WARPS, 4 if dtype == "fp32" else 2)
        row = f"all: {CHUNK} keys, {WARPS} warps"
        yield Case(
            name=f"attention.whole D={HEAD} {dtype}", kernel=whole_kernel, num_warps=WARPS,
            tile_row=f"all: {BLOCK} keys, {WARPS} warps",
            signature={**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"), "length_ptr": "*i32",
                       **dict.fromkeys(strides, "i32"), "scale2": "fp32", "H": "i32"},
            constexprs={"D": HEAD, "HEAD": HEAD, "BLOCK": BLOCK}, divisible=strides,
            allowed_narrow_loads=3, narrow_reason="the row's length and its one query, 2 to 4 bytes a thread")
        yield Case(
            name=f"attention.decode D={HEAD} {dtype}", kernel=decode_kernel, num_warps=WARPS, tile_row=row,
            signature={**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"), "length_ptr": "*i32", "part_ptr": "*fp32",
                       "lse_ptr": "*fp32", **dict.fromkeys(strides, "i32"), "scale2": "fp32", "H": "i32", "n_chunks": "i32"},
            constexprs={"D": HEAD, "HEAD": HEAD, "CHUNK": CHUNK, "DEPENDENT": False}, divisible=strides,
            allowed_narrow_loads=3, narrow_reason="the row's length and its one query, 2 to 4 bytes a thread")
        if dtype == "bf16":
            yield Case(
                name=f"attention.combine D={HEAD}", kernel=combine_kernel, num_warps=WARPS, tile_row=row,
                signature={"part_ptr": "*fp32", "lse_ptr": "*fp32", "length_ptr": "*i32", "out_ptr": "*bf16",
                           "H": "i32", "n_chunks": "i32"},
                constexprs={"D": HEAD, "HEAD": HEAD, "CHUNK": CHUNK, "COMBINED": COMBINED},
                allowed_narrow_loads=10, narrow_reason="the row's length, and the chunks' sums: 64 bytes a head")
