"""One token through a GPT in five kernels a layer, for generation at batch 1: matrix-vector products that read each weight once.

    1  norm_qkv      x -> LayerNorm -> w_attn h + b: the query, and key and value into the cache; the first layer computes x, the
                     embedding, and stores it
    2  attend        the query over the cache, in chunks of keys (attention_decode.py)
    3  combine_add   the chunks combined -> w_proj y + b, added to x
    4  norm_act      x -> LayerNorm -> GELU(w_fc h + b)
    5  linear_add    w_proj h + b, added to x
       head          after the last layer: LayerNorm -> logits

A token uses each weight once, so memory traffic decides the time, and a kernel has little of it: GPT-2 124M in bf16 has matrices
of 1.2 to 4.7 MB, 0.3 to 1.1 us at 4.3 TB/s. Starting a kernel and waiting for its first byte takes longer. So there are

- few kernels. Every program of a matrix-vector product computes the norm before it: that reads C floats from the L2 cache and saves
  a launch. For the same reason each program of `combine_add` combines the chunks of attention: 49 KB from L2 at T=1024, which at
  about 100 bytes per nanosecond and multiprocessor takes half a microsecond to a microsecond.
- all loads in flight at once. A program holds its whole tile of weights, OUT outputs x K inputs, in registers: one load without a
  loop, 16 bytes per thread and instruction. 4.3 TB/s at a latency of 0.8 us need 26 KB in flight on each of 132 multiprocessors;
  a matrix has 9 to 36 KB for each, so loading a part later would waste bandwidth. K is not split: rows are so short that a
  program takes several, and no sum crosses programs (no atomics, the same bits in every run).
- loads of weights before the kernel ahead has ended (dependent_launch.py, compute capability 9.0): every kernel lets its successor
  start at once; the successor loads its weights, and only then waits for the results of the kernel ahead. Before that wait it may
  load only parameters, which no kernel of a step writes.

The grid has a column for each row of the batch: programs of one tile run side by side, all but the first find the weights in L2,
and a row's result does not depend on the rows beside it, bit for bit. The weights are read from L2 once per row: a step of GPT-2
124M takes 241 us for one row and 480 for four on an H100. From 3 rows on, decode_rows.py is faster in half precision.

Weights are fp32, fp16 or bf16; every product and sum, the residual stream and everything passed between kernels fp32; the cache has
the weights' dtype. Rows: B; width C = H * D; hidden size F; vocabulary V; T positions in the cache.

Sources: Dao et al. 2023, "Flash-Decoding for long-context inference" (the split and its combination); CUDA programming guide,
"Programmatic Dependent Launch and Synchronization".
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import fastest
from .attention_common import LARGEST_HEAD, LOG2_E
from .attention_decode import CHUNK_ELEMENTS, WARPS as ATTEND_WARPS, decode_kernel
from .dependent_launch import launch_dependents, options as launch_options, wait_for_predecessor
from .host import DTYPES, multiprocessors, padded
from .layer_norm import row_mean
from .mlp import ACTIVATIONS, activated

LARGEST_K = 8192                # inputs of a matrix: C, F or H heads of padded size; the largest row of the table


# ------------------------------------------------------------------------------------------------------------- device functions


@triton.jit
def weight_tile(w_ptr, first, N, K: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows first .. first+OUT of the matrix (N, K), zeros outside: [OUT, BLOCK_K]."""
    out, k = tl.arange(0, OUT)[:, None], tl.arange(0, BLOCK_K)[None, :]
    return tl.load(w_ptr + first.to(tl.int64) * K + out * K + k, mask=(first + out < N) & (k < K), other=0.0)


@triton.jit
def vector(ptr, first, N, SIZE: tl.constexpr):
    """Elements first .. first+SIZE of a vector of N in fp32; zeros outside of it, and where ptr is None."""
    at = first + tl.arange(0, SIZE)
    if ptr is None:
        return tl.zeros((SIZE,), tl.float32)
    else:
        return tl.load(ptr + at, mask=at < N, other=0.0).to(tl.float32)


