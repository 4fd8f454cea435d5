"""What competes: for each op of a GPT, forward and backward apart, the implementations, forms and tiles that could be the fastest.

An entry is the Rows that would be kept if it won, and `run` is the op itself: what is timed is what will run. Tiles come first, forms next,
the whole op against plain PyTorch last, so that each contest runs with the winners of those before it.
"""
import functools
import math
from dataclasses import dataclass

import torch

from .. import backend, reference
from ..kernels import fastest
from ..kernels.fastest import Row, Tile
from ..ops import attention, cross_entropy, linear, mlp, norm, sampler
from .contest import Contest

PYTORCH = "PyTorch"
AUTO, TRITON = backend.parse("auto"), backend.parse("attention=triton")
NEAR = math.sqrt(2)     # rows count for as many tokens, and sequences as long, up to this factor

# Beside the shipped tile. (queries, keys, warps, stages)
FORWARD = ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4), (128, 64, 4, 2),
           (128, 64, 8, 2), (256, 64, 8, 2), (32, 32, 4, 2))
DQ = ((64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3), (32, 32, 4, 3), (64, 16, 4, 4), (64, 32, 4, 2))
DKDV = ((32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 2), (32, 128, 4, 3), (16, 64, 4, 4), (64, 32, 4, 3), (32, 64, 4, 2))
HEAD = ((64, 128, 8, 3), (32, 128, 8, 2), (128, 128, 8, 2))
MATMUL = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4))
LOSS = ((8192, 16), (4096, 8), (4096, 16), (8192, 8), (16384, 16), (2048, 8), (1024, 4))
CHUNKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Shape:
    """What the contests depend on. B sequences of T tokens; rows: sequences that are generated at a time, 0 for training."""
    B: int
    T: int
    C: int
    H: int
    V: int
    layers: int
    bias: bool
    dropout: float
    dtype: torch.dtype
    device: str             # "cuda", "cuda:1" or "cpu"
    cuda: bool              # whether a GPU's kernels compete
    rows: int = 0

    @property
    def number(self):
        """Of the device, in the table."""
        return torch.device(self.device).index or 0 if self.cuda else fastest.CPU

    @property
    def tokens(self):
        return self.B * self.T

    def where(self, size, tokens=None, length=None, dropout=False):
        """The limits of a measured row: this card, this dtype and size, about as many tokens, about as long sequences."""
        arch, card = fastest.place(self.number)
        near = lambda n: fastest.ANY if n is None else (math.ceil(n / NEAR), math.floor(n * NEAR))
        return dict(card=card, arch=(arch, arch), dtype=fastest.column(self.dtype, dropout), size=(size, size), tokens=near(tokens), length=near(length))


def contests(shape):
    """All contests of a shape, in the order in which they are to be decided."""
    if shape.rows:
        return list(_generation(shape))
    return [*_attention(shape), *_layer_norm(shape), *_mlp(shape), *_loss(shape)]


def implementations(op, module, args, what, where, wanted=None):
    """{current, entries} for a Contest: an entry for each implementation of an op that can run with these arguments, and plain PyTorch."""
    def current():
        with backend.recording() as record:
            backend.choose(op, module.CANDIDATES, AUTO, args, module.row_for)
        return labels.get(record[0][2], record[0][2])
    able = [name for name, why_not in (*module.CANDIDATES, *backend.own[op].items()) if why_not(*args) is None]
    labels = {name: name for name in able if wanted is None or name in wanted} | {"reference": PYTORCH}
    return dict(current=current, entries={label: (Row(what, name, **where),) for name, label in labels.items()})


def graph(forward, leaves, gradient):
    """A run that computes gradients alone: the graph is built once for each entry, by `forward`, under the entry's rows."""
    def run(t):
        if "graph" not in t:
            t["graph"] = forward(t)
        wanted = [t[name] for name in leaves if t.get(name) is not None]
        return torch.autograd.grad(t["graph"], wanted, t[gradient] if gradient else None, retain_graph=True)
    return run


def together(forward, leaves, gradient):
    """A run of forward and backward."""
    def run(t):
        wanted = [t[name] for name in leaves if t.get(name) is not None]
        return torch.autograd.grad(forward(t), wanted, t[gradient] if gradient else None)
    return run


