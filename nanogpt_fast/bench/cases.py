"""The one list of what is timed: an op on a shape, its implementations, the bytes it must move and the FLOPs it must do.

`nanogpt-fast bench op` takes it, and the pytest-benchmark files of benchmarks/ for browsing.

A case's `make(device)` draws random inputs; several sets take turns, so that no call finds its inputs in a cache.
`implementations` are functions of one set. Directions: "forward" is inference (no_grad); "both" is forward and backward in one
call, as training does it, because an op may do part of its backward in its forward (linear cross-entropy does).

`bytes` are what any implementation must move: each input read once, each result written once, nothing in between. An op that
keeps less between forward and backward than this counts can pass 100 percent; one that reads twice cannot reach it. `flops`
are those of the matmuls; causal attention counts half of the square.
"""
import functools
import itertools
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import backend as ops_backend, reference
from ..ops import attention, cross_entropy, mlp, norm, sampler

FORWARD, BOTH = "forward", "both"
AUTO, FUSED = ops_backend.parse("auto"), ops_backend.parse("fused")


@dataclass
class Case:
    op: str
    shape: dict
    dtype: torch.dtype
    direction: str
    bytes: int
    flops: int
    make: Callable              # device -> {name: tensor}; those that require grad get one in direction "both"
    implementations: dict       # {name: function of such a dict, or a function without arguments that returns one (`lazily`)}
    differentiate: int = 0      # which result of several sends a gradient back
    sweep: str = ""             # the axis of `shape` that this case is a point on, for the plots

    @property
    def name(self):
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.op} {self.direction} {str(self.dtype).removeprefix('torch.')} {shape}"

    @property
    def bound(self):
        """Which limit of the machine counts: "copy" below 100 FLOPs a byte, else "matmul". On paper an H200 has 206."""
        return "copy" if self.flops < 100 * self.bytes else "matmul"

    def runs(self, device, names=None, sets=3):
        """({name: function without arguments that runs it once}, {name: why it cannot run here}).

        names: of implementations, all by default; sets: of inputs, which take turns. Each implementation is called once here, so that
        compiling is done and failures are known before anything is timed.
        """
        inputs = [self.make(device) for _ in range(sets)]
        cotangents = {}  # by shape and dtype of the result: random and contiguous, as the op above would send it
        runs, absent = {}, {}
        torch.compiler.reset()  # a case's graphs count against one limit with those of all cases before
        for name, function in self.implementations.items():
            if names and name not in names:
                continue
            try:
                function = function() if getattr(function, "lazy", False) else function
                run = functools.partial(self._once, function, itertools.cycle(inputs), cotangents)
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                runs[name] = run
            except Exception as error:  # a peer that this machine or version cannot run is a row of its own
                absent[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
        return runs, absent

    def _once(self, function, inputs, cotangents):
        given = next(inputs)
        if self.direction == FORWARD:
            with torch.no_grad():
                return function(given)
        results = function(given)
        result = results[self.differentiate] if isinstance(results, tuple) else results
        leaves = [t for t in given.values() if t.requires_grad]
        if result.dim() == 0:
            return torch.autograd.grad(result, leaves)
        key = result.shape, result.dtype
        if key not in cotangents:
            cotangents[key] = torch.randn(result.shape, device=result.device, dtype=result.dtype)
        return torch.autograd.grad(result, leaves, cotangents[key])


def lazily(function):
    """Marks a function that imports or compiles and returns the implementation: done only if the case is timed."""
    function.lazy = True
    return function


def compiled(function, mode=None):
    """torch.compile of a plain function, compiled for this case alone."""
    return lazily(lambda: torch.compile(function, mode=mode, fullgraph=True, dynamic=False))


def own(op, call):
    """{name: function of the inputs} for the kernels that somebody registered. call(inputs, backend=choices)."""
    return {name: functools.partial(call, backend=ops_backend.parse({op: name})) for name in ops_backend.own[op]}


# max-autotune without CUDA graphs: with them, a call copies its inputs into the graph's own, and that would be timed as well.
AUTOTUNE = "max-autotune-no-cudagraphs"


# ---------------------------------------------------------------------------------------------------------------- the ops


def randn(device, dtype, *shape, grad=False, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def attention_case(B, T, H, D, dtype, direction, sweep=""):
    """Packed projection in, (B, T, C) out, as the model calls it: what a peer needs beside its kernel counts, as for us."""
    C, size, grad = H * D, dtype.itemsize, direction == BOTH
    # forward: qkv in, out written; backward: dout, out and qkv in, dqkv written
    moved = B * T * C * size * (4 + (8 if grad else 0))
    flops = int(4 * B * H * T * T * D / 2 * (3.5 if grad else 1))

    def plain(t):
        return reference.causal_attention_qkvpacked(t["qkv"], H)

    def by(backend):
        def run(t):
            with sdpa_kernel(backend):
                return plain(t)
        return run

    @lazily
    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        compiled_flex = torch.compile(flex_attention, dynamic=False)
        masks = {}

        def run(t):
            qkv = t["qkv"]
            if "mask" not in masks:
                masks["mask"] = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=qkv.device)
            q, k, v = reference.split_heads(qkv, H)
            return compiled_flex(q, k, v, block_mask=masks["mask"]).transpose(1, 2).reshape(B, T, C)
        return run

    @lazily
    def flash_attn():
        from flash_attn import flash_attn_qkvpacked_func
        return lambda t: flash_attn_qkvpacked_func(t["qkv"].view(B, T, 3, H, D), causal=True).view(B, T, C)

    implementations = {
        "ours": lambda t: attention.causal_attention_qkvpacked(t["qkv"], H, backend=AUTO),
        "our kernel": lambda t: attention.causal_attention_qkvpacked(t["qkv"], H, backend=FUSED),
        "eager": plain, "compile": compiled(plain), "compile max-autotune": compiled(plain, AUTOTUNE),
        "SDPA flash": by(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": by(SDPBackend.EFFICIENT_ATTENTION), "FlexAttention": flex, "flash-attn": flash_attn,
        **own("attention", lambda t, backend: attention.causal_attention_qkvpacked(t["qkv"], H, backend=backend))}
    return Case("attention", dict(B=B, T=T, H=H, D=D), dtype, direction, moved, flops,
                lambda device: {"qkv": randn(device, dtype, B, T, 3 * C, grad=grad)}, implementations, sweep=sweep)


def separate_attention_case(B, T, H, D, dtype, direction):
    """q, k and v from three projections, each (B, T, C) seen as (B, H, T, D)."""
    C, grad = H * D, direction == BOTH

    def heads(t):
        return [t[name].view(B, T, H, D).transpose(1, 2) for name in ("q", "k", "v")]

    def by(backend):
        def run(t):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads(t), is_causal=True)
        return run

    return Case("attention of separate q, k, v", dict(B=B, T=T, H=H, D=D), dtype, direction, B * T * C * dtype.itemsize * (12 if grad else 4),
                int(4 * B * H * T * T * D / 2 * (3.5 if grad else 1)),
                lambda device: {name: randn(device, dtype, B, T, C, grad=grad) for name in ("q", "k", "v")},
                {"ours": lambda t: attention.causal_attention(*heads(t), backend=AUTO),
                 "our kernel": lambda t: attention.causal_attention(*heads(t), backend=FUSED),
                 "eager": lambda t: reference.causal_attention(*heads(t)),
                 "SDPA flash": by(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION)})


def decode_case(B, T, H, D, dtype, sweep=""):
    """One new query a row over a cache of T tokens, all of them filled."""
    def make(device):
        return {"q": randn(device, dtype, B, H, 1, D), "k": randn(device, dtype, B, H, T, D),
                "v": randn(device, dtype, B, H, T, D), "lengths": torch.full((B,), T, device=device)}

    def plain(t):
        seen = torch.arange(T, device=t["k"].device) < t["lengths"][:, None]
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=seen[:, None, None])

    moved = (2 * B * H * T * D + 2 * B * H * D) * dtype.itemsize
    return Case("decode attention", dict(B=B, T=T, H=H, D=D), dtype, FORWARD, moved, 4 * B * H * T * D, make,
                {"ours": lambda t: attention.decode_attention(**t, backend=AUTO),
                 "eager": plain, "compile": compiled(plain)}, sweep=sweep)


