"""`nanogpt-fast verify`: check that what runs on this machine computes the right numbers.

Every op, in every implementation that can run here, in each dtype, forward and backward, is compared with float64 on the same
inputs under the rule of `error_rule.py`: at most twice (gradients: three times) the error that plain PyTorch makes in that dtype,
and no bias. Then the whole GPT: logits, loss, the gradient of every parameter, and the losses of 20 training steps.

Without a GPU the Triton kernels run in Triton's interpreter, on small shapes, in a second process (Triton decides at import
whether it interprets); the C++ extension's CPU code, including the sampler, runs as it is. Each row that can't run here says why.
The exit status is 1 if any check fails.
"""
import contextlib
import copy
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass

import torch

from .. import backend as _backend, options, tables
from ..config import GPTConfig
from ..files import replacing
from ..generation import decode
from ..generation.session import Session
from ..model import GPT
from ..ops import attention, cross_entropy, linear, mlp, norm, sampler
from ..ops.hopper import mlp as mlp_hopper
from ..options import option
from .error_rule import measure

REFERENCE, FUSED = _backend.parse("reference"), _backend.parse("fused")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
STEPS = 20
MODULES = {"attention": attention, "layer_norm": norm, "linear": linear, "mlp": mlp, "cross_entropy": cross_entropy}
CHECKED = (*MODULES, "sample", "decode", "gpt")


@dataclass
class VerifyOptions:
    """Checks every op, in every implementation that this machine can run, against float64; then the whole GPT. Exit status 1 if
    any check fails."""
    quick: bool = option(False, "one shape per op: under a minute on two cores")
    only: str = option("", f"check only these, separated by commas: {', '.join(CHECKED)}")
    format: str = tables.format_option()
    json: str = option("", "also write the table to this file")


@dataclass
class Row:
    """One line of the table: one tensor of one op, or why there is none."""
    op: str
    implementation: str
    dtype: str
    shape: str
    direction: str              # which tensor: the name of a result, or "d " and the name of an input
    largest: float = 0.0        # absolute error
    relative: float = 0.0       # L2
    plain: float = 0.0          # plain PyTorch's relative error in this dtype
    bound: float = 0.0          # on `relative`
    bias: float = 0.0           # the mean error in standard errors
    result: str = "pass"        # "pass", "FAIL", or "-": not run here
    why: str = ""

    def cells(self):
        """The columns of HEAD."""
        start = (self.op, self.implementation, self.dtype, self.shape)
        if self.result == "-":
            return *start, f"not run here: {self.why}", "", "", "", "", "", ""
        result = self.result + (f": {self.why}" if self.why else "")
        if self.bound == 0.0:  # there are no numbers: tokens are equal or not, or the check raised
            return *start, self.direction, "", "", "", "", "", result
        numbers = [f"{value:.2e}" for value in (self.largest, self.relative, self.plain, self.bound)]
        return *start, self.direction, *numbers, f"{self.bias:.1f}", result


HEAD, ALIGN = ("op", "runs as", "dtype", "shape", "what", "largest", "relative", "PyTorch", "bound", "bias", "result"), "lllllrrrrrl"
WIDTHS = (13, 9, 5, 25, 28, 8, 8, 8, 8, 4, 4)       # of what comes; a row is printed as soon as it is known