def as_trained(shape):
    """Decorates a function: it runs under the autocast of a training step."""
    kind = "cuda" if shape.device.startswith("cuda") else "cpu"
    return torch.autocast(kind, dtype=shape.dtype, enabled=shape.dtype != torch.float32)


def forward_only(forward):
    return lambda t: (forward(t).detach(),)


def _new(shape, dtype):
    return functools.partial(_draw, dtype, shape.device)


def _draw(dtype, device, *size, scale=1.0, grad=True):
    return torch.randn(size, device=device).mul_(scale).to(dtype).requires_grad_(grad)


def _tiles(what, listed, shape, where, also=()):
    """{current, entries}: an entry for each tile. also: rows that every entry has, without which it is not what runs now."""
    middle = lambda limits: 0 if limits == fastest.ANY else sum(limits) // 2

    def found(row, limits):
        return fastest.find(row.what, shape.number, row.dtype, size=limits["size"][0], tokens=middle(limits["tokens"]), length=middle(limits["length"]))

    def current():
        others = all((now := found(row, where)) is not None and now.use == row.use for row in also)
        now = found(Row(what, dtype=where["dtype"]), where)
        return str(now.tile) if others and now is not None else ""
    return dict(current=current, entries={str(tile): (Row(what, tile=tile, **where), *also) for tile in listed})


# -------------------------------------------------------------------------------------------------------------------- attention


def _attention(shape):
    B, T, C, H, p = shape.B, shape.T, shape.C, shape.H, shape.dropout
    D, dropout = C // H, p > 0
    where = shape.where(D, shape.tokens, T, dropout)

    def make():
        torch.manual_seed(0)
        new = _new(shape, shape.dtype)
        return dict(qkv=new(B, T, 3 * C), do=new(B, T, C, grad=False), seed=torch.tensor([1], device=shape.device))

    @as_trained(shape)
    def forward(t, choice=None):
        return attention.causal_attention_qkvpacked(t["qkv"], H, dropout_p=p, seed=t["seed"] if dropout else None, backend=choice or AUTO)

    def plain(t):
        if dropout:     # the seed makes all our tiles draw one mask; PyTorch draws another
            return forward(t, TRITON)
        return reference.causal_attention_qkvpacked(t["qkv"], H)
    name = f"{B}x{T} tokens, {H} heads of {D}, {str(shape.dtype)[6:]}" + f", dropout {p}" * dropout
    both = dict(make=make, dtype=shape.dtype, calls=shape.layers, unlike=frozenset((PYTORCH,)) if dropout else frozenset())
    forwards = dict(run=forward_only(forward), expected=forward_only(plain), **both)
    backwards = dict(run=graph(forward, ["qkv"], "do"), expected=graph(plain, ["qkv"], "do"), **both)
    whole = [Row("attention training", "triton", **where)]
    peer = {PYTORCH: (Row("attention training", "reference", **where),)}
    args = (_draw(shape.dtype, shape.device, 1, 1, 3 * C).expand(B, T, -1), shape.dtype, D, None, p)
    if shape.cuda and attention._why_not(*args) is None:
        listed = lambda rows: [Tile(M, N, 0, warps, stages) for M, N, warps, stages in rows]
        tiles = _tiles("attention forward tile", listed(FORWARD), shape, where, whole)
        if attention._cudnn_why_not(*args) is None:
            tiles["entries"]["cudnn"] = (Row("attention training", "cudnn", **where),)
        tiles["entries"] |= peer
        yield Contest(f"attention forward: {name}", "attention forward", never=frozenset((PYTORCH,)), **tiles, **forwards)
        split = Row("attention backward", "split", **where)
        for kernel, title, rows in (("dkdv", "dk, dv", DKDV), ("dq", "dq", DQ)):
            tiles = _tiles(f"attention {kernel} tile", listed(rows), shape, where, [split])
            yield Contest(f"attention {title}: {name}", f"attention {title}", **tiles, **backwards)
        entries = {"split": (split,), "hopper": (Row("attention backward", "hopper", **where),)}
        entries |= {f"head {tile}": (Row("attention head tile", tile=tile, **where), Row("attention backward", "head", **where)) for tile in listed(HEAD)}
        current = lambda: attention._backward_form(args[0], D, None, p, B, T) or ""
        yield Contest(f"attention backward: {name}", "attention backward", current=current, entries=entries | peer, never=frozenset((PYTORCH,)), **backwards)
    yield Contest(f"attention training: {name}", "attention, training", run=together(forward, ["qkv"], "do"),
                  expected=together(plain, ["qkv"], "do"), **implementations("attention", attention, args, "attention training", where), **both)