@triton.jit
def normed(x, ln_weight, ln_bias, eps, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """`reference.layer_norm` of the row x [BLOCK_K], C elements and zeros; from centred values, as in layer_norm.py."""
    inside = tl.arange(0, BLOCK_K) < C
    mean = row_mean(x, C, 0)
    centred = tl.where(inside, x - mean, 0.0)
    centred = tl.where(inside, centred - row_mean(centred, C, 0), 0.0)
    rstd = 1.0 / tl.sqrt_rn(row_mean(centred * centred, C, 0) + eps)
    return centred * rstd * ln_weight + ln_bias


@triton.jit
def matvec(w, h):
    """w [OUT, BLOCK_K] times h [BLOCK_K]: [OUT] fp32."""
    return tl.sum(w.to(tl.float32) * h[None, :], 1)


# ---------------------------------------------------------------------------------------------------------------------- kernels
# Grids are (B, tiles of outputs). Before `wait_for_predecessor` a kernel reads only parameters.


@triton.jit(do_not_specialize=["T"])
def norm_qkv_kernel(
        token_ptr, wte_ptr, wpe_ptr, position_ptr,      # (B,) int64, (V, C), (T, C), None after the first layer; (B,) int64
        x_ptr, ln_weight_ptr, ln_bias_ptr,              # (B, C) fp32: read, or written in the first layer; (C,), (C,) or None
        w_ptr, b_ptr,                                   # (3C, C), (3C,) or None
        q_ptr, k_ptr, v_ptr, length_ptr,                # (B, C) fp32, (B, H, T, D) twice, (B,) int32: position + 1
        T, eps, C: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """q, k and v = F.linear(`reference.layer_norm`(x), w, b) of one position; k and v go into the cache.

    With token_ptr, x is the sum of the embeddings of token and position, and is stored.
    """
    row, first = tl.program_id(0), tl.program_id(1) * OUT
    launch_dependents(DEPENDENT)
    w = weight_tile(w_ptr, first, 3 * C, C, OUT, BLOCK_K)
    b = vector(b_ptr, first, 3 * C, OUT)
    ln_weight, ln_bias = vector(ln_weight_ptr, 0, C, BLOCK_K), vector(ln_bias_ptr, 0, C, BLOCK_K)
    wait_for_predecessor(DEPENDENT)

    position = tl.minimum(tl.load(position_ptr + row), T - 1)           # a row past the window is processed elsewhere
    if token_ptr is None:
        x = vector(x_ptr + row * C, 0, C, BLOCK_K)
    else:
        x = vector(wte_ptr + tl.load(token_ptr + row) * C, 0, C, BLOCK_K)
        x += vector(wpe_ptr + position * C, 0, C, BLOCK_K)
        if tl.program_id(1) == 0:
            tl.store(x_ptr + row * C + tl.arange(0, BLOCK_K), x, mask=tl.arange(0, BLOCK_K) < C)
            tl.store(length_ptr + row, position.to(tl.int32) + 1)
    out = matvec(w, normed(x, ln_weight, ln_bias, eps, C, BLOCK_K)) + b                 # [OUT]

    n = first + tl.arange(0, OUT)
    tl.store(q_ptr + row * C + n, out, mask=n < C)
    c = n % C
    slot = ((row * (C // D) + c // D).to(tl.int64) * T + position) * D + c % D          # (row, c // D, position, c % D)
    tl.store(k_ptr + slot, out.to(k_ptr.dtype.element_ty), mask=(n >= C) & (n < 2 * C))
    tl.store(v_ptr + slot, out.to(v_ptr.dtype.element_ty), mask=(n >= 2 * C) & (n < 3 * C))


@triton.jit(do_not_specialize=["n_chunks"])
def combine_add_kernel(
        part_ptr, lse_ptr, length_ptr,                  # (B*H, n_chunks, D) fp32, (B*H, n_chunks) fp32, (B,) int32
        w_ptr, b_ptr, x_ptr,                            # (C, C), (C,) or None, (B, C) fp32
        n_chunks, H: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, COMBINED: tl.constexpr,
        OUT: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """x += F.linear(y, w, b), y (C,) = `reference.causal_attention` over all keys.

    y is the chunks' values weighted by 2^(lse - the head's largest lse).
    """
    C: tl.constexpr = H * D
    row, first = tl.program_id(0), tl.program_id(1) * OUT
    n = first + tl.arange(0, OUT)
    launch_dependents(DEPENDENT)
    k = tl.arange(0, BLOCK_K)
    if D < HEAD:                                                        # y's heads are padded to HEAD, so w's columns are too
        column, inside = k // HEAD * D + k % HEAD, (k % HEAD < D) & (k < H * HEAD)
    else:
        column, inside = k, k < C
    w = tl.load(w_ptr + first * C + tl.arange(0, OUT)[:, None] * C + column[None, :],
                mask=(n < C)[:, None] & inside[None, :], other=0.0)                     # [OUT, BLOCK_K]
    b = vector(b_ptr, first, C, OUT)
    wait_for_predecessor(DEPENDENT)

    used = tl.minimum(tl.cdiv(tl.load(length_ptr + row), CHUNK), n_chunks)
    acc, l_i = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    m_i = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    slots = (row * H + tl.minimum(k // HEAD, H - 1)) * n_chunks                         # of the column's head
    for start in tl.range(0, used, COMBINED):
        # All loads come before any use of the largest lse, which needs the last of them. Otherwise the assembler interleaves loads
        # and arithmetic, and 8 latencies add up. Tiles are 1-D, so that each thread keeps to its columns and exchanges nothing.
        parts, lses, m_ij = (), (), m_i
        for i in tl.static_range(COMBINED):
            there = inside & (start + i + tl.zeros_like(k) < used)
            slot = slots + (start + i)
            parts += (tl.load(part_ptr + slot * D + k % HEAD, mask=there, other=0.0),)  # [BLOCK_K]
            lses += (tl.load(lse_ptr + slot, mask=there, other=float("-inf")),)
        for i in tl.static_range(COMBINED):
            m_ij = tl.maximum(m_ij, tl.where(inside, lses[i], 0.0))
        alpha = tl.exp2(m_i - m_ij)
        acc, l_i, m_i = acc * alpha, l_i * alpha, m_ij
        for i in tl.static_range(COMBINED):
            weight = tl.exp2(lses[i] - m_i)
            acc, l_i = acc + weight * parts[i], l_i + weight
    out = matvec(w, acc / tl.where(inside, l_i, 1.0)) + b                                 # [OUT]
    x_at = x_ptr + row * C + n
    tl.store(x_at, tl.load(x_at, mask=n < C, other=0.0) + out, mask=n < C)


@triton.jit
def norm_act_kernel(
        x_ptr, ln_weight_ptr, ln_bias_ptr,              # (B, C) fp32, (C,), (C,) or None
        w_ptr, b_ptr, h_ptr,                            # (F, C), (F,) or None, (B, F) fp32
        eps, C: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr,
        OUT: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """h = `reference.activation`(F.linear(`reference.layer_norm`(x), w, b)): the first half of the MLP."""
    row, first = tl.program_id(0), tl.program_id(1) * OUT
    n = first + tl.arange(0, OUT)
    launch_dependents(DEPENDENT)
    w, b = weight_tile(w_ptr, first, F, C, OUT, BLOCK_K), vector(b_ptr, first, F, OUT)
    ln_weight, ln_bias = vector(ln_weight_ptr, 0, C, BLOCK_K), vector(ln_bias_ptr, 0, C, BLOCK_K)
    wait_for_predecessor(DEPENDENT)
    x = vector(x_ptr + row * C, 0, C, BLOCK_K)
    out = matvec(w, normed(x, ln_weight, ln_bias, eps, C, BLOCK_K)) + b                 # [OUT]
    tl.store(h_ptr + row * F + n, activated(out, ACTIVATION, True), mask=n < F)


@triton.jit
def linear_add_kernel(
        h_ptr, w_ptr, b_ptr, x_ptr,                     # (B, F) fp32, (C, F), (C,) or None, (B, C) fp32
        C: tl.constexpr, F: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """x += F.linear(h, w, b): the second half of the MLP (`reference.gelu_mlp`), and the residual add."""
    row, first = tl.program_id(0), tl.program_id(1) * OUT
    n = first + tl.arange(0, OUT)
    launch_dependents(DEPENDENT)
    w, b = weight_tile(w_ptr, first, C, F, OUT, BLOCK_K), vector(b_ptr, first, C, OUT)
    wait_for_predecessor(DEPENDENT)
    out = matvec(w, vector(h_ptr + row * F, 0, F, BLOCK_K)) + b                         # [OUT]
    x_at = x_ptr + row * C + n
    tl.store(x_at, tl.load(x_at, mask=n < C, other=0.0) + out, mask=n < C)


@triton.jit(do_not_specialize=["V"])
def head_kernel(
        x_ptr, ln_weight_ptr, ln_bias_ptr,              # (B, C) fp32, (C,), (C,) or None
        w_ptr, b_ptr, logits_ptr,                       # (V, C), (V,) or None, (B, V) fp32
        V, eps, C: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """logits = F.linear(`reference.layer_norm`(x), w, b).

    The vocabulary is 6,288 tiles of 8 outputs: a program normalises once and loops over many tiles, with the next one already loading.
    """
    row, first, stride = tl.program_id(0), tl.program_id(1) * OUT, tl.num_programs(1) * OUT
    launch_dependents(DEPENDENT)
    w = weight_tile(w_ptr, first, V, C, OUT, BLOCK_K)
    ln_weight, ln_bias = vector(ln_weight_ptr, 0, C, BLOCK_K), vector(ln_bias_ptr, 0, C, BLOCK_K)
    wait_for_predecessor(DEPENDENT)
    h = normed(vector(x_ptr + row * C, 0, C, BLOCK_K), ln_weight, ln_bias, eps, C, BLOCK_K)
    logits_ptr += row.to(tl.int64) * V
    for tile in tl.range(first, V, stride):
        following = weight_tile(w_ptr, tile + stride, V, C, OUT, BLOCK_K)
        n = tile + tl.arange(0, OUT)
        tl.store(logits_ptr + n, matvec(w, h) + vector(b_ptr, tile, V, OUT), mask=n < V)
        w = following


# ------------------------------------------------------------------------------------------------------------------------ tiles


# How the rows of "decode norm tile", "decode combine tile" and "decode add tile" in fastest.json were chosen: outputs (BLOCK_N) and warps of
# a program by the power of two that holds a row of the matrix, the same for sm_80 to sm_100 and all dtypes: nothing is reused, so only
# the number of multiprocessors to fill (84 to 148) depends on the architecture. Chosen by this count, and no other table was timed: up to
# 64 elements a thread, so that a tile in half precision takes 32 registers beside its row of activations. At C=768 in bf16
#
#                    programs   weights of one   in flight on each of 132 multiprocessors, which need 26 KB
#   norm_qkv            288         12.3 KB         26.8 KB
#   combine_add         192          6.1 KB          8.9 KB; the whole matrix is 1.2 MB
#   norm_act            384         12.3 KB         35.7 KB
#   linear_add          192         24.6 KB         35.7 KB
#   head                528         12.3 KB         98.3 KB: two tiles, of which one is the next
#
# The two `_add` kernels have fewer outputs per program because there are only C outputs: 192 programs for at most 148
# multiprocessors. `combine` has more threads, each with 4 columns of the chunks that it combines; with two outputs a row of 8,192
# spills 32 bytes.

COMBINED_ELEMENTS = 32          # elements of chunks that a thread of combine_add loads at once: 8 chunks at C=768, half of T=1024
HEAD_PROGRAMS = 4               # programs of `head` per multiprocessor: as many as its registers allow at once


def tile_for(kernels, K, device):
    """(BLOCK_K, Tile) for a matrix with rows of K and these kernels ("norm", "combine", "add")."""
    return padded(K), fastest.tile(f"decode {kernels} tile", device, size=K)


def combined_chunks(BLOCK_K, tile):
    """COMBINED: the number of chunks that fill a thread's COMBINED_ELEMENTS, 1 to 8. (A loop in steps of 0 never ends on a GPU.)"""
    return max(1, min(8, COMBINED_ELEMENTS * 32 * tile.num_warps // BLOCK_K))


# -------------------------------------------------------------------------------------------------------------------- launchers


class Layer(NamedTuple):
    """A block's parameters and its cache. Biases may be None; matrices are (outputs, inputs), as in nn.Linear."""
    ln_1: tuple                 # weight and bias, (C,)
    c_attn: tuple               # (3C, C), (3C,)
    c_proj: tuple               # (C, C), (C,)
    ln_2: tuple
    c_fc: tuple                 # (F, C), (F,)
    mlp_proj: tuple             # (C, F), (C,)
    keys: torch.Tensor          # (B, H, T, D)
    values: torch.Tensor
    activation: str


class Decoder:
    """A decode step over given parameters and caches: `decoder(token, position)` -> logits. It owns the buffers between kernels.

    wte (V, C), wpe (T, C), ln_f: weight and bias (C,), head: weight (V, C) and bias (V,) or None, layers: a list of Layer. All are
    contiguous and on one device. Matrices, their biases and the caches share a dtype: float32, float16 or bfloat16; embeddings and
    norms may have any of these. Raises ValueError, TypeError.
    """

    def __init__(self, wte, wpe, ln_f, head, layers, *, eps=1e-5):
        self.wte, self.wpe, self.ln_f, self.head, self.layers, self.eps = wte, wpe, ln_f, head, layers, eps
        self.B, self.H, self.T, self.D = layers[0].keys.shape
        self.C, self.V, self.F = wte.size(1), head[0].size(0), layers[0].c_fc[0].size(0)
        self._check()
        self.HEAD = padded(self.D)
        self._allocate()

    def _allocate(self):
        self.CHUNK = CHUNK_ELEMENTS // self.HEAD
        self.n_chunks = -(-self.T // self.CHUNK)
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=self.wte.device)
        self.x, self.q, self.h = new(self.B, self.C), new(self.B, self.C), new(self.B, self.F)
        self.part, self.lse = new(self.B * self.H, self.n_chunks, self.D), new(self.B * self.H, self.n_chunks)
        self.length = new(self.B, dtype=torch.int32)

    def _check(self):
        B, H, T, C, D, F, V = self.B, self.H, self.T, self.C, self.D, self.F, self.V
        if C != H * D or not 1 <= D <= LARGEST_HEAD:
            raise ValueError(f"the width is {C}, the caches have {H} heads of size {D}; expected {H} * {D}, and a head size "
                             f"of 1 to {LARGEST_HEAD}")
        if (widest := max(C, F, H * padded(D))) > LARGEST_K:
            raise ValueError(f"a matrix has {widest} inputs, each head padded to a power of two; expected at most {LARGEST_K}")
        dtype, device = self.head[0].dtype, self.wte.device
        matrices = {"head": (self.head, V, C)}
        others = {"wte": (self.wte, (V, C)), "wpe": (self.wpe, (T, C)),
                  "ln_f.weight": (self.ln_f[0], (C,)), "ln_f.bias": (self.ln_f[1], (C,))}
        caches = {}
        for i, layer in enumerate(self.layers):
            if layer.activation not in ACTIVATIONS:
                raise ValueError(f"layer {i} has activation {layer.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
            for name, N, K in (("c_attn", 3 * C, C), ("c_proj", C, C), ("c_fc", F, C), ("mlp_proj", C, F)):
                matrices[f"layers[{i}].{name}"] = (getattr(layer, name), N, K)
            for name in ("ln_1", "ln_2"):
                weight, bias = getattr(layer, name)
                others |= {f"layers[{i}].{name}.weight": (weight, (C,)), f"layers[{i}].{name}.bias": (bias, (C,))}
            caches |= {f"layers[{i}].keys": (layer.keys, (B, H, T, D)), f"layers[{i}].values": (layer.values, (B, H, T, D))}
        given = {f"{name}.weight": (pair[0], (N, K)) for name, (pair, N, K) in matrices.items()}
        given |= {f"{name}.bias": (pair[1], (N,)) for name, (pair, N, _) in matrices.items()}
        for name, (tensor, shape) in (given | caches | others).items():
            if tensor is None and name.endswith(".bias"):
                continue
            if tensor.dtype not in DTYPES or (name not in others and tensor.dtype != dtype):
                raise TypeError(f"{name} is {tensor.dtype}, the head {dtype}; expected float32, float16 or bfloat16, the same "
                                "for all matrices, their biases and the caches")
            if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != device:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}; "
                                 f"expected {shape}, contiguous, on {device}")

    def __call__(self, token, position):
        """The logits (B, V) fp32 of token (B,) int64 at position (B,) int64; writes its keys and values into the caches.

        Five launches a layer and one for the head; the host reads nothing back, so a CUDA graph can capture it. Tokens are not
        checked; a position past the cache counts as its last.
        """
        for name, ids in (("token", token), ("position", position)):
            if ids.shape != (self.B,) or ids.dtype != torch.int64 or ids.device != self.wte.device or not ids.is_contiguous():
                raise ValueError(f"{name} is {tuple(ids.shape)}, {ids.dtype}, on {ids.device}; "
                                 f"expected ({self.B},) int64, contiguous, on {self.wte.device}")
        logits = torch.empty((self.B, self.V), dtype=torch.float32, device=self.wte.device)
        with torch.cuda.device_of(logits):
            self._step(token, position, logits)
        return logits

    def _step(self, token, position, logits):
        embedding = (token, self.wte, self.wpe)
        for layer in self.layers:
            self.norm_qkv(layer, embedding, position)
            self.attend(layer)
            self.combine_add(layer)
            self.norm_act(layer)
            self.linear_add(layer)
            embedding = (None, None, None)
        self.logits(logits)

    def norm_qkv(self, layer, embedding, position):
        BLOCK_K, tile = tile_for("norm", self.C, self.x.get_device())
        # The first kernel of a step must not start early: the work ahead of it may still be writing the weights.
        norm_qkv_kernel[(self.B, -(-3 * self.C // tile.BLOCK_N))](
            *embedding, position, self.x, *layer.ln_1, *layer.c_attn, self.q, layer.keys, layer.values, self.length, self.T,
            self.eps, C=self.C, D=self.D, OUT=tile.BLOCK_N, BLOCK_K=BLOCK_K, num_warps=tile.num_warps,
            **launch_options(self.x, early=embedding[0] is None))

    def attend(self, layer):
        # self.q (B, C) as (B, H, 1, D): strides C and D
        decode_kernel[(self.B * self.H, self.n_chunks)](
            self.q, layer.keys, layer.values, self.length, self.part, self.lse, self.C, self.D, *layer.keys.stride()[:3],
            LOG2_E * self.D**-0.5, self.H, self.n_chunks, D=self.D, HEAD=self.HEAD, CHUNK=self.CHUNK, num_warps=ATTEND_WARPS,
            **launch_options(self.x))

    def combine_add(self, layer):
        BLOCK_K, tile = tile_for("combine", self.H * self.HEAD, self.x.get_device())
        combine_add_kernel[(self.B, -(-self.C // tile.BLOCK_N))](
            self.part, self.lse, self.length, *layer.c_proj, self.x, self.n_chunks, H=self.H, D=self.D, HEAD=self.HEAD,
            CHUNK=self.CHUNK, COMBINED=combined_chunks(BLOCK_K, tile), OUT=tile.BLOCK_N, BLOCK_K=BLOCK_K, num_warps=tile.num_warps,
            **launch_options(self.x))

    def norm_act(self, layer):
        BLOCK_K, tile = tile_for("norm", self.C, self.x.get_device())
        norm_act_kernel[(self.B, -(-self.F // tile.BLOCK_N))](
            self.x, *layer.ln_2, *layer.c_fc, self.h, self.eps, C=self.C, F=self.F, ACTIVATION=layer.activation, OUT=tile.BLOCK_N,
            BLOCK_K=BLOCK_K, num_warps=tile.num_warps, **launch_options(self.x))

    def linear_add(self, layer):
        BLOCK_K, tile = tile_for("add", self.F, self.x.get_device())
        linear_add_kernel[(self.B, -(-self.C // tile.BLOCK_N))](
            self.h, *layer.mlp_proj, self.x, C=self.C, F=self.F, OUT=tile.BLOCK_N, BLOCK_K=BLOCK_K, num_warps=tile.num_warps,
            **launch_options(self.x))

    def logits(self, out):
        BLOCK_K, tile = tile_for("norm", self.C, self.x.get_device())
        programs = min(-(-self.V // tile.BLOCK_N), HEAD_PROGRAMS * multiprocessors(self.x.get_device()))
        head_kernel[(self.B, programs)](
            self.x, *self.ln_f, *self.head, out, self.V, self.eps, C=self.C, OUT=tile.BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=tile.num_warps, **launch_options(self.x))
