"""The gate's cases of the linear cross-entropy: the loss and its gradient."""
from .. import cross_entropy, fastest
from .case import Case


def gate_cases(arch):
    """Both kernels in each row of the table, in half precision; bf16 at GPT-2 124M's shape also in their other forms."""
    N, V = 64 * 1024, 50304
    widths = {"fp32": 4, "fp16": 2, "bf16": 2}
    scalars = dict(allowed_narrow_loads=4, narrow_reason="the target, its logit, a row's statistics, the scale: one each a row")

    def loss_case(kind, columns, gradient, variant_of=""):
        tile = fastest.shipped_tile("cross_entropy tile", arch, size=columns)
        saved = {} if gradient else {"maxima_ptr": "*fp32", "log_sums_ptr": "*fp32"}
        model = columns == V
        return Case(
            name=f"cross_entropy.loss {'with dlogits ' if gradient else ''}V={columns} {kind}", kernel=cross_entropy._loss_kernel,
            signature={"logits_ptr": f"*{kind}", "targets_ptr": "*i64", "losses_ptr": "*fp32", **saved,
                       "V": "i32", "stride": "i32", "ignore_index": "i32"},
            constexprs={**(dict.fromkeys(("maxima_ptr", "log_sums_ptr")) if gradient else {}),
                        "GRADIENT": gradient, "BLOCK_V": tile.BLOCK_N},
            num_warps=tile.num_warps, divisible=("V", "stride"),
            tile_row=f"{tile.BLOCK_N} columns w{tile.num_warps}" + ", 4 launches" * (gradient and model),
            bytes=N * V * widths[kind] * (1 + gradient) + N * (8 + 4 * (1 if gradient else 3)) if model else None,
            flops=N * V * (5 + 3 * gradient) if model else None, in_model=model and kind == "bf16" and gradient,
            variant_of=variant_of and f"cross_entropy.{variant_of}", **scalars)

    def dlogits_case(kind, columns, add, variant_of=""):
        tile = fastest.shipped_tile("cross_entropy tile", arch, size=columns)
        model = columns == V
        added = {"grad_logits_ptr": f"*{kind}", "scale_ptr": "*fp32", "stride_grad": "i32"} if add else {}
        return Case(
            name=f"cross_entropy.dlogits {'added ' if add else ''}V={columns} {kind}", kernel=cross_entropy._dlogits_kernel,
            signature={"logits_ptr": f"*{kind}", "targets_ptr": "*i64", "maxima_ptr": "*fp32", "log_sums_ptr": "*fp32",
                       "dlogits_ptr": f"*{kind}", "V": "i32", "stride": "i32", "stride_grad": "i32", "stride_out": "i32",
                       "ignore_index": "i32", **added},
            constexprs={**({} if add else {"grad_logits_ptr": None, "scale_ptr": None}), "ADD": add, "BLOCK_V": tile.BLOCK_N},
            num_warps=tile.num_warps, divisible=("V", "stride", "stride_grad", "stride_out"),
            tile_row=f"{tile.BLOCK_N} columns w{tile.num_warps}" + ", 4 launches" * model,
            bytes=N * V * widths[kind] * (2 + add) + N * 16 if model else None,
            flops=N * V * (4 + 2 * add) if model else None,
            variant_of=variant_of and f"cross_entropy.{variant_of}", **scalars)

    for columns in (256, 1024, 8192, V):
        yield loss_case("bf16", columns, True)
    loss, dlogits = f"loss with dlogits V={V} bf16", f"dlogits added V={V} bf16"
    yield loss_case("bf16", V, False, loss)
    yield dlogits_case("bf16", V, False, dlogits)
    yield dlogits_case("bf16", V, True)
    yield loss_case("fp16", V, True, loss)
    yield dlogits_case("fp16", V, True, dlogits)
    yield loss_case("fp32", V, True)
    yield dlogits_case("fp32", V, True)