# -------------------------------------------------------------------------------------------------------------------- LayerNorm


def _layer_norm(shape):
    B, T, rows, C = shape.B, shape.T, shape.tokens, shape.C
    where = shape.where(C, rows)

    def make():
        torch.manual_seed(0)
        stream, new = _new(shape, torch.float32), _new(shape, shape.dtype)
        return dict(x=stream(B, T, C), branch=new(B, T, C), weight=stream(C), bias=stream(C) if shape.bias else None, dy=new(B, T, C, grad=False))

    @as_trained(shape)
    def forward(t):
        return norm.add_layer_norm(t["x"], t["branch"], t["weight"], t["bias"], backend=AUTO)[1]

    def plain(t):
        return reference.add_layer_norm(t["x"], t["branch"], t["weight"], t["bias"])[1].to(shape.dtype)
    name, leaves = f"{rows} rows of {C}, {str(shape.dtype)[6:]}", ["x", "branch", "weight", "bias"]
    both = dict(make=make, dtype=shape.dtype, calls=2 * shape.layers)
    if shape.cuda:
        for pass_, run in (("forward", forward_only), ("backward", lambda f: graph(f, leaves, "dy"))):
            tiles = [Tile(M, num_warps=warps) for M, warps in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 1), (4, 4), (8, 1))]
            yield Contest(f"layer_norm {pass_}: {name}", f"add + LayerNorm {pass_}", run=run(forward), expected=run(plain),
                          **_tiles(f"layer_norm {pass_} tile", tiles, shape, {**where, "dtype": ""}), **both)
    row, weight = _draw(shape.dtype, shape.device, 1, 1, C).expand(B, T, C), _draw(torch.float32, shape.device, C)
    entries = implementations("layer_norm", norm, (row.float(), weight, weight if shape.bias else None, row, shape.dtype), "layer_norm", where)
    yield Contest(f"layer_norm training: {name}", "add + LayerNorm, training", run=together(forward, leaves, "dy"), expected=together(plain, leaves, "dy"),
                  **entries, **both)


# -------------------------------------------------------------------------------------------------------------------------- MLP


def _mlp(shape):
    rows, C = shape.tokens, shape.C
    where = shape.where(C, rows)
    inner = where | dict(size=(4 * C, 4 * C))       # a tile's size: the product's columns

    def make():
        torch.manual_seed(0)
        new, vector = _new(shape, shape.dtype), _new(shape, torch.float32)
        w_fc, w_proj = vector(4 * C, C, scale=C ** -0.5), vector(C, 4 * C, scale=C ** -0.5 / 2)
        return dict(x=new(shape.B, shape.T, C), w_fc=w_fc, w_proj=w_proj, dy=new(shape.B, shape.T, C, grad=False), b_fc=vector(4 * C) if shape.bias else None,
                    b_proj=vector(C) if shape.bias else None, copies=tuple(w.detach().to(shape.dtype) for w in (w_fc, w_proj)))
    leaves = ["x", "w_fc", "b_fc", "w_proj", "b_proj"]

    @as_trained(shape)
    def forward(t):
        return mlp.gelu_mlp(*(t[name] for name in leaves), copies=t["copies"], backend=AUTO)

    @as_trained(shape)
    def plain(t):
        w_fc, w_proj = (linear.cast(t[name], copy) for name, copy in zip(("w_fc", "w_proj"), t["copies"]))
        return reference.gelu_mlp(t["x"], w_fc, t["b_fc"], w_proj, t["b_proj"])
    name = f"{rows} rows of {C}, {str(shape.dtype)[6:]}"
    both = dict(make=make, dtype=shape.dtype, calls=shape.layers)
    given = make()
    args = [given["x"], *(None if given[name] is None else given[name].to(shape.dtype) for name in leaves[1:])]      # no autocast here
    if shape.cuda and mlp._triton_why_not(*args) is None:
        for pass_, run in (("forward", forward_only), ("backward", lambda f: graph(f, leaves, "dy"))):
            form = lambda use: Row(f"mlp {pass_}", use, **where)
            entries = {use: (form(use),) for use in ("pointwise", "hopper")}
            entries |= {f"epilogue {tile}": (Row(f"mlp {pass_} tile", tile=tile, **inner), form("epilogue")) for tile in map(Tile._make, MATMUL)}
            if mlp._hopper_why_not(args[0], args[1], "gelu") is not None:
                del entries["hopper"]
            current = functools.partial(_form, shape, pass_ == "backward", () if "hopper" in entries else ("hopper",))
            yield Contest(f"mlp {pass_}: {name}", f"MLP {pass_}", run=run(forward), expected=run(plain), current=current, entries=entries, **both)
    if not shape.cuda:      # there the op is two Linears of the trainer's, with copies of their weights
        yield from _linear(shape)
    entries = implementations("mlp", mlp, args, "mlp", where, None if shape.cuda else backend.own["mlp"])
    if len(entries["entries"]) > 1:
        yield Contest(f"mlp training: {name}", "MLP, training", run=together(forward, leaves, "dy"), expected=together(plain, leaves, "dy"),
                      **entries, **both)


