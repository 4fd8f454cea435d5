"""The first seconds on a GPU: everything that could break the rest, one by one; then GPT-2 124M on the kernels.

    python -m benchmarks.gpu.smoke machine|ops|model [--json FILE] [--device cpu]

machine: the card, versions, which attention PyTorch takes, the products that our code relies on, and the limits of this card.
ops: each kernel launched once and compared with plain PyTorch; early launches; a captured step. model: losses and gradients of GPT-2
124M against the reference path, and captured steps against ordinary ones. Every check is one record, written at once, with the traceback
if it failed; the exit status is 1 if any failed.
"""
import argparse
import contextlib
import faulthandler
import importlib
import io
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from nanogpt_fast import GPT, GPTConfig, backend
from nanogpt_fast.bench import measure
from nanogpt_fast.bench.common import GPT2
from nanogpt_fast.ops import attention, cross_entropy, mlp, norm as norm_op
from nanogpt_fast.ops.adamw import OnePass
from nanogpt_fast.ops.hopper import attention as attention_hopper, mlp as mlp_hopper
from nanogpt_fast.training.step import TrainingStep

BF16 = torch.bfloat16


def relative(a, b):
    """L2 distance over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


# ------------------------------------------------------------------------------------------------------------- the machine


def card(device):
    return measure.environment() | {"query": measure.nvidia_smi(
        "name,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total")}


def versions(device):
    found = dict(cudnn=torch.backends.cudnn.version(), cuda=torch.version.cuda, fp_fusion=None)
    if device.type == "cuda":
        q = torch.randn(12, 12, 1024, 64, device=device, dtype=BF16, requires_grad=True)
        choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
        found["sdpa"] = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}.get(int(choice), str(choice))
    return found


def half_products_into_fp32(device):
    """The products of mlp.py and cross_entropy.py: half operands, an fp32 result, written and added to."""
    a, b = (torch.randn(256, 512, device=device, dtype=BF16) for _ in range(2))
    exact = a.double().t() @ b.double()
    out = torch.empty(512, 512, device=device)
    found = {"mm": relative(torch.mm(a.t(), b, out_dtype=torch.float32), exact)}
    torch.mm(a.t(), b, out_dtype=torch.float32, out=out)
    found["mm out="] = relative(out, exact)
    torch.addmm(out, a.t(), b, out_dtype=torch.float32, out=out)
    found["addmm out= itself"] = relative(out, 2 * exact)
    assert max(found.values()) < 1e-5, found
    return found


def limits(device):
    return measure.limits(device)


# --------------------------------------------------------------------------------------------------------------------- ops


def compared(fused, plain, exact):
    """{name: (our relative error, plain PyTorch's)}; ours at most three times as large."""
    errors = {name: (relative(fused[name], exact[name]), relative(plain[name], exact[name])) for name in exact}
    assert all(ours <= 3 * theirs + 1e-6 for ours, theirs in errors.values()), errors
    return errors


def three_ways(call, inputs, differentiate=0):
    """`compared` for call(inputs, backend) -> tensor or tuple, with the gradients of the inputs that require one."""
    found = []
    for choice, cast in (("fused", lambda t: t), ("reference", lambda t: t),
                          ("reference", lambda t: t.double() if t.is_floating_point() else t)):
        leaves = {name: cast(t.detach().clone()).requires_grad_(t.requires_grad) for name, t in inputs.items()}
        with torch.autocast(next(iter(inputs.values())).device.type, BF16, enabled=cast(torch.zeros(1)).dtype != torch.float64):
            results = call(leaves, choice)
        results = results if isinstance(results, tuple) else (results,)
        result = results[differentiate]
        torch.manual_seed(7)
        cotangent = torch.randn(result.shape, device=result.device).to(BF16).to(result.dtype)
        wanted = {name: t for name, t in leaves.items() if t.requires_grad}
        gradients = torch.autograd.grad(result, list(wanted.values()), cotangent)
        found.append({"out": result.detach()} | {f"d {name}": g for name, g in zip(wanted, gradients)})
    return compared(*found)


def leaf(device, *shape, dtype=BF16, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def parsed(call):
    return lambda t, name: call(t, backend.parse(name))


def attention_of(B, T, H, D, dropout_p=0.0, by=None):
    """by: the choice whose result is compared with the reference, instead of "fused"."""
    def run(device):
        if by:
            return three_ways(lambda t, name: attention.causal_attention_qkvpacked(
                t["qkv"], H, backend=backend.parse(by if name == "fused" else name)), {"qkv": leaf(device, B, T, 3 * H * D)})
        if dropout_p:       # the masks differ, so there is nothing to compare with; but the same seed gives the same bits
            qkv, found = leaf(device, B, T, 3 * H * D), []
            for _ in range(2):
                torch.manual_seed(3)
                out = attention.causal_attention_qkvpacked(qkv, H, dropout_p=dropout_p, backend=backend.parse("fused"))
                found.append((out, *torch.autograd.grad(out, qkv, torch.ones_like(out))))
            assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found))
            return "the same bits"
        call = parsed(lambda t, b: attention.causal_attention_qkvpacked(t["qkv"], H, backend=b))
        return three_ways(call, {"qkv": leaf(device, B, T, 3 * H * D)})
    return run


def on_hopper(check):
    """The check where the backward for Hopper runs; elsewhere the reason why it does not."""
    def run(device):
        reason = attention_hopper.why_not(device, BF16, attention_hopper.HEAD)
        return check(device) if reason is None else f"not run: {reason}"
    return run


def norm(device):
    call = parsed(lambda t, b: norm_op.add_layer_norm(
        t["x"], t["branch"], t["w"], t["b"], backend=b, out_dtype=BF16 if t["x"].dtype == torch.float32 else None))
    fp32 = torch.float32
    return three_ways(call, {"x": leaf(device, 512, 768, dtype=fp32), "branch": leaf(device, 512, 768),
                             "w": leaf(device, 768, dtype=fp32), "b": leaf(device, 768, dtype=fp32)}, differentiate=1)


def mlp_form(form, rows=512, C=768):
    def run(device):
        if form == "hopper" and (reason := mlp_hopper.why_not(device, BF16, C, 4 * C, "gelu")) is not None:
            return f"not run: {reason}"
        call = parsed(lambda t, b: mlp.gelu_mlp(**t, form=form, backend=b))
        return three_ways(call, {"x": leaf(device, rows, C), "w_fc": leaf(device, 4 * C, C, dtype=torch.float32, scale=0.03),
                                 "b_fc": leaf(device, 4 * C, dtype=torch.float32),
                                 "w_proj": leaf(device, C, 4 * C, dtype=torch.float32, scale=0.02),
                                 "b_proj": leaf(device, C, dtype=torch.float32)})
    return run


def loss(return_logits):
    def run(device):
        targets = torch.randint(0, 50304, (2048,), device=device)
        call = parsed(lambda t, b: cross_entropy.linear_cross_entropy(t["x"], t["w"], targets, return_logits=return_logits,
                                                                      backend=b)[0])
        return three_ways(call, {"x": leaf(device, 2048, 768), "w": leaf(device, 50304, 768, dtype=torch.float32, scale=0.03)})
    return run


def quiet_gpt(device, choice, seed=0, **changes):
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(**{**GPT2, **changes}), backend=choice).to(device)