def main(argv):
    """The command `nanogpt-fast verify`: prints the table, returns the exit status."""
    o = options.parse(VerifyOptions, argv, "nanogpt-fast verify")
    only = tuple(filter(None, o.only.split(",")))
    if unknown := set(only) - set(CHECKED):
        raise ValueError(f"--only={o.only}: there is no {min(unknown)!r}; expected some of {', '.join(CHECKED)}")
    if not torch.cuda.is_available() and not _backend.interpreted() and _backend.triton_import_error() is None:
        environment = {"TRITON_DEFAULT_FP_FUSION": "1", **os.environ, "TRITON_INTERPRET": "1"}  # Triton 3.9 warns if fusion is not set
        return subprocess.run([sys.executable, "-m", "nanogpt_fast", "verify", *argv], env=environment).returncode
    if _backend.interpreted() and (problem := _backend.triton_import_error()) is not None:
        raise RuntimeError(problem)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton_version(),
             "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
             "interpreted": _backend.interpreted(), "quick": o.quick}
    aside, lines = tables.aside(o.format), tables.Lines(HEAD, o.format, ALIGN, WIDTHS)
    print(f"PyTorch {about['torch']}, Triton {about['triton']}, {about['device']}"
          + (", Triton kernels in the interpreter" if _backend.interpreted() else "") + "\n", file=aside)
    print("\n".join(lines.head), flush=True)
    start, rows = time.perf_counter(), []
    for row in check(device, o.quick, only):
        print(lines.row(row.cells()), flush=True)
        rows.append(row)
    failed, skipped = (sum(row.result == result for row in rows) for result in ("FAIL", "-"))
    print(f"\n{len(rows) - skipped} checks in {time.perf_counter() - start:.0f} s, {failed} failed, "
          f"{skipped} could not run here", file=aside)
    if o.json:
        with replacing(o.json) as f:
            f.write(json.dumps({**about, "failed": failed, "rows": [asdict(row) for row in rows]}, indent=1).encode() + b"\n")
    return 1 if failed else 0


def _triton_version():
    if _backend.triton_import_error() is not None:
        return "none"
    import triton
    return triton.__version__


def check(device, quick, only=()):
    """Yields each row as soon as it is known. only: of CHECKED; empty means all."""
    _backend.load_local()
    for case in cases(device, quick):
        if not only or case.op in only:
            for name, dtype in itertools.product(implementations(case.op, device), DTYPES):
                yield from _survive(case.op, dtype, case.shape, check_op(case, name, dtype, device))
    for op, dtypes, function in (("sample", DTYPES, check_sampler), ("decode", DTYPES, check_decode), ("gpt", DTYPES[:2], check_gpt)):
        if not only or op in only:
            for dtype in dtypes:
                yield from _survive(op, dtype, "", function(dtype, device, quick))


def implementations(op, device):
    """The names of the implementations to check: NVIDIA's libraries on a GPU only, "cpp" (the extension's CPU code) on a CPU only; and
    the kernels that somebody registered."""
    elsewhere = ("cudnn", "cublas") if device.type == "cpu" else ("cpp",)
    return [name for name, _ in MODULES[op].CANDIDATES if name not in elsewhere] + list(_backend.own[op])