def _form(shape, backward, without):
    return mlp.listed_forms(shape.number, fastest.column(shape.dtype), shape.C, shape.tokens, shape.bias, without)[backward]


def _linear(shape):
    """On a CPU: the trainer's Linear layers by their number of inputs, those of the MLP standing for all."""
    rows, C = shape.tokens, shape.C
    for inputs, outputs in ((C, 4 * C), (4 * C, C)):
        def make(inputs=inputs, outputs=outputs):
            torch.manual_seed(0)
            weight = _draw(torch.float32, "cpu", outputs, inputs, scale=inputs ** -0.5)
            return dict(x=_draw(shape.dtype, "cpu", rows, inputs), weight=weight, copy=weight.detach().to(shape.dtype),
                        dy=_draw(shape.dtype, "cpu", rows, outputs, grad=False))

        @as_trained(shape)
        def forward(t):
            return linear.linear(t["x"], t["weight"], None, copy=t["copy"], backend=AUTO)

        def plain(t):
            return torch.nn.functional.linear(t["x"], linear.cast(t["weight"], t["copy"]))
        where = shape.where(inputs)
        given = make()
        entries = implementations("linear", linear, (given["weight"], given["copy"]), "linear", where)
        if len(entries["entries"]) > 1:
            yield Contest(f"linear training: {rows} rows of {inputs} to {outputs}, {str(shape.dtype)[6:]}", f"Linear of {inputs} inputs", make=make,
                          run=together(forward, ["x", "weight"], "dy"), expected=together(plain, ["x", "weight"], "dy"), dtype=shape.dtype,
                          calls=shape.layers, **entries)


# ------------------------------------------------------------------------------------------------------------------------- loss


def _loss(shape):
    rows, C, V = shape.tokens, shape.C, shape.V
    where = shape.where(V, rows)

    def make():
        torch.manual_seed(0)
        new = _new(shape, shape.dtype)
        weight = _draw(torch.float32, shape.device, V, C, scale=C ** -0.5)
        return dict(x=new(rows, C), weight=weight, copy=weight.detach().to(shape.dtype), targets=torch.randint(0, V, (rows,), device=shape.device))

    @as_trained(shape)
    def forward(t):
        return cross_entropy.linear_cross_entropy(t["x"], t["weight"], t["targets"], return_logits=False, copy=t["copy"], backend=AUTO)[0]

    @as_trained(shape)
    def plain(t):
        return reference.linear_cross_entropy(t["x"], linear.cast(t["weight"], t["copy"]), t["targets"])[0]
    name, leaves = f"{rows} rows of {C}, {V} tokens, {str(shape.dtype)[6:]}", ["x", "weight"]
    both = dict(make=make, dtype=shape.dtype, run=together(forward, leaves, None), expected=together(plain, leaves, None))
    given = make()
    args = given["x"], given["copy"], given["targets"], False
    if shape.cuda and cross_entropy._triton_why_not(*args) is None:
        tiles = [Tile(0, N, 0, warps) for N, warps in LOSS if N <= 2 * V]
        anywhere = {**where, "dtype": ""}
        yield Contest(f"loss tile: {name}", "loss, tile", **_tiles("cross_entropy tile", tiles, shape, anywhere), **both)
        entries = {f"{chunks} chunks": (Row("cross_entropy chunks", str(chunks), **anywhere),) for chunks in CHUNKS}
        yield Contest(f"loss chunks: {name}", "loss, chunks", entries=entries, **both)
    yield Contest(f"loss training: {name}", "loss, training", **implementations("cross_entropy", cross_entropy, args, "cross_entropy", where), **both)


