"""The gate's cases of LayerNorm: residual add, dropout and norm, forward and backward."""
from .. import fastest, layer_norm
from .case import Case


def gate_cases(arch):
    """One Case for each kernel in each row of the table (the same for every `arch`); the row of 1,024 in each variant of GPT-2."""
    N, C = 64 * 1024, 768
    S, H = "*fp32", "*bf16"  # the stream and the parameters; what autocast computes in
    scalars = {"n_rows": "i32", "n_partials": "i32", "C": "i32", "p": "fp32", "eps": "fp32"}

    def case(name, kernel, pointers, tile, BLOCK_C, moved=None, **more):
        given = {arg: scalars[arg] for arg in kernel.arg_names if arg in scalars}
        given |= {arg: dtype for arg, dtype in pointers.items() if dtype is not None}
        absent = {arg: None for arg, dtype in pointers.items() if dtype is None}
        return Case(
            name=f"layer_norm.{name}", kernel=kernel, signature=given,
            constexprs={**absent, "ROWS": tile.BLOCK_M, "BLOCK_C": BLOCK_C},
            divisible=("C", ), num_warps=tile.num_warps, bytes=moved,
            tile_row=f"{BLOCK_C}: {tile.BLOCK_M} rows, {tile.num_warps} warps", **more)

    forwards, backwards = (fastest.shipped(f"layer_norm {pass_} tile", arch) for pass_ in ("forward", "backward"))
    for (BLOCK_C, fwd), (_, bwd) in zip(*([(row.size[1], row.tile) for row in rows] for rows in (forwards, backwards)), strict=True):
        gpt2 = BLOCK_C == 1024
        for variant, branch, seed in (("norm", None, None), ("add", H, None), ("add dropout", H, "*i64")):
            if not gpt2 and variant != "add dropout":  # the variant with most registers represents the others
                continue
            stream = S if branch else None
            pointers = dict(x_ptr=S, branch_ptr=branch, weight_ptr=S, bias_ptr=S, seed_ptr=seed, s_ptr=stream, y_ptr=H,
                            statistics_ptr=S)
            yield case(f"forward {variant} {BLOCK_C}", layer_norm._forward_kernel, pointers, fwd, BLOCK_C,
                       moved=N * (C * (12 if branch else 6) + 8) if gpt2 else None, flops=15 * N * C if gpt2 else None,
                       in_model=gpt2 and seed is None,
                       allowed_narrow_loads=3 if seed else 0,
                       narrow_reason="the seed, and in short rows the bias" if seed else "")
            pointers = dict(dy_ptr=H, ds_ptr=stream, s_ptr=S, weight_ptr=S, statistics_ptr=S, seed_ptr=seed,
                            dx_ptr=S, dbranch_ptr=branch, dweight_ptr=S, dbias_ptr=S)
            spilled = 8 if seed or branch and gpt2 and arch == 90 else 0
            yield case(f"backward {variant} {BLOCK_C}", layer_norm._backward_kernel, pointers, bwd, BLOCK_C,
                       moved=N * (C * (16 if branch else 10) + 8) if gpt2 else None, flops=18 * N * C if gpt2 else None,
                       in_model=gpt2 and seed is None, options=layer_norm.backward_options(bwd), allowed_spill_bytes=spilled,
                       spill_reason="8 bytes in some tiles, by Triton 3.6's ptxas alone" if spilled else "",
                       allowed_narrow_loads=2 * bwd.BLOCK_M + (1 if seed else 0), narrow_reason="a row's mean and rstd, the seed")
        yield case(f"drop {BLOCK_C}", layer_norm._drop_kernel, dict(ds_ptr=S, seed_ptr="*i64", dbranch_ptr=H), fwd, BLOCK_C,
                   allowed_narrow_loads=1, narrow_reason="the seed")
    pointers = dict(dweight_partial_ptr=S, dbias_partial_ptr=S, dweight_ptr=S, dbias_ptr=S)
    yield case("sum partials", layer_norm._sum_partials_kernel, pointers, fastest.Tile(layer_norm.SUM_ROWS, num_warps=4), layer_norm.SUM_COLUMNS,
               moved=132 * 8 * C * 8, flops=132 * 8 * C * 2, in_model=True)
