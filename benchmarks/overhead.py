"""What an op costs on the host: microseconds of Python per call, beside a bare autograd.Function of the same signature.

    python -m benchmarks.overhead [--repeats 400] [--op layer_norm] [--json FILE]

A step of GPT-2 124M calls some 75 ops; at small sizes the GPU waits for the host, so what an op does around its launch
(checks, choice of implementation, autograd) must be cheap. The bare Function saves and allocates what the op does and passes as many
arguments to its kernels; on both sides the kernels are stubs that do nothing. The two take turns in short blocks of calls, and the
fastest block of each counts: load only ever adds time. Float32 without autocast and dropout, backend "fused". On a machine without a GPU,
CPU tensors take the same path; with one, the device query is included.

To add an op: write a function that returns an Entry, and put it into ENTRIES.
"""
import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Callable

import torch

from nanogpt_fast import tables
from nanogpt_fast.bench import measure

LIMIT = 1.5  # times the bare Function: the target for these ops


@dataclass
class Entry:
    """An op and its floor. Both are called without arguments and return a tensor that requires grad, or a tuple of them.

    without_launches: returns a context manager that removes the op's kernel launches. inputs: the tensors whose gradients are asked for.
    """
    op: Callable
    bare: Callable
    without_launches: Callable
    inputs: tuple


class replaced:
    """Replaces attributes of a module inside the block."""

    def __init__(self, module, **replacements):
        self.module, self.replacements = module, replacements

    def __enter__(self):
        self.before = {name: getattr(self.module, name) for name in self.replacements}
        vars(self.module).update(self.replacements)

    def __exit__(self, *_):
        vars(self.module).update(self.before)


def _leaves(*shapes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


class NoLaunch:
    """Stands for a Triton kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid):
        return _nothing


def _nothing(*args, **kwargs):
    pass


stub = NoLaunch()


def _no_layer_norm_launches():
    from nanogpt_fast.kernels import layer_norm as kernels
    return replaced(kernels, _forward_kernel=stub, _backward_kernel=stub, _sum_partials_kernel=stub)


def _gradients(dy, ds, s, weight, statistics):
    """What the backward of a LayerNorm allocates, and its two launches."""
    dx = torch.empty_like(s)
    partials = [torch.empty((8, 64), dtype=torch.float32, device=s.device) for _ in range(2)]
    sums = [torch.empty(64, dtype=weight.dtype, device=s.device) for _ in range(2)]
    stub[(8,)](dy, ds, s, weight, statistics, None, dx, None, *partials, 64, 64, 0.0, ROWS=8, BLOCK_C=64, num_warps=1)
    stub[(4,)](*partials, *sums, 8, 64, ROWS=64, BLOCK_C=16, num_warps=4)
    return dx, *sums


def layer_norm():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import norm as op
    x, weight, bias = inputs = _leaves((4, 16, 64), (64,), (64,))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, x, weight, bias, eps, backend):
            y, statistics = torch.empty_like(x, dtype=x.dtype), torch.empty((2, 64), dtype=torch.float32, device=x.device)
            stub[(8,)](x, None, weight, bias, None, None, y, statistics, 64, 64, 0.0, eps, ROWS=8, BLOCK_C=64, num_warps=1)
            ctx.save_for_backward(x, weight, statistics)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, statistics = ctx.saved_tensors
            dx, *sums = _gradients(dy, None, x, weight, statistics)
            return dx, *sums, None, None

    return Entry(lambda: op.layer_norm(x, weight, bias, backend=fused), lambda: Bare.apply(x, weight, bias, 1e-5, fused),
                 _no_layer_norm_launches, inputs)


def add_layer_norm():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import norm as op
    x, branch, weight, bias = inputs = _leaves((4, 16, 64), (4, 16, 64), (64,), (64,))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, x, branch, weight, bias, eps, dropout_p, out_dtype, backend):
            s, y = torch.empty_like(x), torch.empty_like(x, dtype=out_dtype)
            statistics = torch.empty((2, 64), dtype=torch.float32, device=x.device)
            stub[(8,)](x, branch, weight, bias, None, s, y, statistics, 64, 64, dropout_p, eps, ROWS=8, BLOCK_C=64, num_warps=1)
            ctx.save_for_backward(s, weight, statistics, None)
            return s, y

        @staticmethod
        def backward(ctx, ds, dy):
            s, weight, statistics, _ = ctx.saved_tensors
            dx, *sums = _gradients(dy, ds, s, weight, statistics)
            return dx, dx, *sums, None, None, None, None

    return Entry(lambda: op.add_layer_norm(x, branch, weight, bias, backend=fused),
                 lambda: Bare.apply(x, branch, weight, bias, 1e-5, 0.0, x.dtype, fused), _no_layer_norm_launches, inputs)


def _no_attention_launches():
    from nanogpt_fast.kernels import attention_backward, attention_forward
    stack = contextlib.ExitStack()
    stack.enter_context(replaced(attention_forward, forward_kernel=stub))
    stack.enter_context(replaced(attention_backward, backward_head_kernel=stub, backward_dq_kernel=stub,
                                 backward_dkdv_kernel=stub))
    return stack


STRIDES = (3072, 16, 192) * 2
TILE = dict(D=16, HEAD=16, DROPOUT=False, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


def _two_launches(do, q, k, v, out, lse, dq, dk, dv):
    """The backward's split form, with its scratch."""
    terms = torch.empty((2, 4, 2, 128), dtype=torch.float32, device=q.device)
    stub[(8,)](q, k, v, out, do, lse, terms, dq, None, *STRIDES, 1024, 16, 64, 192, 0.25, 0.36, 0.0, 4, 16, 16, 8, 1, **TILE)
    stub[(8,)](q, k, v, do, terms, dk, dv, None, *STRIDES, 1024, 16, 64, 192, 0.25, 0.36, 0.0, 4, 16, 16, 8, 1, **TILE)


def causal_attention_qkvpacked():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import attention as op
    qkv, = inputs = _leaves((2, 16, 192))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, qkv, n_head, dropout_p, scale, backend):
            out = torch.empty((2, 16, 64), dtype=qkv.dtype, device=qkv.device)
            lse = torch.empty((2, 4, 16), dtype=torch.float32, device=qkv.device)
            stub[(8,)](qkv, None, None, out, lse, None, *STRIDES, 0.25, dropout_p, 4, 16, 16, 8, 1, **TILE)
            ctx.save_for_backward(qkv, out, lse)
            return out

        @staticmethod
        def backward(ctx, do):
            qkv, out, lse = ctx.saved_tensors
            dqkv = torch.empty((2, 16, 192), dtype=qkv.dtype, device=qkv.device)
            _two_launches(do, qkv, None, None, out, lse, dqkv, None, None)
            return dqkv, None, None, None, None

    return Entry(lambda: op.causal_attention_qkvpacked(qkv, 4, backend=fused), lambda: Bare.apply(qkv, 4, 0.0, None, fused),
                 _no_attention_launches, inputs)