SMALL = dict(n_layer=2, n_head=4, n_embd=256, vocab_size=1024, block_size=256)


def sharp_gpt(device):
    """A small GPT whose next tokens are far apart in probability."""
    model = quiet_gpt(device, "auto", **SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@contextlib.contextmanager
def without_early_launches():
    from nanogpt_fast.kernels import decode
    before, decode.launch_options = decode.launch_options, lambda x, early=True: {"DEPENDENT": True, "launch_pdl": False}
    try:
        yield
    finally:
        decode.launch_options = before


def greedy_text(device):
    """200 greedy tokens by the captured decode kernels, compared with a second run, one without early launches, and the reference."""
    model = sharp_gpt(device)
    idx = torch.randint(1024, (2, 8), device=device)
    ours = model.generate(idx, 200, temperature=0)
    again = model.generate(idx, 200, temperature=0)
    assert torch.equal(ours, again), "two runs differ"
    if device.type == "cuda":
        for rows in (1, 2):         # one row has kernels of its own, and they are launched early
            expected = model.generate(idx[:rows], 200, temperature=0)
            with without_early_launches():
                late = sharp_gpt(device).generate(idx[:rows], 200, temperature=0)
            assert torch.equal(expected, late), f"early launches change the text of {rows} rows"
    model.set_backend("reference")
    plain = model.generate(idx, 200, temperature=0, use_cache=False)
    equal = int((ours == plain).all(0).cumprod(0).sum()) - 8
    assert equal >= 100, f"{equal} of 200 tokens are the reference's"
    return f"{equal} of 200 tokens are the reference's"


@torch.no_grad()
def prefills(device):
    """Prompts run directly, captured and replayed: the same bits, and the reference's logits."""
    from nanogpt_fast import generation
    model, found = sharp_gpt(device), {}
    for rows in (1, 3):
        session = generation.session_of(model, rows)
        for T in (5, 64, 100, 256):
            idx = torch.randint(1024, (rows, T), device=device)
            lengths = torch.arange(T, T - rows, -1, device=device)
            ours = [session.prefill(idx, lengths).clone() for _ in range(4)]
            assert all(torch.equal(ours[0], other) for other in ours), f"{rows} rows of {T}: a replay differs"
            with backend.use("reference"):
                plain = torch.stack([model(row[None, :length])[0][0, -1] for row, length in zip(idx, lengths)])
            found[f"{rows} x {T}"] = relative(ours[0], plain)
        assert device.type == "cpu" or {key[1] for key in session.prefills} == {64, 128, 256}
    assert max(found.values()) < 1e-3, found
    return found


def early_launches(device):
    """One decoding step with and without early launches: the same bits, 300 times."""
    from nanogpt_fast.kernels import decode

    from nanogpt_fast import generation
    model = quiet_gpt(device, "auto", **SMALL).eval()
    with torch.no_grad():
        model.generate(torch.randint(1024, (1, 60), device=device), 20, temperature=0, rng="philox")
        step = generation.session_of(model, 1).native
        assert isinstance(step, decode.Decoder), f"no decoder: {step}"
        token, position = (torch.tensor([n], device=device) for n in (3, 70))
        expected = step(token, position).clone()
        equal = sum(torch.equal(step(token, position), expected) for _ in range(300))
        with without_early_launches():
            late = torch.equal(step(token, position), expected)
    assert equal == 300 and late, (equal, late)
    return "the same bits"


def steps(model, device, B, T, V, take, capture, dtype=BF16, network=None, accumulation=1):
    """The losses of `take` training steps as bench train runs them for our trainer, captured or not."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    x, y = torch.randint(V, (2, B, T), device=device, generator=torch.Generator(device).manual_seed(5))
    step = TrainingStep(model, optimizer, network, dtype=dtype, batch_shape=(B, T), not_captured=None if capture else "for comparison",
                        compiled=network is not None, accumulation=accumulation)
    return [step(lambda: (x, y)).item() for _ in range(take)]


def adamw(device):
    """Three steps in one pass, with clipping, and PyTorch's: weights and moments beside fp64, the copies and the counts exact."""
    sizes, sides = ((1, ), (768, ), (300, 257), (4097, 8192 if device.type == "cuda" else 3)), []
    for dtype in (torch.float32, torch.float32, torch.float64):
        generator = torch.Generator(device).manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size, device=device, generator=generator).to(dtype)) for size in sizes]
        groups = [dict(params=weights[::2], weight_decay=0.1), dict(params=weights[1::2], weight_decay=0.0)]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        copies = {p: p.detach().to(BF16) for p in weights[2:]}
        one_pass = OnePass(quiet_gpt(device, "fused", **SMALL), optimizer, copies) if not sides else None
        for seed in range(3):
            generator = torch.Generator(device).manual_seed(1 + seed)
            for p in weights:
                p.grad = torch.randn(p.shape, device=device, generator=generator).to(dtype)
            if one_pass is None:
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
            elif (reason := one_pass.why_not()) is not None:
                return f"not run: {reason}"
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
                one_pass.step((1.0 / (norm + 1e-6)).clamp(max=1.0))
        assert one_pass is None or all(torch.equal(copied, p.to(BF16)) for p, copied in copies.items())
        assert all(optimizer.state[p]["step"].item() == 3 for p in weights)
        sides.append({f"{name} {i}": tensor.detach() for i, p in enumerate(weights)
                      for name, tensor in dict(weight=p, **optimizer.state[p]).items()})
    return compared(*sides)


