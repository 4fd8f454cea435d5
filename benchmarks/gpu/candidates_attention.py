"""Tried, not shipped: causal attention forward with specialised warps, in Gluon, for sm_90, head size 64, bf16.

One warp copies tiles by the tensor memory accelerator, two groups of four warps each own BM queries; each has the next tile's
scores computed while the exponentials of this one are, which plain Triton does not order. Keys are walked from the diagonal down, so
the masked tile comes first. Names are those of Triton 3.6; later versions renamed some.

Source: Shah et al. 2024, FlashAttention-3, sections 3.1 and 3.2.
"""
import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = math.log2(math.e)


@gluon.jit
def _softmax(s, top, total, scale2):
    new_top = gl.maximum(top, gl.max(s, 1) * scale2)
    p = gl.exp2(s * scale2 - gl.expand_dims(new_top, 1))
    shrink = gl.exp2(top - new_top)
    return p, shrink, new_top, total * shrink + gl.sum(p, 1)


@gluon.jit
def _consume(which, q_sm, k_sm, v_sm, q_bar, k_ready, k_empty, v_ready, v_empty, out_ptr, lse_ptr, m0, n_iter, scale2, T, head,
             H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: BM queries against all tiles of keys."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_sm.index(which)
    m = m0 + which * BM
    acc = gl.zeros([BM, D], gl.float32, o_layout)
    top = gl.full([BM], float("-inf"), gl.float32, row_s)
    total = gl.zeros([BM], gl.float32, row_s)
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    mbarrier.wait(q_bar, 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(warpgroup_mma(q, k_sm.index(0).permute((1, 0)), zero, use_acc=False, is_async=True),))
    mbarrier.arrive(k_empty.index(0), count=1)
    query = m + gl.arange(0, BM, layout=row_s)
    key = (n_iter - 1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    s = gl.where(gl.expand_dims(query, 1) >= gl.expand_dims(key, 0), s, float("-inf"))
    p, shrink, top, total = _softmax(s, top, total, scale2)
    for i in range(1, n_iter):
        slot, before = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), (i // STAGES) & 1)
        scores = warpgroup_mma(q, k_sm.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        weights = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
        values = warpgroup_mma(weights, v_sm.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, shrink, top, total = _softmax(s, top, total, scale2)
        acc = warpgroup_mma_wait(0, deps=(values,))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, row_o), 1)
    last = (n_iter - 1) % STAGES
    weights = gl.convert_layout(p.to(gl.bfloat16), p_layout)
    mbarrier.wait(v_ready.index(last), ((n_iter - 1) // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(weights, v_sm.index(last), acc, is_async=True),))
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, row_o), 1)
    rows = m + gl.arange(0, BM, layout=row_o)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    gl.store(out_ptr + gl.expand_dims(rows, 1) * (H * D) + gl.expand_dims(column, 0), acc.to(gl.bfloat16))
    gl.store(lse_ptr + query, top + gl.log2(total))


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_sm, k_sm, v_sm, q_bar, k_ready, k_empty, v_ready, v_empty, row, column, m0, n_iter,
             BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """One warp: everything that is copied."""
    mbarrier.expect(q_bar, 2 * BM * D * 2)
    tma.async_copy_global_to_shared(q_desc, [row + m0, column], q_bar, q_sm.index(0))
    tma.async_copy_global_to_shared(q_desc, [row + m0 + BM, column], q_bar, q_sm.index(1))
    for i in range(n_iter):
        slot, phase = i % STAGES, (i // STAGES) & 1
        n = (n_iter - 1 - i) * BN
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), BN * D * 2)
        tma.async_copy_global_to_shared(k_desc, [row + n, C + column], k_ready.index(slot), k_sm.index(slot))
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), BN * D * 2)
        tma.async_copy_global_to_shared(v_desc, [row + n, 2 * C + column], v_ready.index(slot), v_sm.index(slot))


@gluon.jit
def forward_kernel(q_desc, k_desc, v_desc, out_ptr, lse_ptr, scale2, T, H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                   D: gl.constexpr, STAGES: gl.constexpr):
    C: gl.constexpr = H * D
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_sm = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], shared)
    k_sm = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], shared)
    v_sm = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], shared)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    pid = gl.program_id(0)
    n_tiles = T // (2 * BM)
    heads = gl.num_programs(0) // n_tiles
    head = pid % heads                                  # the longest tiles of all heads first
    m0 = (n_tiles - 1 - pid // heads) * (2 * BM)
    n_iter = (m0 + 2 * BM) // BN
    row, column = head // H * T, head % H * D
    out = out_ptr + (head // H).to(gl.int64) * T * C + column
    lse = lse_ptr + head.to(gl.int64) * T
    gl.warp_specialize([
        (_consume, (0, q_sm, k_sm, v_sm, q_bar, k_ready, k_empty, v_ready, v_empty, out, lse, m0, n_iter, scale2, T, head, H, BM, BN, D,
                    STAGES)),
        (_consume, (1, q_sm, k_sm, v_sm, q_bar, k_ready, k_empty, v_ready, v_empty, out, lse, m0, n_iter, scale2, T, head, H, BM, BN, D,
                    STAGES)),
        (_produce, (q_desc, k_desc, v_desc, q_sm, k_sm, v_sm, q_bar, k_ready, k_empty, v_ready, v_empty, row, column, m0, n_iter, BM, BN,
                    D, C, STAGES)),
    ], [4, 1], [240, 24])


def forward(qkv, H, BM=64, BN=128, STAGES=2):
    """(out (B, T, C), lse (B, H, T)) of the packed projection (B, T, 3C), T a multiple of 2 BM."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // H
    rows = qkv.view(B * T, C3)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = TensorDescriptor.from_tensor(rows, [BM, D], layout)
    k = TensorDescriptor.from_tensor(rows, [BN, D], layout)
    out = torch.empty(B, T, C, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=qkv.device)
    forward_kernel[(B * H * (T // (2 * BM)),)](q, k, k, out, lse, LOG2_E / math.sqrt(D), T, H=H, BM=BM, BN=BN, D=D, STAGES=STAGES,
                                             num_warps=4)
    return out, lse