def causal_attention():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import attention as op
    q, k, v = inputs = _leaves(*[(2, 4, 16, 16)] * 3)
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, q, k, v, dropout_p, scale, backend):
            out = torch.empty((2, 16, 4, 16), dtype=q.dtype, device=q.device)
            lse = torch.empty((2, 4, 16), dtype=torch.float32, device=q.device)
            stub[(8,)](q, k, v, out, lse, None, *STRIDES, 0.25, dropout_p, 4, 16, 16, 8, 1, **TILE)
            ctx.save_for_backward(q, k, v, out, lse)
            return out.transpose(1, 2)

        @staticmethod
        def backward(ctx, do):
            q, k, v, out, lse = ctx.saved_tensors
            gradients = [torch.empty((2, 16, 4, 16), dtype=q.dtype, device=q.device) for _ in range(3)]
            _two_launches(do, q, k, v, out, lse, *gradients)
            return *(g.transpose(1, 2) for g in gradients), None, None, None

    return Entry(lambda: op.causal_attention(q, k, v, backend=fused), lambda: Bare.apply(q, k, v, 0.0, None, fused),
                 _no_attention_launches, inputs)


ENTRIES = {make.__name__: make for make in (layer_norm, add_layer_norm, causal_attention_qkvpacked, causal_attention)}


def ratios(entry, repeats=400, calls=20):
    """{"forward": (bare us, op us, ratio), "forward + backward": ...}: the fastest of `repeats` blocks of `calls` calls."""
    from nanogpt_fast import backend

    def forward(call):
        call()

    def both(call):
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, entry.inputs, outputs)

    results = {}
    # CPU tensors that claim to be on a GPU, so that the whole choice of implementation runs.
    with entry.without_launches(), replaced(backend, _interpreted=True):
        for name, run in (("forward", forward), ("forward + backward", both)):
            fastest = {entry.bare: float("inf"), entry.op: float("inf")}
            for _ in range(repeats):
                for side in fastest:
                    start = time.perf_counter()
                    for _ in range(calls):
                        run(side)
                    fastest[side] = min(fastest[side], (time.perf_counter() - start) / calls * 1e6)
            results[name] = fastest[entry.bare], fastest[entry.op], fastest[entry.op] / fastest[entry.bare]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=400, help="pairs of blocks of 20 calls")
    parser.add_argument("--op", choices=ENTRIES, help="only this one")
    parser.add_argument("--json", help="append the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = tables.Lines(("op", "", "bare us", "op us", f"ratio, at most {LIMIT}"), align="llr", widths=(26, 18, 8, 8))
    print("\n".join(lines.head), flush=True)
    worst = 0.0
    for name, make in ENTRIES.items():
        if args.op not in (None, name):
            continue
        measured = ratios(make(), args.repeats)
        for what, (bare, op, ratio) in measured.items():
            print(lines.row((name, what, f"{bare:.1f}", f"{op:.1f}", f"{ratio:.2f}")), flush=True)
            worst = max(worst, ratio)
        if args.json:
            measure.append(args.json, "overhead", op=name, microseconds={what: dict(zip(("bare", "op", "ratio"), row))
                                                                         for what, row in measured.items()})
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