def _survive(op, dtype, shape, rows):
    """Yields the rows; an exception becomes a failed row, since a kernel that can't compile or launch must not end the other checks."""
    try:
        yield from rows
    except Exception as error:
        yield Row(op=op, implementation="", dtype=NAMES[dtype], shape=shape, direction="", result="FAIL",
                  why=f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------------------------ the ops


@dataclass
class Case:
    """An op on one shape, as a training step under autocast calls it.

    make(half): {name: tensor}; half(tensor) casts what arrives in the low precision, the others are fp32 (parameters, the
    residual). call(inputs, backend): {name: result}. differentiate: which results get a gradient in the backward; None means all.
    stored(inputs in fp64, dtype): {name: the argument `stored` of `error_rule.measure`}, or None.
    """
    op: str
    shape: str
    make: object
    call: object
    differentiate: tuple | None = None
    stored: object = None


def cases(device, quick):
    """The shapes: those of a training step on a GPU; small ones in the interpreter, where a program takes milliseconds."""
    gpu = device.type == "cuda"

    def randn(*shape):
        return torch.randn(*shape, device=device)

    def attention_case(B, T, H, D):
        return Case("attention", f"B={B} T={T} H={H} D={D}", lambda half: {"qkv": half(randn(B, T, 3 * H * D))},
                    lambda t, backend: {"out": attention.causal_attention_qkvpacked(t["qkv"], H, backend=backend)})

    def layer_norm_case(rows, C, bias=True):
        def call(t, backend):
            x, y = norm.add_layer_norm(t["x"], t["branch"], t["weight"], t.get("bias"), backend=backend)
            return {"x": x, "y": y}

        def make(half):
            vectors = {"weight": 1 + 0.1 * randn(C), "bias": 0.1 * randn(C)}
            return {"x": randn(1, rows, C), "branch": half(randn(1, rows, C)), **(vectors if bias else {"weight": vectors["weight"]})}
        return Case("layer_norm", f"rows={rows} C={C}" + " no bias" * (not bias), make, call)

    def linear_case(rows, C):
        def call(t, backend):   # with a copy of the weight, as the trainer keeps one
            return {"out": linear.linear(**t, copy=t["weight"].detach().to(t["x"].dtype), backend=backend)}
        return Case("linear", f"rows={rows} C={C}", lambda half: {
            "x": half(randn(rows, C)), "weight": randn(3 * C, C) / C**0.5, "bias": 0.1 * randn(3 * C)}, call)

    def mlp_case(rows, C, form):
        return Case("mlp", f"rows={rows} C={C} {form}", lambda half: {
            "x": half(randn(1, rows, C)), "w_fc": randn(4 * C, C) / C**0.5, "b_fc": 0.1 * randn(4 * C),
            "w_proj": randn(C, 4 * C) / (4 * C)**0.5, "b_proj": 0.1 * randn(C)},
            lambda t, backend: {"out": mlp.gelu_mlp(**t, form=form_in(t["x"], form), backend=backend, copies=tuple(
                t[name].detach().to(t["x"].dtype) for name in ("w_fc", "w_proj")))})

    def form_in(x, form):   # the form for Hopper computes in half precision only
        half = torch.is_autocast_enabled(device.type) or x.dtype in mlp_hopper.DTYPES
        return form if half or form != "hopper" else "pointwise"

    hopper = mlp_hopper.why_not(device, torch.bfloat16, 768, 3072, "gelu") is None
    forms = [form for form in mlp.FORMS if hopper or form != "hopper"]

    def cross_entropy_case(rows, C, V, return_logits):
        targets = torch.randint(0, V, (rows,), device=device)
        targets[::7] = -1
        fixed = dict(targets=targets, return_logits=return_logits)

        def call(t, backend):
            loss, logits = cross_entropy.linear_cross_entropy(**t, **fixed, backend=backend)
            return {"loss": loss, "logits": logits} if return_logits else {"loss": loss}

        def stored(t, dtype):   # the kernel stores the unscaled dlogits, softmax - 1 at the target, in the buffer of the logits
            dlogits = torch.softmax(t["x"] @ t["weight"].t(), 1)
            dlogits[torch.arange(rows, device=device), targets.clamp(min=0)] -= 1
            dlogits[targets < 0] = 0
            dlogits, n = dlogits.to(dtype), (targets >= 0).sum()
            return {"d x": products(dlogits, t["weight"], n), "d weight": products(dlogits.t(), t["x"], n)}

        def products(a, b, n):  # exact sums explain d weight on an H100, sums on its tensor cores explain d x
            exact = a.double() @ b / n
            if gpu and a.dtype in mlp_hopper.DTYPES:
                return exact, torch.mm(a, b.to(a.dtype), out_dtype=torch.float32).double() / n
            return exact

        return Case("cross_entropy", f"rows={rows} C={C} V={V}" + " logits" * return_logits, lambda half: {
            "x": half(randn(rows, C)), "weight": randn(V, C) / C**0.5}, call, ("loss",), stored)

    if gpu:
        yield from (attention_case(4, 1024, 12, 64), attention_case(2, 777, 4, 128))
        yield from (layer_norm_case(8192, 768), layer_norm_case(8192, 768, bias=False))
        yield from (mlp_case(4096, 768, form) for form in forms)
        # 8,192 rows are two chunks. Fewer columns where the logits themselves are compared: eight fp64 copies of them are alive.
        yield from (cross_entropy_case(8192, 768, 5003 if logits else 50304, logits) for logits in (False, True))
        if quick:
            return
    # the smallest that runs on a CPU's AMX tiles in every dtype
    on_tiles = (linear_case(256, 128), mlp_case(256, 128, "pointwise"), cross_entropy_case(256, 128, 130, return_logits=False))
    if quick:
        yield attention_case(1, 65, 2, 32)
        yield layer_norm_case(24, 96)
        yield from (mlp_case(70, 32, form) for form in forms)
        yield from (cross_entropy_case(21, 32, 257, return_logits) for return_logits in (False, True))
        yield from on_tiles
        return
    yield from (attention_case(1, T, 2, D) for T, D in ((1, 64), (65, 32), (129, 64), (130, 128), (70, 80)))
    yield from (layer_norm_case(rows, C) for rows, C in ((1, 768), (24, 96), (9, 1600)))
    yield layer_norm_case(40, 768, bias=False)
    yield from (mlp_case(rows, C, form) for rows, C in ((1, 32), (70, 32), (130, 72)) for form in forms)
    yield from (cross_entropy_case(rows, 32, V, return_logits)
                for rows, V in ((1, 1000), (50, 65), (21, 257), (5, 50304)) for return_logits in (False, True))
    yield from on_tiles


def check_op(case, name, dtype, device):
    """Rows of one case in one implementation and dtype: every result and every gradient."""
    torch.manual_seed(zlib.crc32(f"{case.op} {case.shape}".encode()))  # the same inputs in each run and each dtype
    inputs = case.make(lambda tensor: tensor.to(dtype))
    autocast = dtype if dtype != torch.float32 else None
    start = dict(op=case.op, dtype=NAMES[dtype], shape=case.shape)
    leaves = {key: t.detach().requires_grad_() for key, t in inputs.items()}
    ours = _backend.parse({case.op: name})
    implementation, reasons = chosen(case.op, lambda: case.call(leaves, ours), device, autocast, ours)
    if implementation == "reference":
        yield Row(implementation=name, direction="", result="-", why="; ".join(reasons) or "there is no kernel", **start)
        return
    plain, cotangents = evaluate(case, inputs, REFERENCE, device, autocast)
    exact, _ = evaluate(case, {name: t.double() for name, t in inputs.items()}, REFERENCE, device, None, cotangents)
    found, _ = evaluate(case, inputs, ours, device, autocast, cotangents)
    stored = case.stored({name: t.double() for name, t in inputs.items()}, dtype) if case.stored else {}
    for name in exact:
        mean = dict(dtype=dtype, averaged=inputs["x"].size(0)) if name == "loss" else {}
        kind = "gradient" if name in _gradient_names(inputs) else "forward"
        measured = measure(found[name], exact[name], plain[name], kind, stored=stored.get(name), **mean)
        yield Row(implementation=implementation, direction=name, **_numbers(measured),
                  result="FAIL" if measured.problem else "pass", why=measured.problem or "", **start)


def _numbers(measured):
    return dict(largest=measured.largest, relative=measured.relative, plain=measured.plain_relative, bound=measured.bound,
                bias=measured.bias)


def _gradient_names(inputs):
    return [f"d {name}" for name in inputs]


def chosen(op, call, device, autocast, choice="fused"):
    """(implementation that `call()` would take under this choice, the reasons against the others); launches no kernel."""
    with _backend.use(choice), _backend.recording() as record, _autocast(device, autocast):
        call()
    return next(((name, reasons) for named, _, name, reasons in record if named == op), ("reference", []))


def _autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def evaluate(case, inputs, backend, device, autocast, cotangents=None):
    """({name: result or gradient}, {name of a result: its cotangent, the gradient that went into its backward}).

    cotangents=None draws them, as numbers that the low precision represents exactly, so that all three evaluations get the same
    ones.
    """
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    with _autocast(device, autocast):
        results = case.call(leaves, backend)
    sources = {name: t for name, t in results.items() if case.differentiate is None or name in case.differentiate}
    if cotangents is None:
        cotangents = {name: torch.randn_like(t, dtype=torch.float32).to(torch.bfloat16) if t.dim() else torch.ones_like(t)
                      for name, t in sources.items()}
    gradients = torch.autograd.grad(list(sources.values()), list(leaves.values()),
                                    [cotangents[name].to(t.dtype) for name, t in sources.items()])
    found = {name: t.detach() for name, t in results.items()}
    return found | dict(zip(_gradient_names(inputs), gradients)), cotangents


# -------------------------------------------------------------------------------------------------------------- the sampler


def check_sampler(dtype, device, quick):
    """Rows of the sampler: every one of the extension's tokens must equal that of the definition in PyTorch."""
    rows, V = (16, 1000) if quick else (64, 50304)
    torch.manual_seed(zlib.crc32(b"sample"))
    logits = (torch.randn(rows, V, device=device) * 3).to(dtype)
    start = dict(op="sample", dtype=NAMES[dtype], shape=f"rows={rows} V={V}")
    implementation, reasons = chosen("sample", lambda: sampler.sample(logits[:1], seed=0, backend=FUSED), device, None)
    if implementation == "reference":
        yield Row(implementation="-", direction="", result="-", why="; ".join(reasons) or "there is no kernel", **start)
        return
    for name, filters in (("temperature", dict(temperature=0.8)), ("top-k", dict(top_k=40)), ("top-p", dict(top_p=0.9)),
                          ("min-p", dict(min_p=0.05)), ("all three", dict(temperature=1.3, top_k=200, top_p=0.95, min_p=0.01)),
                          ("greedy", dict(temperature=0.0))):
        ours, theirs = (sampler.sample(logits, seed=1, offset=3, backend=backend, **filters) for backend in (FUSED, REFERENCE))
        equal = int((ours == theirs).sum())
        yield Row(implementation=implementation, direction=f"tokens, {name}", largest=rows - equal,
                  result="pass" if equal == rows else "FAIL", why=f"{equal} of {rows} tokens are the definition's", **start)


# ---------------------------------------------------------------------------------------------------------------- decoding


def check_decode(dtype, device, quick):
    """Rows of a decoding step: the next token's logits, by a cache that holds prompts of several lengths, in every implementation."""
    large = device.type == "cuda"
    config = GPTConfig(block_size=256, vocab_size=1000, n_layer=4, n_head=4, n_embd=256) if large \
        else GPTConfig(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=64)
    torch.manual_seed(zlib.crc32(b"decode"))
    model = _build(config, "auto").to(device).eval()
    for rows in (2, 8) if large or not quick else (2,):         # on a GPU other kernels from 3 rows on
        lengths = torch.randint(1, config.block_size, (rows,), device=device)
        tokens = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
        start = dict(op="decode", dtype=NAMES[dtype], shape=f"rows={rows} L={config.n_layer} T={config.block_size} C={config.n_embd}")
        exact, plain = (_next_logits(model, tokens, lengths, cast, device) for cast in (torch.float64, dtype))
        for name, why_not in decode.CANDIDATES:
            if name == "cpp" and large:
                continue
            if (reason := why_not(_session(model, rows, dtype, "reference"))) is not None:
                yield Row(implementation=name, direction="", result="-", why=reason, **start)
                continue
            session = _session(model, rows, dtype, f"decode={name}")
            with _backend.use("reference"):
                session.prefill(tokens, lengths)
            session.feed(tokens[torch.arange(rows, device=device), lengths], lengths)
            # A row's errors come from one hidden state: too few observations for a bias.
            measured = measure(session.decode(config.block_size), exact, plain, "forward", check_bias=False)
            yield Row(implementation=name, direction="logits", **_numbers(measured), result="FAIL" if measured.problem else "pass",
                      why=measured.problem or "", **start)


@torch.no_grad()
def _session(model, rows, dtype, choice):
    with _backend.use(choice):
        session = Session(model, rows, dtype)
    session.refresh()
    return session


@torch.no_grad()
def _next_logits(model, tokens, lengths, dtype, device):
    """Of the whole model on plain PyTorch: each row's logits after the token at its length."""
    model = copy.deepcopy(model).double() if dtype == torch.float64 else model
    with _backend.use("reference"), _autocast(device, dtype if dtype in (torch.bfloat16, torch.float16) else None):
        return torch.cat([model(row[None, :length + 1])[0][:, -1] for row, length in zip(tokens, lengths.tolist())])


# ------------------------------------------------------------------------------------------------------------ the whole GPT

# Allowed multiples of the reference path's own error, in L2. In fp32 both errors are a few roundings, so the ops' factors apply.
GPT_FACTOR = {torch.float32: {"forward": 2.0, "gradient": 3.0}, torch.bfloat16: {"forward": 1.2, "gradient": 2.0}}


def check_gpt(dtype, device, quick):
    """Rows of a small GPT on all kernels: logits, loss, every gradient, and 20 losses of training with AdamW."""
    if device.type == "cuda":
        config = GPTConfig(block_size=256, vocab_size=1000, n_layer=4, n_head=4, n_embd=256)
    elif quick:
        config = GPTConfig(block_size=12, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    else:
        config = GPTConfig(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=64)
    shape = f"L={config.n_layer} T={config.block_size} C={config.n_embd} V={config.vocab_size}"
    start = dict(op="gpt", dtype=NAMES[dtype], shape=shape)
    autocast = dtype if dtype != torch.float32 else None
    torch.manual_seed(zlib.crc32(b"gpt"))
    B = 8 if device.type == "cuda" else 2
    tokens = torch.randint(0, config.vocab_size, (STEPS, B, config.block_size + 1), device=device)
    plain = _build(config, "reference").to(device)
    exact, fused = _build(config, "reference").to(device).double(), _build(config, "fused").to(device)
    exact.load_state_dict(plain.state_dict()), fused.load_state_dict(plain.state_dict())
    if why_not := _kernels_why_not(fused, tokens[0], device, autocast):
        yield Row(implementation="-", direction="", result="-", why=why_not, **start)
        return

    def rows(kind, found, oracle, reference):
        for name in oracle:
            mean = dict(dtype=dtype, averaged=B * config.block_size) if "loss" in name else {}
            measured = measure(found[name], oracle[name], reference[name], kind, check_bias=False,
                               factor=GPT_FACTOR[dtype][kind], **mean)
            wrong = not measured.relative <= measured.bound
            yield Row(implementation="fused", direction=name, **_numbers(measured), result="FAIL" if wrong else "pass",
                      why=measured.problem or "" if wrong else "", **start)

    three = [(fused, autocast), (exact, None), (plain, autocast)]
    yield from rows("forward", *({name: t for name, t in zip(("logits", "loss"), _forward(model, tokens[0], device, cast))}
                                 for model, cast in three))
    yield from rows("gradient", *(_gradients(model, tokens[0], device, cast) for model, cast in three))
    yield from rows("forward", *({f"losses of {STEPS} steps": _train(model, tokens, device, cast)} for model, cast in three))


def _build(config, backend):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        return GPT(config, backend=backend)


def _kernels_why_not(model, tokens, device, autocast):
    """Why the model can't run on kernels alone, or "" if it can."""
    with _backend.recording() as record, _autocast(device, autocast), torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:])
    return "; ".join(dict.fromkeys(f"{op}: {', '.join(reasons) or 'there is no kernel'}" for op, _, name, reasons in record
                                   if name == "reference"))


def _forward(model, tokens, device, autocast):
    with _autocast(device, autocast):
        return model(tokens[:, :-1], tokens[:, 1:].contiguous())


def _gradients(model, tokens, device, autocast):
    _, loss = _forward(model, tokens, device, autocast)
    names, parameters = zip(*model.named_parameters())
    return {f"d {name.removeprefix('transformer.')}": g for name, g in zip(names, torch.autograd.grad(loss, parameters))}


def _train(model, tokens, device, autocast):
    """The losses of AdamW steps, one step per batch of tokens, as one tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in tokens:
        _, loss = _forward(model, batch, device, autocast)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)
