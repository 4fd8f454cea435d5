"""The gate's cases for kernels/embedding.py: GPT-2's forward and backward at 64 x 1024 tokens."""
import triton

from .. import embedding
from .case import Case

N, V, C = 64 * 1024, 50304, 768


def gate_cases(arch):
    """See case.py."""
    block = triton.next_power_of_2(C)
    yield Case(name="embedding.embed", kernel=embedding._embed_kernel, num_warps=4, in_model=True, divisible=("T", "V", "C"),
               signature=dict(x_ptr="*fp32", index_ptr="*i64", wte_ptr="*fp32", wpe_ptr="*fp32", T="i32", V="i32", C="i32", start="i32"),
               constexprs=dict(BLOCK=block), bytes=2 * 4 * N * C + 8 * N, flops=N * C,
               allowed_narrow_loads=1, narrow_reason="the token")
    sizes = dict(N="i32", V="i32", C="i32")
    yield Case(name="embedding.add_runs", kernel=embedding._add_runs_kernel, num_warps=embedding.BLOCK // 128, in_model=True, divisible=("V", "C"),
               signature=dict(gradient_ptr="*fp32", tokens_ptr="*i32", places_ptr="*i64", dx_ptr="*fp32", partials_ptr="*fp32", **sizes),
               constexprs=dict(PIECE=embedding.PIECE, BLOCK=embedding.BLOCK), bytes=4 * N * C + 2 * 4 * V * C + 12 * N, flops=N * C,
               allowed_narrow_loads=5, narrow_reason="tokens and their places")
    yield Case(name="embedding.add_long_runs", kernel=embedding._add_long_runs_kernel, num_warps=embedding.BLOCK // 128, in_model=True, divisible=("V", "C"),
               signature=dict(gradient_ptr="*fp32", tokens_ptr="*i32", partials_ptr="*fp32", **sizes),
               constexprs=dict(PIECE=embedding.PIECE, CHUNK=embedding.CHUNK, BLOCK=embedding.BLOCK),
               bytes=4 * N // embedding.PIECE * C, flops=N // embedding.PIECE * C, allowed_narrow_loads=5, narrow_reason="tokens")