def layer_norm_case(rows, C, dtype, direction, sweep=""):
    """Residual add and LayerNorm: the stream is fp32, the branch and what the next matmul eats are `dtype`."""
    grad, size = direction == BOTH, dtype.itemsize

    def make(device):
        return {"x": randn(device, torch.float32, rows, C, grad=grad), "branch": randn(device, dtype, rows, C, grad=grad),
                "weight": randn(device, torch.float32, C, grad=grad), "bias": randn(device, torch.float32, C, grad=grad)}

    def plain(t):
        x, y = reference.add_layer_norm(t["x"], t["branch"], t["weight"], t["bias"])
        return x, y.to(dtype)

    @lazily
    def liger():
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def run(t):
            x = t["x"] + t["branch"]
            return x, LigerLayerNormFunction.apply(x, t["weight"], t["bias"], 1e-5).to(dtype)
        return run

    @lazily
    def quack():
        from quack.layernorm import layernorm  # has no bias and no backward
        if grad:
            raise RuntimeError("quack's LayerNorm has no backward")

        def run(t):
            x = t["x"] + t["branch"]
            return x, layernorm(x, t["weight"], 1e-5).to(dtype)
        return run

    # forward: x, branch in; stream, y out. backward: dy (of the stream nothing arrives here), the stream; dx, dbranch out
    moved = rows * C * (4 + size + 4 + size + (size + 4 + 4 + size if grad else 0))
    return Case("add + LayerNorm", dict(rows=rows, C=C), dtype, direction, moved, 0, make,
                {"ours": lambda t: norm.add_layer_norm(**t, out_dtype=dtype, backend=AUTO), "eager": plain,
                 "compile": compiled(plain), "compile max-autotune": compiled(plain, AUTOTUNE), "Liger": liger, "quack": quack,
                 **own("layer_norm", lambda t, backend: norm.add_layer_norm(**t, out_dtype=dtype, backend=backend))},
                differentiate=1, sweep=sweep)


