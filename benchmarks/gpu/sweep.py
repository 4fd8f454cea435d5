"""Forms and tiles of the kernels of GPT-2 124M's step beside cuBLAS, cuDNN and FlashAttention, forward and backward apart.

    python -m benchmarks.gpu.sweep [--json FILE] [--only WORD,WORD] [--rounds N] [--workers N] [--device cpu]

All configurations are compiled first, by several processes side by side; then each group is timed in turns with cold caches. A wrong result
is reported and not timed; a configuration that cannot be compiled or launched becomes a row that says why. One record a group.
"""
import argparse
import functools
import itertools
import multiprocessing
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from nanogpt_fast.kernels import attention_backward, attention_forward, cross_entropy, fastest, layer_norm, mlp
from nanogpt_fast.kernels.fastest import Tile
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import candidates
from benchmarks.gpu.smoke import relative
from nanogpt_fast import backend, reference, tables
from nanogpt_fast.bench import measure
from nanogpt_fast.ops import attention as attention_op
from nanogpt_fast.ops.hopper import attention as attention_hopper, mlp as mlp_hopper

BF16 = torch.bfloat16
FUSED = backend.parse("fused")


@dataclass
class Group:
    """What is timed together: `make(device)` gives the inputs, `rows[name](inputs)` runs one configuration and returns the result, which is checked
    against `rows[first]`. least: bytes that must move, FLOPs that must be done."""
    name: str
    make: object
    rows: dict
    bytes: int = 0
    flops: int = 0
    tolerance: float = 0.02
    unchecked: tuple = field(default=())


def tiles(*rows):
    return [Tile(M, N, 0, warps, stages) for M, N, warps, stages in rows]