def embeddings(device):
    """PyTorch's bits forward; whole numbers added to a gradient, exactly: tokens that occur once, often, and in most places."""
    kernels = importlib.import_module("nanogpt_fast.kernels.embedding")
    V, C, B, T = (50304, 768, 12, 1024) if device.type == "cuda" else (300, 40, 3, 50)
    wte, wpe, index = torch.randn(V, C, device=device), torch.randn(T, C, device=device), torch.randint(V, (B, T), device=device)
    assert torch.equal(kernels.embed(index, wte, wpe), torch.nn.functional.embedding(index, wte) + wpe)
    for common in (0.0, 0.3, 1.0):
        index[torch.rand(B, T, device=device) < common] = 7
        dx, gradient = (torch.randint(-8, 9, shape, device=device).float() for shape in ((B, T, C), (V, C)))
        exact = gradient.double().index_add(0, index.flatten(), dx.view(-1, C).double())
        kernels.add_rows(gradient, index, dx)
        assert torch.equal(gradient.double(), exact), common
    return "the exact sums"


def captured_steps(device):
    found = []
    for capture in (False, True):
        found.append(steps(quiet_gpt(device, "auto", **SMALL), device, 40, 256, 1024, 8, capture, accumulation=2))
    assert max(abs(a - b) for a, b in zip(*found)) < 2e-3, found
    return dict(ordinary=found[0], captured=found[1], same_bits=found[0] == found[1])


