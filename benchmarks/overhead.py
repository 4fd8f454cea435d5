"""What an op costs on the host: microseconds of Python per call, beside a bare autograd.Function of the same signature.

    python benchmarks/overhead.py [--repeats 400] [--op layer_norm]

A step of GPT-2 124M calls some 75 ops; at small sizes the GPU waits for the host, so what an op does around its launch
(checks, choice of implementation, autograd) must be little. The bare Function saves and allocates what the op does; launching a
Triton kernel is left out on both sides. The two take turns in short blocks of calls, and of each the fastest block counts: a
busy machine only ever adds. Runs on a GPU or a CPU; the host's work is the same.

To add an op: write a function that returns an Entry, and put it into ENTRIES.
"""
import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Callable

import torch

LIMIT = 1.5  # times the bare Function: the target of the issue that asked for these ops


@dataclass
class Entry:
    """An op and its floor. Both are called without arguments and return a tensor that requires grad, or a tuple of them.

    stub: gives a context manager that takes the op's kernel launches out. inputs: what the backward is asked for.
    """
    op: Callable
    bare: Callable
    stub: Callable
    inputs: tuple


class replaced:
    """Attributes of a module, replaced inside a with."""

    def __init__(self, module, **replacements):
        self.module, self.replacements = module, replacements

    def __enter__(self):
        self.before = {name: getattr(self.module, name) for name in self.replacements}
        vars(self.module).update(self.replacements)

    def __exit__(self, *_):
        vars(self.module).update(self.before)


def _leaves(*shapes):
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


class NoLaunch:
    """Stands for a Triton kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid):
        return _nothing


def _nothing(*args, **kwargs):
    pass


def _no_layer_norm_launches():
    from nanogpt_fast.kernels import layer_norm as kernels
    return replaced(kernels, _forward_kernel=NoLaunch(), _backward_kernel=NoLaunch(), _sum_partials_kernel=NoLaunch())


def layer_norm():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import layer_norm as op
    x, weight, bias = inputs = _leaves((4, 16, 64), (64,), (64,))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, x, weight, bias, eps, y_dtype):
            y, statistics = torch.empty_like(x, dtype=y_dtype), torch.empty((2, 64), dtype=torch.float32, device=x.device)
            ctx.save_for_backward(x, weight, statistics)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, _ = ctx.saved_tensors
            partials = [torch.empty((8, 64), dtype=torch.float32, device=x.device) for _ in range(2)]  # as in the op
            return torch.empty_like(x), *(torch.empty(64, dtype=weight.dtype, device=x.device) for _ in partials), None, None

    return Entry(lambda: op.layer_norm(x, weight, bias, backend=fused), lambda: Bare.apply(x, weight, bias, 1e-5, x.dtype),
                 _no_layer_norm_launches, inputs)


def add_layer_norm():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import layer_norm as op
    x, branch, weight, bias = inputs = _leaves((4, 16, 64), (4, 16, 64), (64,), (64,))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, x, branch, weight, bias, seed, p, eps, y_dtype):
            s, y = torch.empty_like(x), torch.empty_like(x, dtype=y_dtype)
            statistics = torch.empty((2, 64), dtype=torch.float32, device=x.device)
            ctx.save_for_backward(s, weight, statistics, seed)
            return s, y

        @staticmethod
        def backward(ctx, ds, dy):
            s, weight, _, _ = ctx.saved_tensors
            partials = [torch.empty((8, 64), dtype=torch.float32, device=s.device) for _ in range(2)]  # as in the op
            dx = torch.empty_like(s)
            return dx, dx, *(torch.empty(64, dtype=weight.dtype, device=s.device) for _ in partials), None, None, None, None

    return Entry(lambda: op.add_layer_norm(x, branch, weight, bias, backend=fused),
                 lambda: Bare.apply(x, branch, weight, bias, None, 0.0, 1e-5, x.dtype), _no_layer_norm_launches, inputs)


def _no_attention_launches():
    from nanogpt_fast.kernels import attention_backward, attention_forward
    stack = contextlib.ExitStack()
    stack.enter_context(replaced(attention_forward, forward_kernel=NoLaunch()))
    stack.enter_context(replaced(attention_backward, backward_head_kernel=NoLaunch(), backward_dq_kernel=NoLaunch(),
                                 backward_dkdv_kernel=NoLaunch()))
    return stack


def causal_attention_qkvpacked():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import attention as op
    qkv, = inputs = _leaves((2, 16, 192))
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, qkv, n_head, scale, dropout_p):
            out = torch.empty((2, 16, 64), dtype=qkv.dtype, device=qkv.device)
            lse = torch.empty((2, 4, 16), dtype=torch.float32, device=qkv.device)
            ctx.save_for_backward(qkv, out, lse)
            return out

        @staticmethod
        def backward(ctx, do):
            qkv, out, lse = ctx.saved_tensors
            terms = torch.empty((2, 4, 2, 128), dtype=torch.float32, device=qkv.device)  # as in the op
            return torch.empty((2, 16, 192), dtype=qkv.dtype, device=qkv.device), None, None, None

    return Entry(lambda: op.causal_attention_qkvpacked(qkv, 4, backend=fused), lambda: Bare.apply(qkv, 4, None, 0.0),
                 _no_attention_launches, inputs)


def causal_attention():
    from nanogpt_fast import backend
    from nanogpt_fast.ops import attention as op
    q, k, v = inputs = _leaves(*[(2, 4, 16, 16)] * 3)
    fused = backend.parse("fused")

    class Bare(torch.autograd.Function):

        @staticmethod
        def forward(ctx, q, k, v, scale, dropout_p):
            out = torch.empty((2, 16, 4, 16), dtype=q.dtype, device=q.device)
            lse = torch.empty((2, 4, 16), dtype=torch.float32, device=q.device)
            ctx.save_for_backward(q, k, v, out, lse)
            return out.transpose(1, 2)

        @staticmethod
        def backward(ctx, do):
            q, k, v, out, lse = ctx.saved_tensors
            terms = torch.empty((2, 4, 2, 128), dtype=torch.float32, device=q.device)  # as in the op
            gradients = [torch.empty((2, 16, 4, 16), dtype=q.dtype, device=q.device) for _ in range(3)]
            return *(g.transpose(1, 2) for g in gradients), None, None

    return Entry(lambda: op.causal_attention(q, k, v, backend=fused), lambda: Bare.apply(q, k, v, None, 0.0),
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
    # A CPU's tensors, taken for ones that a kernel can run on: the choice of implementation goes on to its end.
    with entry.stub(), replaced(backend, _interpreted=True):
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'op':26} {'':18} {'bare us':>8} {'op us':>8} {'ratio':>6}   (limit {LIMIT})")
    over = False
    for name, make in ENTRIES.items():
        if args.op in (None, name):
            for what, (bare, op, ratio) in ratios(make(), args.repeats).items():
                over |= ratio > LIMIT
                print(f"{name:26} {what:18} {bare:8.1f} {op:8.1f} {ratio:6.2f}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