# ------------------------------------------------------------------------------------------------------------------- generation


def _generation(shape):
    rows, V = shape.rows, shape.V
    where = shape.where(V, rows) | dict(dtype="")

    def make():
        torch.manual_seed(0)
        streams = {name: torch.zeros(rows, dtype=torch.int64, device=shape.device) for name in ("out", "seed", "offset")}
        return dict(logits=torch.randn(rows, V, device=shape.device).mul_(2), **streams)

    def draw(t, choice=AUTO):
        t["offset"].zero_()
        sampler.sample_out(t["logits"], temperature=0.8, top_k=200, backend=choice, **{name: t[name] for name in ("out", "seed", "offset")})
        return (t["out"].float(),)
    given = make()
    entries = implementations("sample", sampler, (given["logits"],), "sample", where)
    yield Contest(f"sample: {rows} rows of {V}", "sampler", make=make, run=draw, expected=lambda t: draw(dict(t), backend.parse("reference")),
                  dtype=torch.float32, **entries)
    yield from _decode(shape)


def _decode(shape):
    """One step of a whole model: who decodes, and on a GPU with which tiles."""
    from ..config import GPTConfig
    from ..generation import Session, decode
    from ..model import GPT
    C, F = shape.C, 4 * shape.C
    where = shape.where(C, shape.rows)
    config = GPTConfig(block_size=shape.T, vocab_size=shape.V, n_layer=shape.layers, n_head=shape.H, n_embd=C, bias=shape.bias)

    def make():
        from ..bench.common import quiet
        torch.manual_seed(0)
        with quiet():
            return dict(model=GPT(config).to(shape.device).eval())

    @torch.no_grad()
    def step(t):
        if "session" not in t:
            session = t["session"] = Session(t["model"], shape.rows, shape.dtype)
            session.refresh()
            session.memory = list(t["model"].parameters())
            session.feed(torch.ones(shape.rows, dtype=torch.long, device=shape.device), torch.full((shape.rows,), shape.T // 2, device=shape.device))
        return (t["session"].decode(shape.T),)

    def plain(t):
        with backend.use("reference"):
            return step(dict(t))
    name = f"{shape.rows} rows, {shape.layers} layers of {C}, {str(shape.dtype)[6:]}"
    both = dict(make=make, dtype=shape.dtype, run=step, expected=plain)
    model = make()["model"]
    session = Session(model, shape.rows, shape.dtype)
    able = [name for name, why_not in decode.CANDIDATES if why_not(session) is None]
    if shape.cuda and "triton" in able:
        forms = ["matvec"] * (shape.rows <= decode.MAX_ROWS_MATVEC) + ["tensor cores"] * decode.tensor_cores_serve(session) + ["ops"]
        yield Contest(f"decode form: {name}", "decoding, form", current=lambda: decode.form(session),
                      entries={form: (Row("decode form", form, **where),) for form in forms}, **both)
    if shape.cuda and "triton" in able and decode.form(session) == "matvec":
        for kernels, widths in (("norm", (C,)), ("combine", (C,)), ("add", (F,))):
            tiles = [Tile(0, N, 0, warps) for N in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]
            limits = {**shape.where(widths[0]), "dtype": ""}
            yield Contest(f"decode {kernels}: {name}", f"decoding, {kernels}", **_tiles(f"decode {kernels} tile", tiles, shape, limits), **both)
    yield Contest(f"decode: {name}", "decoding", **implementations("decode", decode, (session,), "decode", where), **both)