def mlp_case(rows, C, dtype, direction, sweep=""):
    grad, size = direction == BOTH, dtype.itemsize

    def make(device):
        return {"x": randn(device, dtype, rows, C, grad=grad),
                "w_fc": randn(device, dtype, 4 * C, C, grad=grad, scale=C ** -0.5),
                "b_fc": randn(device, dtype, 4 * C, grad=grad),
                "w_proj": randn(device, dtype, C, 4 * C, grad=grad, scale=C ** -0.5 / 2),
                "b_proj": randn(device, dtype, C, grad=grad)}

    def plain(t):
        return reference.gelu_mlp(**t)

    def form(name):
        return lambda t: mlp.gelu_mlp(**t, form=name, backend=FUSED)

    # forward: x, both weights in, y out; backward: dy, x and h in, weights again, their gradients and dx out
    moved = size * ((2 * rows * C + 8 * C * C) + ((7 * rows * C + 16 * C * C) if grad else 0))
    return Case("GELU-MLP", dict(rows=rows, C=C), dtype, direction, moved, 16 * rows * C * C * (3 if grad else 1), make,
                {"ours": lambda t: mlp.gelu_mlp(**t, backend=AUTO), "ours epilogue": form("epilogue"),
                 "ours pointwise": form("pointwise"), "ours hopper": form("hopper"), "eager": plain, "compile": compiled(plain),
                 "compile max-autotune": compiled(plain, AUTOTUNE), **own("mlp", lambda t, backend: mlp.gelu_mlp(**t, backend=backend))},
                sweep=sweep)


def cross_entropy_case(rows, C, V, dtype, direction, sweep=""):
    """The vocabulary head and its loss. Ours without the logits and, as the drop-in, with them."""
    grad, size = direction == BOTH, dtype.itemsize

    def make(device):
        return {"x": randn(device, dtype, rows, C, grad=grad), "weight": randn(device, dtype, V, C, grad=grad, scale=C ** -0.5),
                "targets": torch.randint(0, V, (rows,), device=device)}

    def our(return_logits):
        return lambda t: cross_entropy.linear_cross_entropy(**t, return_logits=return_logits, backend=AUTO)[0]

    def plain(t):  # the loss in fp32, as under autocast
        return F.cross_entropy(F.linear(t["x"], t["weight"]).float(), t["targets"], ignore_index=-1)

    def chunked_by_torch(t):
        return F.linear_cross_entropy(t["x"], t["weight"], t["targets"])

    @lazily
    def liger():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        return lambda t: LigerFusedLinearCrossEntropyFunction.apply(t["x"], t["weight"], t["targets"], None, None, -1)[0]

    @lazily
    def quack():
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
        return lambda t: chunked_linear_cross_entropy(t["x"], t["weight"], t["targets"], ignore_index=-1)

    moved = size * ((rows * C + V * C) * (2 if grad else 1)) + 8 * rows
    implementations = {"ours": our(False), "ours with logits": our(True), "eager": plain, "compile": compiled(plain),
                       "compile max-autotune": compiled(plain, AUTOTUNE), "Liger": liger, "quack": quack,
                       **own("cross_entropy", lambda t, backend: cross_entropy.linear_cross_entropy(**t, return_logits=False, backend=backend)[0])}
    if hasattr(F, "linear_cross_entropy"):
        implementations["F.linear_cross_entropy"] = chunked_by_torch
    flops = 2 * rows * C * V * (3 if grad else 1)
    return Case("linear cross-entropy", dict(rows=rows, C=C, V=V), dtype, direction, moved, flops, make, implementations,
                sweep=sweep)


