"""Random calls of every op that the extension computes on a CPU, compared with plain PyTorch; a program and a test.

    python tests/fuzzed.py SECONDS [SEED]

Shapes are small and odd, dtypes and layouts mixed, values ordinary, huge, tiny or equal. A crash ends the program; a wrong result names its seed.
Under sanitizers: build the extension with a compiler that has -fsanitize=address,undefined (CXX=...), and preload its libasan.
"""
import math
import random
import sys
import time

import torch

from nanogpt_fast import backend, reference
from nanogpt_fast.ops import attention, cross_entropy, linear, norm, sampler
from nanogpt_fast.ops.cpu import adamw

FUSED = backend.parse("fused")
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}     # relative L2 error against float64, beside four times that of plain PyTorch


def size(r, most):
    return r.choice([1, 2, 3, r.randint(1, most), r.randint(1, most), most])


def drawn(r, *shape, dtype=torch.float32, grad=True):
    x = torch.randn(shape) * r.choice([1.0, 1.0, 1.0, 30.0, 1e-3, 0.0])
    if r.random() < 0.2 and len(shape) > 1:     # other strides
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if r.random() < 0.2:                        # a view that begins inside
        x = torch.cat([x.flatten(), x.new_zeros(3)])[0:x.numel()].view(shape)
    return x.to(dtype).requires_grad_(grad)


def compared(what, found, plain, exact, dtype, costs=None):
    for name, cost, *tensors in zip(what, costs or len(what) * [0.0], found, plain, exact):
        a, p, b = (t.detach().double() for t in tensors)
        if a.shape != b.shape:
            raise AssertionError(f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        good = torch.isfinite(p) & torch.isfinite(b)
        if not torch.isfinite(a[good]).all():
            raise AssertionError(f"{name}: not finite where PyTorch's is")
        error, usual = ((t - b)[good].norm() / b[good].norm().clamp_min(1e-3) for t in (a, p))
        usual = max(usual, cost / b[good].norm().clamp_min(1e-3))
        if not error <= 4 * usual + ALLOWED[dtype]:
            raise AssertionError(f"{name}: relative error {error:.2g}, plain PyTorch's {usual:.2g}")


def gradients(results, leaves, seed):
    torch.manual_seed(seed)
    given = [torch.randn(y.shape) for y in results if y.requires_grad]
    return torch.autograd.grad([y for y in results if y.requires_grad], leaves, [g.to(y.dtype) for g, y in zip(given, results)])


def both_ways(r, ours, plain, leaves, dtype, costs=None):
    """ours() and plain(*leaves), a list of results each: results and gradients against plain in float64. costs(*leaves, *the results' gradients),
    all in float64: for each leaf, the L2 error that its gradient has on average by what every algorithm in half precision rounds."""
    exactly, seed = [leaf.detach().double().requires_grad_() for leaf in leaves], r.randrange(2**31)
    found, usual, exact = ours(), plain(*leaves), plain(*exactly)
    compared(("result", "second result"), found, usual, exact, dtype)
    if costs is not None:
        torch.manual_seed(seed)
        costs = costs(*exactly, *[torch.randn(y.shape).to(dtype).double() for y in found])
    compared([f"gradient {i}" for i in range(len(leaves))], gradients(found, leaves, seed), gradients(usual, leaves, seed),
             gradients(exact, exactly, seed), dtype, costs)


def attention_costs(qkv, do, H):
    """What rounding p and ds to bf16 costs on average: where keys share a query's weight ds sums to 0, rounded it does not, and PyTorch's may by
    luck."""
    q, k, v = reference.split_heads(qkv.detach(), H)
    do = do.unflatten(2, (H, -1)).transpose(1, 2)
    scores = q @ k.mT * q.size(-1)**-0.5
    p = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).tril().logical_not(), -math.inf).softmax(-1)
    ds = p * (do @ v.mT)
    ds = (ds - p * ds.sum(-1, keepdim=True)) * q.size(-1)**-0.5
    squares = ds.square() @ k.square(), ds.square().mT @ q.square(), p.square().mT @ do.square()
    return [torch.finfo(torch.bfloat16).eps / 12**0.5 * sum(t.sum() for t in squares).sqrt()]


def fuzz_attention(r):
    B, T, H, D = size(r, 3), size(r, 300), size(r, 4), size(r, 96)
    qkv = drawn(r, B, T, 3 * H * D, dtype=torch.bfloat16)
    both_ways(r, lambda: [attention.causal_attention_qkvpacked(qkv, H, backend=FUSED)], lambda qkv: [reference.causal_attention_qkvpacked(qkv, H)], [qkv],
              torch.bfloat16, lambda qkv, do: attention_costs(qkv, do, H))


