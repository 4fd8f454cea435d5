"""The gate's cases of the MLP: matmuls with an epilogue, and the pointwise kernels."""
from .. import fastest, mlp
from .case import Case

COLUMN = {"bf16": "half", "fp16": "half", "fp32": "float32"}     # of the table


def gate_cases(arch):
    """Each kernel in each row of the tables, at GPT-2 124M shapes: B=64, T=1024, C=768, F=3072."""
    M, C, F = 64 * 1024, 768, 3072
    flops = 2 * M * C * F
    size = {"bf16": 2, "fp16": 2, "fp32": 4}

    def optional(**pointers):
        """(signature, constexprs) of pointers that may be None."""
        return {k: v for k, v in pointers.items() if v}, {k: None for k, v in pointers.items() if not v}

    def linear_act_case(what, kind, act="gelu", keep_h=True, dropout=False, variant_of=""):
        tile = fastest.shipped_tile("mlp forward tile", arch, COLUMN[kind])
        pointers, nones = optional(x_ptr=f"*{kind}", w_ptr=f"*{kind}", b_ptr="*fp32", h_ptr=keep_h and f"*{kind}",
                                   y_ptr=f"*{kind}", seed_ptr=dropout and "*i64")
        moved = M * (C + F + F * keep_h) + C * F
        return Case(
            name=f"mlp.linear_act {what} {kind}", kernel=mlp._linear_act_kernel,
            signature={**pointers, "dropout_p": "fp32", "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32"},
            constexprs={**nones, "ACTIVATION": act, "EXACT": kind == "fp32", "DROPOUT": dropout,
                        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K},
            num_warps=tile.num_warps, num_stages=tile.num_stages, divisible=("N", "K", "stride_x"),
            tile_row=f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K} w{tile.num_warps} s{tile.num_stages}",
            bytes=moved * size[kind] + 4 * (C if dropout else F), flops=flops if kind != "fp32" else None,
            variant_of=variant_of,
            allowed_spill_bytes=8 if kind == "fp32" and arch == 90 else 0,
            spill_reason="by Triton 3.6's ptxas alone" if kind == "fp32" and arch == 90 else "",
            allowed_narrow_loads=20, narrow_reason="the bias, two columns at a time as in the accumulator, and the seed")

    def linear_dact_case(what, kind, act="gelu", post=False):
        tile = fastest.shipped_tile("mlp backward tile", arch, COLUMN[kind])
        pointers, nones = optional(dy_ptr=f"*{kind}", w_ptr=f"*{kind}", h_ptr=f"*{kind}", b_ptr=None, dh_ptr=f"*{kind}",
                                   post_ptr=post and f"*{kind}", partial_ptr="*fp32")
        moved = M * (C + 2 * F + F * post) + C * F
        return Case(
            name=f"mlp.linear_dact {what} {kind}", kernel=mlp._linear_dact_kernel,
            signature={**pointers, "M": "i32", "N": "i32", "K": "i32", "stride_dy": "i32"},
            constexprs={**nones, "ACTIVATION": act, "EXACT": kind == "fp32",
                        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K},
            num_warps=tile.num_warps, num_stages=tile.num_stages, divisible=("N", "K", "stride_dy"),
            tile_row=f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K} w{tile.num_warps} s{tile.num_stages}",
            bytes=moved * size[kind] + 4 * F * (M // tile.BLOCK_M), flops=flops if kind != "fp32" else None)

    def act_case(what, kind, N, act="gelu", dropout=False, in_model=False):
        block_m, block_n, warps = mlp.POINTWISE_TILE
        pointers, nones = optional(h_ptr=f"*{kind}", b_ptr="*fp32", y_ptr=f"*{kind}", seed_ptr=dropout and "*i64")
        return Case(
            name=f"mlp.act {what} {kind}", kernel=mlp._act_kernel,
            signature={**pointers, "dropout_p": "fp32", "M": "i32", "N": "i32"},
            constexprs={**nones, "ACTIVATION": act, "EXACT": kind == "fp32", "DROPOUT": dropout,
                        "BLOCK_M": block_m, "BLOCK_N": block_n},
            num_warps=warps, divisible=("N",), tile_row=f"{block_m}x{block_n} w{warps}", bytes=2 * M * N * size[kind] + 4 * N,
            in_model=in_model, allowed_narrow_loads=2, narrow_reason="the bias and the seed")

    def dact_case(what, kind, N, act="gelu", dropout=False, dh=True, post=False, in_model=False):
        block_m, block_n, warps = mlp.POINTWISE_TILE
        has_h = act != "none"
        pointers, nones = optional(dy_ptr=f"*{kind}", h_ptr=has_h and f"*{kind}", b_ptr=has_h and "*fp32",
                                   dh_ptr=dh and f"*{kind}",
                                   post_ptr=post and f"*{kind}", partial_ptr="*fp32", seed_ptr=dropout and "*i64")
        groups = -(-M // mlp.rows_per_program(M, -(-N // block_n)))
        return Case(
            name=f"mlp.dact {what} {kind}", kernel=mlp._dact_kernel,
            signature={**pointers, "dropout_p": "fp32", "M": "i32", "N": "i32", "ROWS": "i32"},
            constexprs={**nones, "ACTIVATION": act, "EXACT": kind == "fp32", "DROPOUT": dropout,
                        "BLOCK_M": block_m, "BLOCK_N": block_n},
            num_warps=warps, divisible=("N",), tile_row=f"{block_m}x{block_n} w{warps}",
            bytes=(1 + has_h + dh + post) * M * N * size[kind] + 4 * N * groups, in_model=in_model,
            allowed_narrow_loads=2, narrow_reason="the bias and the seed")

    train = "mlp.linear_act fc gelu train bf16"
    yield linear_act_case("fc gelu train", "bf16")
    yield linear_act_case("fc gelu inference", "bf16", keep_h=False, variant_of=train)
    yield linear_act_case("fc gelu_tanh train", "fp16", act="gelu_tanh", variant_of=train)
    yield linear_act_case("proj dropout", "bf16", act="none", keep_h=False, dropout=True)
    yield linear_act_case("fc gelu train", "fp32")
    yield linear_dact_case("gelu", "bf16")
    yield linear_dact_case("gelu recompute", "bf16", post=True)
    yield linear_dact_case("gelu_tanh recompute", "fp16", act="gelu_tanh", post=True)
    yield linear_dact_case("gelu", "fp32")
    yield act_case("fc gelu", "bf16", F, in_model=True)
    yield act_case("proj dropout", "bf16", C, act="none", dropout=True)
    yield act_case("fc gelu", "fp32", F)
    yield dact_case("fc gelu", "bf16", F, in_model=True)
    yield dact_case("fc gelu recompute", "bf16", F, post=True)
    yield dact_case("proj dropout", "bf16", C, act="none", dropout=True)
    yield dact_case("proj column sums", "bf16", C, act="none", dh=False, in_model=True)
    yield dact_case("fc gelu", "fp32", F)