def compiled_steps(device):
    """The trainer with --compile: compiled and captured."""
    plain = steps(quiet_gpt(device, "auto", **SMALL), device, 8, 256, 1024, 8, False)
    model = quiet_gpt(device, "auto", **SMALL)
    found = steps(model, device, 8, 256, 1024, 8, True, network=torch.compile(model))
    assert max(abs(a - b) for a, b in zip(plain, found)) < 5e-3, (plain, found)
    return dict(ordinary=plain, compiled=found)


def compiled_import(device):
    """nanoGPT's loop over the compiled model, which returns logits that nobody uses: the losses of the model as it is."""
    found = []
    for compiled in (False, True):
        model = quiet_gpt(device, "auto", **SMALL)
        network = torch.compile(model) if compiled else model
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        x, y = torch.randint(1024, (2, 8, 256), device=device, generator=torch.Generator(device).manual_seed(5))
        found.append([])
        for _ in range(6):
            with torch.autocast(device.type, BF16):
                _, loss = network(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*found)) < 5e-3 and found[1][-1] < found[1][0] - 0.1, found
    return dict(ordinary=found[0], compiled=found[1], loss=type(loss.grad_fn).__name__)


# ------------------------------------------------------------------------------------------------------------------- model


def gradients(model, x, y, dtype):
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        found = model(x, y, return_logits=False)[1]
    found.backward()
    return {"loss": found.detach()} | {name: p.grad for name, p in model.named_parameters()}


def whole_model(B):
    """GPT-2 124M (on a CPU a small GPT): loss and all gradients of the kernels in bf16 beside the reference path's, by their distance
    from fp32."""
    def run(device):
        shape = SMALL if device.type == "cpu" else GPT2
        x, y = torch.randint(shape["vocab_size"], (2, B, shape["block_size"]), device=device)
        model = quiet_gpt(device, "reference", **shape)
        with torch.no_grad():       # the residual branches are tiny at first: make a mix-up visible
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        exact = gradients(model, x, y, torch.float32)
        plain = gradients(model, x, y, BF16)
        model.set_backend("auto")
        ours = gradients(model, x, y, BF16)
        again = gradients(model, x, y, BF16)
        errors = {name: (relative(ours[name], exact[name]), relative(plain[name], exact[name])) for name in exact}
        worst = sorted(errors, key=lambda name: -errors[name][0] / max(errors[name][1], 1e-9))[:6]
        found = dict(loss=[t["loss"].item() for t in (ours, plain, exact)], worst={name: errors[name] for name in worst},
                     same_bits_again=all(torch.equal(ours[name], again[name]) for name in ours))
        assert all(a <= 2 * b + 1e-6 for name, (a, b) in errors.items() if name != "loss"), found
        return found
    return run


def whole_steps(B):
    def run(device):
        shape = SMALL if device.type == "cpu" else GPT2
        size = device, B, shape["block_size"], shape["vocab_size"], 8
        found = [steps(quiet_gpt(device, "auto", **shape), *size, capture) for capture in (False, True)]
        found.append(steps(quiet_gpt(device, "reference", **shape), *size, False))
        assert max(abs(a - b) for a, b in zip(found[0], found[1])) < 2e-2, found
        assert max(abs(a - b) for a, b in zip(found[0], found[2])) < 5e-2, found
        return dict(ordinary=found[0], captured=found[1], reference=found[2], same_bits=found[0] == found[1])
    return run


