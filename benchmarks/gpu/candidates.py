"""Kernels that were tried and not shipped: the sweep times them beside ours. A winner moves to kernels/, with tests.

`linear_act` and `linear_dact` as in kernels/mlp.py, but the operands come by the tensor memory accelerator (sm_90 and later): one
thread asks for a whole tile, where pointers, masks and 64-bit offsets take registers and issue slots of every thread.
"""
import torch
import triton
import triton.language as tl
from nanogpt_fast.kernels.mlp import _quarters, _store_act, _store_dact
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _product(a, b, m, n, K, B_IS_NK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = a.load([m, k])
        if B_IS_NK:
            acc = tl.dot(left, b.load([n, k]).T, acc)
        else:
            acc = tl.dot(left, b.load([k, n]), acc)
    return acc


@triton.jit
def _origin(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile: GROUP rows of tiles are walked column by column."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return (first + within % rows) * BLOCK_M, within // rows * BLOCK_N


@triton.jit
def linear_act_kernel(x, w, h_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      GROUP: tl.constexpr):
    m, n = _origin(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = _product(x, w, m, n, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
    quarters = _quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _store_act(quarters[i], None, h_ptr, y_ptr, None, 0.0, m, n + i * (BLOCK_N // 4), M, N, "gelu", False, False,
                   BLOCK_M, BLOCK_N // 4)


@triton.jit
def linear_dact_kernel(dy, w, h_ptr, dh_ptr, post_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    m, n = _origin(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = _product(dy, w, m, n, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
    quarters = _quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _store_dact(quarters[i], h_ptr, None, dh_ptr, post_ptr, None, m, n + i * (BLOCK_N // 4), 0, M, N, "gelu", False,
                    BLOCK_M, BLOCK_N // 4)


def linear_act(x, w, tile, group):
    (M, K), N = x.shape, w.shape[0]
    bm, bn, bk, warps, stages = tile
    h, y = (torch.empty(M, N, dtype=x.dtype, device=x.device) for _ in range(2))
    linear_act_kernel[(-(-M // bm) * -(-N // bn),)](
        TensorDescriptor.from_tensor(x, [bm, bk]), TensorDescriptor.from_tensor(w, [bn, bk]), h, y, M, N, K,
        BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, GROUP=group, num_warps=warps, num_stages=stages)
    return y, h


def linear_dact(dy, w, h, tile, group, want_post=False):
    (M, K), N = dy.shape, w.shape[1]
    bm, bn, bk, warps, stages = tile
    dh, post = torch.empty_like(h), torch.empty_like(h) if want_post else None
    linear_dact_kernel[(-(-M // bm) * -(-N // bn),)](
        TensorDescriptor.from_tensor(dy, [bm, bk]), TensorDescriptor.from_tensor(w, [bk, bn]), h, dh, post, M, N, K,
        BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, GROUP=group, num_warps=warps, num_stages=stages)
    return dh, post


TILES = ((128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4),
         (256, 128, 64, 8, 3))