def fuzz_norm(r):
    shape = [size(r, 5), size(r, 40), size(r, 900)]
    leaves = [drawn(r, *shape), drawn(r, *shape, dtype=torch.bfloat16), drawn(r, shape[-1]), *[drawn(r, shape[-1])] * (r.random() < 0.7)]

    def call(op, x, branch, weight, bias=None):
        s, y = op(x, branch, weight, bias)
        return [s, y.to(torch.bfloat16) if x.dtype == torch.float32 else y]
    both_ways(r, lambda: call(lambda *t: norm.add_layer_norm(*t, out_dtype=torch.bfloat16, backend=FUSED), *leaves),
              lambda *t: call(reference.add_layer_norm, *t), leaves, torch.bfloat16)


def fuzz_loss(r):
    dtype = r.choice([torch.float32, torch.bfloat16])
    N, C, V = size(r, 60), size(r, 70), size(r, 700)
    leaves = [drawn(r, N, C, dtype=dtype), drawn(r, V, C, dtype=dtype)]
    targets = torch.randint(V, (N,)).where(torch.rand(N) < 0.9, -1)
    targets[0] = 0
    both_ways(r, lambda: cross_entropy.linear_cross_entropy(*leaves, targets, return_logits=False, backend=FUSED)[:1],
              lambda x, weight: reference.linear_cross_entropy(x, weight, targets)[:1], leaves, dtype)


def fuzz_linear(r):
    dtype = r.choice([torch.float32, torch.bfloat16])
    M, K, N = (size(r, 400) for _ in range(3))
    leaves = [drawn(r, M, K, dtype=dtype), drawn(r, N, K), *[drawn(r, N)] * (r.random() < 0.5)]
    copy = leaves[1].detach().to(dtype).contiguous()

    def plain(x, weight, bias=None):
        copied = copy.double() if x.dtype == torch.float64 else copy
        return [torch.nn.functional.linear(x, linear.cast(weight, copied), None if bias is None else bias.to(x.dtype))]
    both_ways(r, lambda: [linear.linear(leaves[0], leaves[1], leaves[2] if leaves[2:] else None, copy=copy)], plain, leaves, dtype)


def fuzz_sampler(r):
    B, V = size(r, 9), size(r, 3000)
    logits = drawn(r, B, V, dtype=r.choice([torch.float32, torch.bfloat16, torch.float16]), grad=False).contiguous()
    how = dict(temperature=r.choice([0.0, 0.7, 1.0, 1e-3, 50.0]), top_k=r.choice([None, 1, 5, V]), top_p=r.choice([None, 0.0, 0.3, 1.0]), min_p=r.choice([None, 0.1]))
    ours, plain = (sampler.sample(logits, seed=11, offset=3, backend=choice, **how) for choice in ("fused", "reference"))
    if not torch.equal(ours, plain):
        raise AssertionError(f"tokens {ours.tolist()}, by the definition {plain.tolist()}; {how}")


def fuzz_adamw(r):
    shapes = [[size(r, 50) for _ in range(r.randint(1, 2))] for _ in range(r.randint(1, 4))]
    start, grads = [torch.randn(shape) for shape in shapes], [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ends = []
    for ours in (True, False):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)
        for step in grads:
            for p, grad in zip(parameters, step):
                p.grad = grad.clone()
            if ours and adamw.why_not(optimizer) is None:
                total = adamw.norm([p.grad for p in parameters]).item()
                adamw.step(optimizer, factor=min(1.0, 1.0 / (total + 1e-6)))
            else:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
        ends.append(parameters)
    compared([f"weight {i}" for i in range(len(start))], ends[0], ends[1], ends[1], torch.float32)


OPS = (fuzz_attention, fuzz_norm, fuzz_loss, fuzz_linear, fuzz_sampler, fuzz_adamw)


def run(seconds, seed=0, least=1):
    """{name of an op: calls}, at least so many of each. Raises AssertionError with the seed of the call that is wrong."""
    calls, until = dict.fromkeys((op.__name__ for op in OPS), 0), time.monotonic() + seconds
    while time.monotonic() < until or min(calls.values()) < least:
        op = OPS[seed % len(OPS)]
        torch.manual_seed(seed)
        try:
            op(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"{op.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        calls[op.__name__] += 1
        seed += 1
    return calls


if __name__ == "__main__":
    print(run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