FORWARD = tiles((128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
                (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3), (64, 128, 4, 2), (256, 64, 8, 2), (64, 32, 4, 3), (64, 32, 4, 4),
                (128, 32, 8, 3), (128, 64, 8, 4), (128, 64, 8, 2))
HEAD = tiles((64, 128, 8, 3), (128, 128, 8, 2))
DKDV = tiles((32, 64, 4, 3), (64, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 4), (16, 64, 4, 4), (32, 128, 4, 3), (32, 32, 4, 3),
             (64, 64, 4, 4), (32, 64, 8, 3), (64, 32, 4, 3))
DQ = tiles((64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 4), (64, 16, 4, 4), (128, 32, 8, 3), (128, 32, 4, 3),
           (64, 64, 4, 3), (32, 32, 4, 3))
MATMUL = [Tile(*row) for row in ((128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
                                 (128, 128, 32, 4, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4))]


def named(tile):
    return "x".join(str(size) for size in tile[:3] if size) + f" w{tile[3]} s{tile[4]}"


def tried(run, row):
    """`run` with this row before the table's."""
    def once(t):
        with fastest.trial([row]):
            return run(t)
    return once


def specialised(H, BM, BN, stages):
    """The Gluon candidate. Imported only where it runs, since Gluon's names change from version to version."""
    def run(t):
        from benchmarks.gpu import candidates_attention
        return candidates_attention.forward(t["qkv"].detach(), H, BM, BN, stages)[0]
    return run


def packed(H, deterministic=None):
    """cuDNN through its own front end; None: the forward."""
    def run(t):
        from benchmarks.gpu import candidates_cudnn
        if "cudnn" not in t:
            t["cudnn"] = candidates_cudnn.forward(t["qkv"].detach(), H)
        if deterministic is None:
            return candidates_cudnn.forward(t["qkv"].detach(), H)[0]
        return candidates_cudnn.backward(t["do"], t["qkv"].detach(), *t["cudnn"], H, deterministic)
    return run


def with_dropout(B, T, H, D, p):
    """Forward and backward under dropout; masks differ, so only times are compared."""
    def make(device):
        torch.manual_seed(0)
        return dict(qkv=torch.randn(B, T, 3 * H * D, device=device, dtype=BF16, requires_grad=True),
                    do=torch.randn(B, T, H * D, device=device, dtype=BF16))

    def run(call, both):
        def once(t):
            if not both:
                with torch.no_grad():
                    return call(t)
            return torch.autograd.grad(call(t), t["qkv"], t["do"])[0]
        return once

    def backward(form, **given):
        """Ours with this form and these tiles in the backward, for one launch."""
        def once(t):
            if "out" not in t:
                seed = torch.tensor([5], device=t["qkv"].device)
                t["seed"], (t["out"], t["lse"]) = seed, attention_forward.launch_forward_qkvpacked(t["qkv"].detach(), seed, H, None, p)
            return attention_backward.launch_backward_qkvpacked(t["do"], t["qkv"].detach(), t["out"], t["lse"], t["seed"], H, None, p,
                                                                form, given or None)
        return once

    forms = {"head": backward("head"), "split": backward("split")}
    forms |= {f"split dq {named(dq)}, dkdv {named(dkdv)}": backward("split", dq=dq, dkdv=dkdv)
              for dq, dkdv in ((DQ[0], DKDV[0]), *zip(tiles((64, 64, 4, 2), (128, 64, 8, 2)), tiles((64, 64, 4, 2), (32, 64, 4, 3))))}
    yield Group(f"attention backward B={B} T={T} H={H} D={D} dropout={p}", make, forms, tolerance=0.02)
    calls = {"ours": lambda t: attention_op.causal_attention_qkvpacked(t["qkv"], H, dropout_p=p, backend=FUSED),
             "PyTorch": lambda t: reference.causal_attention_qkvpacked(t["qkv"], H, dropout_p=p)}
    for both in (False, True):
        yield Group(f"attention {'forward + backward' if both else 'forward'} B={B} T={T} H={H} D={D} dropout={p}", make,
                    {name: run(call, both) for name, call in calls.items()}, unchecked=tuple(calls))


def attention(B, T, H, D, small=False):
    """Two groups: forward and backward of the packed projection."""
    def make(device):
        torch.manual_seed(0)
        qkv = torch.randn(B, T, 3 * H * D, device=device, dtype=BF16, requires_grad=True)
        do = torch.randn(B, T, H * D, device=device, dtype=BF16)
        out, lse = attention_forward.launch_forward_qkvpacked(qkv.detach(), None, H, None, 0.0)
        return dict(qkv=qkv, do=do, out=out, lse=lse, graphs={})

    def by(backend):
        def run(t):
            with sdpa_kernel(backend), torch.no_grad():
                return reference.causal_attention_qkvpacked(t["qkv"], H)
        return run

    def back(backend):
        def run(t):
            if backend not in t["graphs"]:
                with sdpa_kernel(backend):
                    t["graphs"][backend] = reference.causal_attention_qkvpacked(t["qkv"], H)
            return torch.autograd.grad(t["graphs"][backend], t["qkv"], t["do"], retain_graph=True)[0]
        return run

    def forward(tile):
        return lambda t: attention_forward.launch_forward_qkvpacked(t["qkv"].detach(), None, H, None, 0.0, tile)[0]

    def backward(form, **given):
        return lambda t: attention_backward.launch_backward_qkvpacked(
            t["do"], t["qkv"].detach(), t["out"], t["lse"], None, H, None, 0.0, form, given or None)

    peers = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    shape, few = f"B={B} T={T} H={H} D={D}", 3 if small else None
    tensor, matmul = B * T * H * D * 2, 2 * B * H * T * T * D // 2
    yield Group(f"attention forward {shape}", make, {name: by(backend) for name, backend in peers.items()}
                | {"cuDNN packed": packed(H)}
                | {named(tile): forward(tile) for tile in FORWARD[:few] if D <= 64 or not small}
                | ({f"specialised {BM}x{BN} s{stages}": specialised(H, BM, BN, stages)
                    for BM, BN, stages in ((64, 128, 2), (64, 128, 3), (64, 64, 4))} if D == 64 and T % 128 == 0 else {}),
                4 * tensor, 2 * matmul)
    yield Group(f"attention backward {shape}", make, {name: back(backend) for name, backend in peers.items()}
                | {"cuDNN packed": packed(H, False), "cuDNN packed deterministic": packed(H, True)}
                | ({"hopper": lambda t: attention_hopper.backward_qkvpacked(t["do"], t["qkv"].detach(), t["out"], t["lse"], H, None)} if D == 64 else {})
                | {f"head {named(tile)}": backward("head", head=tile) for tile in HEAD[:few]}
                | {f"split dq {named(dq)}, dkdv {named(dkdv)}": backward("split", dq=dq, dkdv=dkdv)
                   for dq, dkdv in dict.fromkeys([(DQ[0], row) for row in DKDV[:few]] + [(row, DKDV[0]) for row in DQ[:few]])},
                8 * tensor, 5 * matmul)


def gelu_mlp(rows, C):
    """Four groups: the first product with its activation, and the gradient through it; as the trainer calls them, without biases."""
    def make(device):
        torch.manual_seed(0)
        new = functools.partial(torch.randn, device=device)
        x, dy = (new(rows, C).to(BF16) for _ in range(2))
        w_fc, w_proj = new(4 * C, C).mul_(C ** -0.5).to(BF16), new(C, 4 * C).mul_(C ** -0.5 / 2).to(BF16)
        return dict(x=x, dy=dy, w_fc=w_fc, w_proj=w_proj, h=x @ w_fc.t())

    def pointwise_back(want_post):
        return lambda t: mlp.dact(t["dy"] @ t["w_proj"], t["h"], want_post=want_post, want_db=False)[0]

    def epilogue_back(tile, want_post):
        return lambda t: mlp.linear_dact(t["dy"], t["w_proj"], t["h"], want_post=want_post, want_db=False, tile=tile)[0]

    h, flops = rows * 4 * C * 2, 2 * rows * C * 4 * C
    yield Group(f"MLP forward rows={rows} C={C}", make, {
        "pointwise": lambda t: mlp.act(t["x"] @ t["w_fc"].t()),
        "PyTorch": lambda t: F.gelu(t["x"] @ t["w_fc"].t()),
        "the product alone": lambda t: t["x"] @ t["w_fc"].t(),
        "hopper": lambda t: mlp_hopper.linear_act(t["x"], t["w_fc"])[0],
        **{f"epilogue {named(tile)}": lambda t, tile=tile: mlp.linear_act(t["x"], t["w_fc"], tile=tile)[0] for tile in MATMUL},
        **{f"TMA {named(tile)} g{group}": lambda t, tile=tile, group=group: candidates.linear_act(t["x"], t["w_fc"], tile, group)[0]
           for tile in candidates.TILES for group in ((8,) if tile != candidates.TILES[0] else (8, 1, 16))}},
        2 * h, flops, unchecked=("the product alone",))
    for post in (False,):
        yield Group(f"MLP backward rows={rows} C={C}" + " recompute" * post, make, {
            "pointwise": pointwise_back(post),
            "the product alone": lambda t: t["dy"] @ t["w_proj"],
            "hopper": lambda t: mlp_hopper.linear_dact(t["dy"], t["w_proj"], t["h"], want_db=False)[0],
            **{f"epilogue {named(tile)}": epilogue_back(tile, post) for tile in MATMUL},
            **{f"TMA {named(tile)}": lambda t, tile=tile, post=post: candidates.linear_dact(
                t["dy"], t["w_proj"], t["h"], tile, 8, post)[0] for tile in candidates.TILES}},
            (2 + post) * h, flops, unchecked=("the product alone",))


def loss(rows, C, V):
    """The loss kernel alone by tiles, and loss and gradients together by chunks."""
    def make(device):
        torch.manual_seed(0)
        x = torch.randn(rows, C, device=device).to(BF16)
        weight = torch.randn(V, C, device=device).mul_(C ** -0.5).to(BF16)
        return dict(x=x, weight=weight, targets=torch.randint(0, V, (rows,), device=device), logits=x[:8192] @ weight.t())

    def kernel(block, warps):
        return tried(lambda t: cross_entropy.row_losses(t["logits"], t["targets"][:8192], -1, gradient=True)[0],
                     fastest.Row("cross_entropy tile", tile=Tile(0, block, 0, warps)))

    def whole(chunks):
        return tried(lambda t: cross_entropy.forward_backward(t["x"], t["weight"], t["targets"], -1, True, True)[1],
                     fastest.Row("cross_entropy chunks", str(chunks)))

    blocks = ((8192, 16), (4096, 8), (4096, 16), (8192, 8), (16384, 16), (2048, 8), (2048, 4), (1024, 4), (16384, 32))
    yield Group(f"loss kernel rows=8192 V={V}", make, {f"{block} w{warps}": kernel(block, warps) for block, warps in blocks},
                2 * 8192 * V * 2, unchecked=tuple(f"{block} w{warps}" for block, warps in blocks))
    yield Group(f"loss rows={rows} V={V}", make, {f"{chunks} chunks": whole(chunks) for chunks in (8, 4, 16, 2, 1)},
                4 * rows * V, 6 * rows * C * V)


def norm(rows, C):
    def make(device):
        torch.manual_seed(0)
        new = functools.partial(torch.randn, device=device)
        t = dict(x=new(rows, C), branch=new(rows, C).to(BF16), weight=new(C), dy=new(rows, C).to(BF16), ds=new(rows, C))
        t["s"], _, t["statistics"] = layer_norm.launch_forward(t["x"], t["branch"], t["weight"], None, None, 0.0, 1e-5, BF16)
        return t

    def plain(x, branch, weight):
        s = x + branch
        return s, F.layer_norm(s, weight.shape, weight).to(BF16)

    fused = torch.compile(plain, fullgraph=True, dynamic=False)
    yield Group(f"add + LayerNorm forward rows={rows} C={C}", make, {
        "compile": lambda t: fused(t["x"], t["branch"], t["weight"])[1],
        "ours": lambda t: layer_norm.launch_forward(t["x"], t["branch"], t["weight"], None, None, 0.0, 1e-5, BF16)[1]}, 12 * rows * C)
    yield Group(f"add + LayerNorm backward rows={rows} C={C}", make, {
        "ours": lambda t: layer_norm.launch_backward(t["dy"], t["ds"], t["s"], t["weight"], t["statistics"], None, 0.0, BF16,
                                                     torch.float32, None)[0]}, 16 * rows * C)


def groups(small=False):
    """All groups, most valuable first. small: the same kernels on little memory, for compiling them."""
    def size(n):
        return 1 if small else n
    return [*itertools.chain(
        attention(size(64), 1024, 12, 64), gelu_mlp(1024 * size(64), 768), loss(1024 * size(64), 768, 50304),
        norm(1024 * size(64), 768), attention(size(12), 1024, 12, 64), gelu_mlp(1024 * size(12), 768),
        with_dropout(size(64), 256, 6, 64, 0.2), *(attention(size(B), 1024, 12, 64, small=True) for B in (16, 22, 32)),
        *(attention(size(B), T, 12, 64, small=True) for B, T in ((1, 1024), (4, 1024), (64, 256), (16, 4096))))]


def kind(group):
    """Groups of one kind run the same kernels, on other sizes."""
    return group.name.split(" B=")[0].split(" rows=")[0] + group.name[group.name.find("dropout"):] * ("dropout" in group.name)


def compile_one(job):
    """In a separate process: run one configuration once, so that it is in the cache on disk. Returns None, or why it failed."""
    number, name = job
    group = groups(small=True)[number]
    device = torch.device("cuda")
    key = number
    if compile_one.inputs[0] != key:
        compile_one.inputs = key, group.make(device)
    try:
        group.rows[name](compile_one.inputs[1])
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


compile_one.inputs = None, None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="sweep.jsonl")
    parser.add_argument("--only", default="", help="groups whose name contains one of these words, separated by commas")
    parser.add_argument("--rows", default="", help="rows whose name contains one of these words, separated by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile_only", action="store_true", help="fill the cache on disk")
    args = parser.parse_args(argv)
    words = [word for word in args.only.split(",") if word]
    listed = [(i, group) for i, group in enumerate(groups()) if not words or any(word in group.name for word in words)]
    wanted = [word for word in args.rows.split(",") if word]
    for _, group in listed:
        group.rows = {name: run for name, run in group.rows.items() if not wanted or any(word in name for word in wanted)}
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here to compile for and to time on")
    if args.device == "cpu":    # nothing to time
        listed = []
    jobs = {(kind(group), name): (i, name) for i, group in reversed(listed) for name in group.rows
            if not name.startswith(("flash", "cuDNN", "PyTorch", "compile"))}
    jobs = sorted(jobs.values())
    start = time.perf_counter()
    if jobs and args.workers:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            broken = {job: why for job, why in zip(jobs, pool.map(compile_one, jobs, chunksize=2)) if why}
        print(f"compiled {len(jobs)} configurations in {time.perf_counter() - start:.0f} s, {len(broken)} cannot be", flush=True)
    if args.compile_only:
        return
    for _, group in listed:
        time_group(group, torch.device(args.device), args)


def time_group(group, device, args):
    inputs, expected = group.make(device), None
    runs, failed = {}, {}
    for name, run in group.rows.items():
        try:
            found = run(inputs)
            torch.cuda.synchronize()
            if name not in group.unchecked:
                expected = found if expected is None else expected
                if not (error := relative(found.detach(), expected.detach())) < group.tolerance:
                    failed[name] = f"WRONG: relative error {error:.3g}"
                    continue
            runs[name] = functools.partial(run, inputs)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    samples = measure.interleaved_on_gpu(runs, args.rounds, warmup=1)
    median = measure.medians(samples)
    rows = [(name, f"{1e6 * seconds:,.1f}", f"{group.bytes / seconds / 1e9:,.0f}",
             f"{group.flops / seconds / 1e12:,.0f}" if group.flops else "", "") for name, seconds in sorted(median.items(), key=lambda item: item[1])]
    rows += [(name, "", "", "", why) for name, why in failed.items()]
    print(tables.table((group.name, "us", "GB/s", "TFLOP/s", ""), rows, align="lrrrl") + "\n", flush=True)
    measure.append(args.json, "sweep", device=device.type, group=group.name, bytes=group.bytes, flops=group.flops, samples=samples,
                   failed=failed)


if __name__ == "__main__":
    main()