def small_loss(device):
    targets = torch.randint(0, 1003, (70,), device=device)
    call = parsed(lambda t, b: cross_entropy.linear_cross_entropy(t["x"], t["w"], targets, return_logits=False, backend=b)[0])
    return three_ways(call, {"x": leaf(device, 70, 64), "w": leaf(device, 1003, 64, dtype=torch.float32, scale=0.1)})


def small_sampler(device):
    from nanogpt_fast.ops import sampler
    logits, found = torch.randn(3, 1003, device=device), []
    for filters in (dict(temperature=0.8), dict(top_k=40), dict(top_p=0.9), dict(temperature=0.0)):
        ours, theirs = (sampler.sample(logits, seed=1, offset=3, backend=backend.parse(choice), **filters)
                        for choice in ("fused", "reference"))
        found.append(torch.equal(ours, theirs))
    assert all(found), found
    return "the definition's tokens"


CHECKS = {
    "small": {"attention": attention_of(1, 200, 2, 64), "attention, split form": attention_of(1, 200, 2, 32), "attention, head form": attention_of(70, 100, 2, 32),
              "loss": small_loss, "sampler": small_sampler, "add + LayerNorm": norm, "MLP, hopper": mlp_form("hopper", 300, 72)},
    "machine": {"card": card, "versions": versions, "half products into fp32": half_products_into_fp32, "limits": limits},
    "ops": {"attention, head form": attention_of(72, 512, 4, 32), "attention, split form": attention_of(2, 777, 4, 32), "attention, Hopper": on_hopper(attention_of(2, 777, 4, 64)),
            "attention, auto": attention_of(12, 1024, 12, 64, by="auto"),
            "attention, auto, one token": attention_of(4, 1, 12, 64, by="auto"),
            "attention, head size 128": attention_of(2, 300, 4, 128), "attention, dropout": attention_of(40, 256, 4, 64, 0.2),
            "add + LayerNorm": norm, "MLP, pointwise": mlp_form("pointwise"), "MLP, epilogue": mlp_form("epilogue"), "MLP, hopper": mlp_form("hopper"),
            "loss": loss(False), "loss with logits": loss(True), "AdamW": adamw, "embeddings": embeddings, "captured steps": captured_steps,
            "greedy text": greedy_text, "prefills": prefills, "early launches": early_launches, "compiled steps": compiled_steps,
            "compiled import": compiled_import},
    "model": {"GPT-2 124M, B=2": whole_model(2), "GPT-2 124M, B=12": whole_model(12), "GPT-2 124M steps, B=12": whole_steps(12)},
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=CHECKS)
    parser.add_argument("--json", default="smoke.jsonl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="checks whose name contains one of these words, separated by commas")
    parser.add_argument("--skip", type=int, default=0, help="not the first so many")
    args = parser.parse_args(argv)
    faulthandler.dump_traceback_later(45, repeat=True)      # a hang prints where
    device, failed = torch.device(args.device), []
    if backend.interpreted():
        from nanogpt_fast.kernels import interpreter
        interpreter.install_interpreter_patches()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    words = [word for word in args.only.split(",") if word]
    for number, (name, check) in enumerate(CHECKS[args.part].items()):
        if number < args.skip or words and not any(word in name for word in words):
            continue
        start, found, trace = time.perf_counter(), None, None
        torch.manual_seed(1)
        try:
            found = check(device)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            trace = traceback.format_exc().replace(f"{Path(__file__).parents[2]}/", "")
            failed.append(name)
        seconds = time.perf_counter() - start
        print(f"{name}: {'FAILED' if trace else 'right'}, {seconds:.1f} s: {trace or found}", flush=True)
        measure.append(args.json, "smoke", part=args.part, check=name, failed=trace, found=found, seconds=seconds)
        if trace and device.type == "cuda" and ("CUDA error" in trace or "Triton Error [CUDA]" in trace):
            # After a kernel's error this process cannot use the GPU any more: a new one runs the rest.
            again = [word for word in sys.argv[1:] if not word.startswith("--skip")]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.smoke", *again, f"--skip={number + 1}"])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