def sample_case(rows, V, dtype, sweep=""):
    """Temperature 0.8 and top-k 200, as nanoGPT's sample.py."""
    def make(device):
        return {"logits": randn(device, dtype, rows, V, scale=2.0)}

    @lazily
    def our():
        streams = {}

        def run(t):
            logits = t["logits"]
            if not streams:
                for name in ("out", "seed", "offset"):
                    streams[name] = torch.zeros(rows, dtype=torch.int64, device=logits.device)
            sampler.sample_out(logits, temperature=0.8, top_k=200, backend=AUTO, **streams)
        return run

    def plain(t):
        logits = t["logits"] / 0.8
        kth = torch.topk(logits, 200).values[:, [-1]]
        logits[logits < kth] = -float("inf")
        return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)

    def filtered(logits):
        logits = logits / 0.8
        logits = logits.masked_fill(logits < torch.topk(logits, 200).values[:, -1:], -float("inf"))
        return F.softmax(logits, dim=-1)

    @lazily
    def compile_and_draw():
        probabilities = torch.compile(filtered, dynamic=False)
        return lambda t: torch.multinomial(probabilities(t["logits"]), num_samples=1)

    return Case("sampler", dict(rows=rows, V=V), dtype, FORWARD, rows * V * dtype.itemsize, 0, make,
                {"ours": our, "eager": plain, "compile": compile_and_draw}, sweep=sweep)


# ---------------------------------------------------------------------------------------------------------------- the list


def cases(device_type, quick=False):
    """All cases for "cuda" or "cpu", those of GPT-2 124M first; quick: tiny shapes, one an op, to try the machinery. Kernels of one's own
    (NANOGPT_FAST_KERNELS) are rows beside ours."""
    ops_backend.load_local()
    if quick:
        f32 = torch.float32
        return [attention_case(1, 16, 2, 8, f32, BOTH), separate_attention_case(1, 16, 2, 8, f32, BOTH), decode_case(2, 16, 2, 8, f32), layer_norm_case(8, 32, f32, BOTH),
                mlp_case(8, 16, f32, BOTH), cross_entropy_case(8, 16, 50, f32, BOTH), sample_case(2, 300, f32)]
    return list(_on_cuda() if device_type == "cuda" else _on_cpu())


def _on_cuda():
    bf16 = torch.bfloat16
    tokens = 32 * 1024
    # What GPT-2 124M's step is made of comes first, so that a run that is cut short has it.
    for direction in (BOTH, FORWARD):
        yield attention_case(32, 1024, 12, 64, bf16, direction, sweep="T")
        yield layer_norm_case(tokens, 768, bf16, direction, sweep="C")
        yield mlp_case(tokens, 768, bf16, direction, sweep="C")
        yield cross_entropy_case(tokens, 768, 50304, bf16, direction, sweep="V")
    for rows in (1, 8, 64):
        yield sample_case(rows, 50304, bf16, sweep="rows")
        yield decode_case(rows, 1024, 12, 64, bf16, sweep="B")
    for direction in (FORWARD, BOTH):
        for T in (256, 512, 2048, 4096, 8192, 16384):
            yield attention_case(32 * 1024 // T, T, 12, 64, bf16, direction, sweep="T")   # the same number of tokens
        for D, H in ((32, 24), (128, 6), (256, 3)):
            yield attention_case(32, 1024, H, D, bf16, direction, sweep="D")               # the same width
        for B in (1, 4, 64):
            yield attention_case(B, 1024, 12, 64, bf16, direction, sweep="B")
        for C in (384, 1024, 1280, 1600):
            yield layer_norm_case(tokens, C, bf16, direction, sweep="C")
            yield mlp_case(tokens, C, bf16, direction, sweep="C")
        for V in (65, 8192, 128256):
            yield cross_entropy_case(tokens, 768, V, bf16, direction, sweep="V")
    yield attention_case(32, 1024, 12, 64, torch.float16, BOTH)
    for B, T in ((32, 1024), (12, 1024), (8, 4096)):
        yield separate_attention_case(B, T, 12, 64, bf16, BOTH)


def _on_cpu():
    f32, bf16 = torch.float32, torch.bfloat16
    for direction in (BOTH, FORWARD):
        for T in (64, 256, 1024):
            yield attention_case(4, T, 12, 64, f32, direction, sweep="T")
        yield attention_case(4, 256, 12, 64, bf16, direction)
        yield separate_attention_case(4, 256, 12, 64, f32, direction)
        for C in (128, 768):
            yield layer_norm_case(1024, C, f32, direction, sweep="C")
            yield mlp_case(1024, C, f32, direction, sweep="C")
        yield layer_norm_case(1024, 768, bf16, direction)
        yield cross_entropy_case(256, 768, 50304, f32, direction, sweep="V")
        yield cross_entropy_case(768, 128, 65, f32, direction, sweep="V")
    for rows in (1, 8, 64):
        yield sample_case(rows, 50304, f32, sweep="rows")
        yield decode_case(rows, 256, 12, 64, f32, sweep="B")
