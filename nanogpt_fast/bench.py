"""`nanogpt-fast bench`: training and generation end to end, against nanoGPT, in one process.

    nanogpt-fast bench train       tokens a second, share of the GPU's peak, peak memory, first step
    nanogpt-fast bench generate    prefill, tokens a second at several batch sizes, latency, share of the memory limit
    nanogpt-fast bench loss        loss against wall-clock time, on the same text

All variants live side by side and take turns (`measure.interleaved`), so a slow minute of the machine falls on all of them;
only ratios within one run mean anything. On a CPU each variant of `train` has a process of its own, which waits while others
run: our trainer changes malloc's settings for its process, and the peak memory of a process can be told from no other.
"nanoGPT" is the model.py of a checkout where `--upstream DIR` names one. Without it,
it is `GPT(config, backend="reference")`, which makes exactly the PyTorch calls of nanoGPT's model (tests/test_contract.py holds
them equal bit for bit), with nanoGPT's optimizer and its training step, and with its sampling loop for generation.
"""
import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from . import backend as ops_backend
from . import captured, cpu, devices, measure, options, reference
from .config import GPTConfig
from .explanation import explain
from .half_weights import HalfWeights
from .model import GPT
from .options import option
from .training import learning_rate

# name: (config, batch size). On a CPU GPT-2's context is 256 and 4 sequences are a batch, so that a step takes seconds.
GPT2 = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False)
MODELS = {
    "gpt2": (GPT2, 32),                                                                     # 124M parameters
    "gpt2-medium": ({**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024}, 16),             # 350M
    "baby": (dict(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False, dropout=0.2), 64),
    "cpu": (dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False), 12),  # nanoGPT's CPU recipe
    "tiny": (dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=False), 4),   # to try the command itself
}
ON_CPU = {"gpt2": 4, "gpt2-medium": 2}  # batch sizes there


@dataclass
class BenchOptions:
    """What the three have in common."""
    model: str = option("", "empty: gpt2 on a GPU, cpu on a CPU", choices=("", *MODELS))
    upstream: str = option("", "a nanoGPT checkout: its own model.py runs beside ours")
    backend: str = option("auto", "implementation of our ops, as for `nanogpt-fast train`")
    device: str = option("auto", "auto (CUDA, else CPU), cpu, cuda, cuda:1")
    dtype: str = option("auto", "of the forward pass; auto: bfloat16 on a GPU, float32 on a CPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    only: str = option("", "only the variants whose name contains one of these words, separated by commas")
    rounds: int = option(10, "samples of each variant", minimum=1)
    minutes: float = option(60.0, "begin nothing further after so long; building variants may take two thirds of it", above=0)
    json: str = option("", "append the result, with every sample, to this file")

    def __post_init__(self):
        ops_backend.parse(self.backend)
        if self.upstream and not Path(self.upstream, "model.py").is_file():
            raise ValueError(f"upstream is {self.upstream!r}, where there is no model.py; name a nanoGPT checkout")


@dataclass
class BenchTrainOptions(BenchOptions):
    """Times a training step: forward under autocast, backward, clip, AdamW. Ours appears twice: as the drop-in, with one import
    changed and the logits returned, and as our trainer calls it, without them. Each eager and compiled."""
    batch_size: int | None = option(None, "sequences a step; None: the model's own (32 for gpt2 on a GPU)", minimum=1)
    steps: int | None = option(None, "steps a sample; None: 10 on a GPU, 1 on a CPU", minimum=1)
    apart: bool = option(True, "on a CPU each variant in a process of its own, ours with our malloc settings")


@dataclass
class BenchGenerateOptions(BenchOptions):
    """Times generation: prefill of a prompt, then one token at a time."""
    model: str = option("gpt2", "whose shape (weights are random)", choices=tuple(MODELS))
    batch_sizes: str = option("1,8,64", "prompts at a time, separated by commas")
    prompt: int | None = option(None, "tokens of a prompt; None: 512 on a GPU, 128 on a CPU", minimum=1)
    tokens: int | None = option(None, "tokens to draw; None: 256 on a GPU, 32 on a CPU, less for nanoGPT's loop", minimum=2)
    rounds: int = option(5, "samples of each variant", minimum=1)


@dataclass
class BenchLossOptions(BenchOptions):
    """Trains nanoGPT and ours on the same batches from the same weights, in turns, and records loss against time."""
    model: str = option("", "empty: baby on a GPU, cpu on a CPU", choices=("", *MODELS))
    data: str = option("embedded", "as for `nanogpt-fast train`")
    data_dir: str = option("data", "where data sets live")
    steps: int = option(500, "of training", minimum=1)
    eval_interval: int = option(50, "steps between measurements of the loss; the clock stands meanwhile", minimum=1)
    eval_iters: int = option(20, "batches that such a measurement averages", minimum=1)
    learning_rate: float = option(1e-3, "the highest", above=0)


def main(argv):
    """The command `nanogpt-fast bench`."""
    if not argv or argv[0] not in COMMANDS:
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"no benchmark {argv[0]!r}; there are {', '.join(COMMANDS)}")
        print(__doc__.strip())
        return
    cls, function = COMMANDS[argv[0]]
    o = options.parse(cls, argv[1:], f"nanogpt-fast bench {argv[0]}")
    device = devices.choose_device(o.device)
    if not o.model:
        o.model = "cpu" if device.type != "cuda" else "gpt2" if argv[0] == "train" else "baby"
    if device.type == "cuda":  # as nanoGPT's train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    dtype = devices.choose_dtype("bfloat16" if o.dtype == "auto" and device.type == "cuda" else o.dtype, device)
    try:
        with measure.told_to_end():
            function(o, device, dtype)
    except measure.ToldToEnd:
        print("told to end; what was recorded until then is written", file=sys.stderr)
        return 128 + 15  # as a shell says SIGTERM


def record(o, benchmark, device, **found):
    """Append what was found to the file that the options name, with the words that repeat it."""
    if o.json:
        asked = {key: value for key, value in asdict(o).items() if key not in ("json", "upstream", "data_dir")}
        measure.append(o.json, benchmark, device=device.type, options=asked,
                       against="nanoGPT checkout" if o.upstream else "GPT(backend='reference')", **found)


def wanted(o, names):
    """The names that --only leaves, in their order. A word that is a whole name means that one alone."""
    words = [word for word in o.only.split(",") if word]
    left = [name for name in names if not words or any(word == name or word not in names and word in name for word in words)]
    if not left:
        raise ValueError(f"--only={o.only} leaves none of: {'; '.join(names)}")
    return left


def quiet():
    """GPT and its optimizer print their sizes."""
    return contextlib.redirect_stdout(io.StringIO())


def shape_of(model, device, **changed):
    """(config as a dict, batch size) of a model's name."""
    config, batch_size = MODELS[model]
    if device.type == "cpu" and model in ON_CPU:
        config, batch_size = {**config, "block_size": 256}, ON_CPU[model]
    return {**config, **changed}, batch_size


def build(o, nanogpt, config, device, seed=0):
    """A model with the weights of a seed: nanoGPT's or ours."""
    torch.manual_seed(seed)
    with quiet():
        if nanogpt and o.upstream:
            module = _upstream(os.path.abspath(o.upstream))
            return module.GPT(module.GPTConfig(**config)).to(device)
        return GPT(GPTConfig(**config), backend="reference" if nanogpt else o.backend).to(device)


_modules = {}


def _upstream(folder):
    """The module model.py of a nanoGPT checkout."""
    if folder not in _modules:
        spec = importlib.util.spec_from_file_location("nanogpt_checkout_model", os.path.join(folder, "model.py"))
        _modules[folder] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_modules[folder])
    return _modules[folder]


# ---------------------------------------------------------------------------------------------------------------- training

@dataclass
class Variant:
    nanogpt: bool = False        # nanoGPT's model and optimizer, or ours
    logits: bool = True          # False: as our trainer calls it
    compiled: bool = False
    bf16: bool = False           # on a CPU, where float32 is the default
    fused: bool = False          # nanoGPT with AdamW's fused step, which on a CPU it does not ask for


TRAIN_VARIANTS = {  # built in this order: where time is short, the ones that count are had
    "nanoGPT compiled": Variant(nanogpt=True, compiled=True),
    "one import": Variant(),
    "our trainer": Variant(logits=False),
    "our trainer compiled": Variant(logits=False, compiled=True),
    "one import compiled": Variant(compiled=True),
    "nanoGPT": Variant(nanogpt=True),
}
TRAIN_VARIANTS_CPU = {  # what nanoGPT's user could switch on beside ours
    "nanoGPT bf16 fused": Variant(nanogpt=True, bf16=True, fused=True),
    "nanoGPT bf16 fused compiled": Variant(nanogpt=True, bf16=True, fused=True, compiled=True),
    "one import bf16": Variant(bf16=True),
    "our trainer bf16": Variant(logits=False, bf16=True),
    "our trainer bf16 compiled": Variant(logits=False, bf16=True, compiled=True),
}


class Trainer:
    """One variant: a model, its optimizer, and `step(x, y)`, x and y (B, T), which returns the loss.

    Our trainer's way is training.py's: no logits, half-precision copies of the weights, the step captured in CUDA graphs
    where it can be. The others do what nanoGPT's train.py does.
    """

    def __init__(self, o, variant, config, B, device, dtype, seed=0):
        dtype = torch.bfloat16 if variant.bf16 else dtype
        self.model = build(o, variant.nanogpt, config, device, seed)
        self.optimizer = _optimizer(o, variant, self.model, device)
        self.network = torch.compile(self.model) if variant.compiled else self.model
        self.parameters = list(self.model.parameters())
        self.dtype, self.context = dtype, devices.autocast(device, dtype)
        self.more, self.weights, self.graphs, self.not_captured = {}, None, None, "not our trainer"
        if not variant.logits:
            self.more = dict(return_logits=False)
            self.weights = HalfWeights(self.model, dtype, own_gradients=not variant.compiled)
            # Until the process ends: this model is nobody else's.
            self.sparse = cpu.sparse_embedding_gradient(self.model, wanted=device.type == "cpu" and not variant.compiled)
            self.sparse.__enter__()  # it would be undone if nobody kept it
            self.not_captured = captured.why_not(self.model, self.optimizer, device)
        if self.not_captured is None:
            self.graphs = captured.CapturedStep(self.forward_backward, self.update, self.optimizer,
                                                (B, config["block_size"]), device)

    def step(self, x, y):
        if self.graphs is not None:
            self.graphs.micro_step(x, y, first=True)
            self.graphs.update()
            return self.graphs.loss
        loss = self.forward_backward(x, y)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def forward_backward(self, x, y):
        with self.weights.in_use() if self.weights else contextlib.nullcontext():
            with self.context:
                loss = self.network(x, y, **self.more)[1]
            loss.backward()
        return loss.detach()

    def update(self):
        ours_on_cpu = self.weights and self.parameters[0].device.type == "cpu"
        clip = cpu.clip_grad_norm if ours_on_cpu else torch.nn.utils.clip_grad_norm_
        clip(self.parameters, 1.0)
        self.optimizer.step()
        if self.weights:
            self.weights.refresh()


def _optimizer(o, variant, model, device):
    """nanoGPT fuses AdamW on CUDA alone; ours on a CPU too, which is a difference that a user gets."""
    with quiet():
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if variant.nanogpt and device.type == "cpu" and (variant.fused or not o.upstream):
        groups = [{**group, "fused": variant.fused or None} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    return optimizer


def train(o, device, dtype):
    """The command `bench train`: builds every variant, takes its first step, then lets them take turns."""
    config, B = shape_of(o.model, device)
    B, T = o.batch_size or B, config["block_size"]
    steps = o.steps or (10 if device.type == "cuda" else 1)
    all_variants = TRAIN_VARIANTS | (TRAIN_VARIANTS_CPU if device.type == "cpu" and dtype == torch.float32 else {})
    until = time.monotonic() + 60 * o.minutes
    random = torch.Generator().manual_seed(0)
    data = [torch.randint(config["vocab_size"], (2, B, T), generator=random).to(device) for _ in range(4)]

    print(f"{o.model}: {B} x {T} tokens a step, {str(dtype).removeprefix('torch.')}, on {devices.describe(device)}")
    apart, workers = o.apart and device.type == "cpu" and hasattr(os, "setsid"), []
    runs, found, told_to_end = {}, {}, False
    for name in wanted(o, all_variants):
        if told_to_end or runs and time.monotonic() > until - 20 * o.minutes:
            found[name] = dict(error="not measured: out of time")
            continue
        try:
            runner = (Worker if apart else Runner)(o, name, all_variants[name], config, B, device, dtype, data, steps)
            found[name] = runner.first()
        except Exception as error:  # out of memory, a graph that cannot be captured: others can still be timed
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            print(f"{name:<28} {type(error).__name__}: {error}", flush=True)
            found[name] = dict(error="out of memory" if out_of_memory else f"{type(error).__name__}: {error}"[:300])
            continue
        except measure.ToldToEnd:  # in the middle of a compilation, say: what was built before can still be timed
            found[name], told_to_end = dict(error="not measured: out of time"), True
            continue
        print(f"{name:<28} first step {found[name]['first_step_s']:6.1f} s", flush=True)
        runs[name] = runner.several
        workers += [runner] if apart else []

    samples = measure.interleaved(runs, o.rounds, warmup=1, until=time.monotonic() + 5 if told_to_end else until)
    with quiet():
        counter = GPT(GPTConfig(**config))  # counts the FLOPs of either side
    for name, values in samples.items():
        if not values:
            found[name] = dict(error="not measured: out of time")
            continue
        seconds = statistics.median(values) / steps
        found[name] |= dict(samples=[value / steps for value in values], tokens_per_s=B * T / seconds,
                            mfu=counter.estimate_hardware_mfu(B, seconds, device))
    for worker in workers:
        found[worker.name]["peak_memory"] = worker.close()
    record(o, "train", device, shape=dict(config, batch_size=B), dtype=str(dtype).removeprefix("torch."), variants=found)
    print(train_table(found))


class Runner:
    """A variant in this process."""

    def __init__(self, o, name, variant, config, B, device, dtype, data, steps):
        self.name, self.batches, self.steps, self.dtype, self.device = name, itertools.cycle(data), steps, dtype, device
        self.before = _reset_peak(device)
        self.trainer = Trainer(o, variant, config, B, device, dtype)

    def first(self):
        """Take the first steps; returns what is known then."""
        trainer, start = self.trainer, time.perf_counter()
        trainer.step(*next(self.batches)).item()
        first = time.perf_counter() - start
        for _ in range(captured.WARM_UP_STEPS + 1 if trainer.graphs else 1):  # up to the step that is recorded
            trainer.step(*next(self.batches))
        ops = {}
        if isinstance(trainer.model, GPT):
            rows = explain(trainer.model, dtype=trainer.dtype, return_logits=not trainer.more)
            ops = {row.op: row.implementation for row in rows}
        return dict(first_step_s=first, peak_memory=_peak(self.device, self.before), ops=ops, not_captured=trainer.not_captured)

    def several(self):
        for _ in range(self.steps):
            self.trainer.step(*next(self.batches))


class Worker:
    """A variant in a process of its own, which does nothing unless it is asked: the same `first` and `several`."""

    def __init__(self, o, name, *rest):
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads that do not run there
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, torch.get_num_threads(), o, name, *rest), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what):
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self.process.join()
            raise RuntimeError(f"its process ended with status {self.process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def first(self):
        return self.ask("first")

    def several(self):
        self.ask("several")

    def close(self):
        """End the process; returns the most memory that it ever held, in bytes."""
        peak = self.ask("close")
        self.process.join()
        return peak


def _work(pipe, threads, o, name, variant, *rest):
    """The process of a Worker."""
    import resource  # here: Windows has neither, and `apart` is off there
    os.setsid()  # what is sent to the parent's group, as `timeout` sends SIGTERM, is for the parent to heed
    torch.set_num_threads(threads)
    if not variant.logits:
        cpu.keep_freed_memory()
    runner = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:  # the parent has ended
            return
        if what == "close":
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send(kib if sys.platform == "darwin" else 1024 * kib)
            return
        try:
            runner = runner or Runner(o, name, variant, *rest)
            pipe.send(getattr(runner, what)())
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def train_table(found):
    """The result as text."""
    shipped, strongest = found.get("nanoGPT", {}), strongest_of(found)
    lines = [f"{'':<28} {'tokens/s':>10} {'times nanoGPT':>14} {'its strongest':>14} {'MFU':>7} {'peak memory':>12} "
             f"{'first step':>11}"]
    for name, row in found.items():
        if "tokens_per_s" not in row:
            lines.append(f"{name:<28} {row.get('error', 'not measured')}")
            continue
        ratios = [f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}" if "tokens_per_s" in rival else ""
                  for rival in (shipped, strongest)]
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
        lines.append(f"{name:<28} {row['tokens_per_s']:>10,.0f} {ratios[0]:>14} {ratios[1]:>14} {mfu:>7} {memory:>12} "
                     f"{row['first_step_s']:>9.1f} s")
    return "\n".join(lines) + "\n(times nanoGPT: as it is shipped; its strongest: the fastest of its rows)"


def strongest_of(found):
    """The fastest row of nanoGPT, whatever was switched on; {} where none was run."""
    return max((row for name, row in found.items() if name.startswith("nanoGPT") and "tokens_per_s" in row),
               key=lambda row: row["tokens_per_s"], default={})


def rival_of(found):
    """The row that the others are compared with: nanoGPT compiled, or as it is where that was not run; or None."""
    return next((found[name] for name in ("nanoGPT compiled", "nanoGPT") if "tokens_per_s" in found.get(name, ())), None)


def _reset_peak(device):
    """Bytes in use now; the peak counts from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device, before):
    """Bytes that a variant has needed since it was begun, at its peak, as if it were alone. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


# -------------------------------------------------------------------------------------------------------------- generation

class NanoGPTLoop:
    """nanoGPT's generate: the whole context through the model for every token."""

    tokens_share = 8  # its tokens are so slow that an eighth of them says enough

    def __init__(self, o, config, device, dtype):
        self.model = build(o, True, config, device).eval()
        self.T, self.context = config["block_size"], devices.autocast(device, dtype)

    @torch.no_grad()
    def stream(self, idx, n):
        with self.context:
            for _ in range(n):
                logits = self.model(idx[:, -self.T:])[0][:, -1, :]
                idx = torch.cat((idx, draw_as_nanogpt(logits)), dim=1)
                yield idx[:, -1]

    def all(self, idx, n):
        for _ in self.stream(idx, n):
            pass


class UpstreamLoop(NanoGPTLoop):
    """A checkout's own `generate`."""

    @torch.no_grad()
    def stream(self, idx, n):
        with self.context:
            for _ in range(n):
                idx = self.model.generate(idx, 1, temperature=0.8, top_k=200)
                yield idx[:, -1]

    @torch.no_grad()
    def all(self, idx, n):
        with self.context:
            self.model.generate(idx, n, temperature=0.8, top_k=200)


class PlainCache:
    """The key-value cache that most people write, in plain PyTorch: static, weights cast once, one token at a time."""

    tokens_share = 1

    def __init__(self, o, config, device, dtype):
        self.model = build(o, True, config, device).eval().to(dtype)
        self.n_head = config["n_head"]
        shape = (config["n_layer"], 2, config["n_head"], config["block_size"], config["n_embd"] // config["n_head"])
        self.new_cache = lambda B: torch.zeros(shape[0], 2, B, *shape[2:], dtype=dtype, device=device)

    @torch.no_grad()
    def stream(self, idx, n):
        cache, start, new = self.new_cache(idx.size(0)), 0, idx
        for _ in range(n):
            logits = self.forward(new, start, cache)
            start += new.size(1)
            new = draw_as_nanogpt(logits)
            yield new[:, 0]

    def all(self, idx, n):
        for _ in self.stream(idx, n):
            pass

    def forward(self, idx, start, cache):
        """Logits (B, V) behind idx (B, T), which stands at positions start ... ; the first call is the prefill."""
        t, T = self.model.transformer, idx.size(1)
        x = t.wte(idx) + t.wpe.weight[start:start + T]
        for block, (keys, values) in zip(t.h, cache):
            q, k, v = reference.split_heads(block.attn.c_attn(block.ln_1(x)), self.n_head)
            keys[:, :, start:start + T], values[:, :, start:start + T] = k, v
            seen = keys[:, :, :start + T], values[:, :, :start + T]
            y = F.scaled_dot_product_attention(q, *seen, is_causal=start == 0 and T > 1)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(t.ln_f(x[:, -1]))


class Ours:
    """`GPT.generate`."""

    tokens_share = 1

    def __init__(self, o, config, device, dtype):
        self.model = build(o, False, config, device).eval()
        self.context = devices.autocast(device, dtype)

    def stream(self, idx, n):
        with torch.no_grad(), self.context:
            yield from self.model.generate(idx, n, temperature=0.8, top_k=200, rng="philox", stream=True)

    def all(self, idx, n):
        with torch.no_grad(), self.context:
            self.model.generate(idx, n, temperature=0.8, top_k=200, rng="philox")


def draw_as_nanogpt(logits):
    """One token a row, (B, 1), with temperature 0.8 and top-k 200."""
    logits = logits / 0.8
    kth = torch.topk(logits, min(200, logits.size(-1))).values[:, [-1]]
    logits[logits < kth] = -float("inf")
    return torch.multinomial(F.softmax(logits.float(), dim=-1), num_samples=1)


def generate(o, device, dtype):
    """The command `bench generate`."""
    gpu = device.type == "cuda"
    config = {**MODELS[o.model][0], "dropout": 0.0}  # with its whole context on a CPU too
    prompt = min(o.prompt or (512 if gpu else 128), config["block_size"] - 2)
    tokens = min(o.tokens or (256 if gpu else 32), config["block_size"] - prompt)  # inside the window, where a cache works
    sides = {"nanoGPT": (UpstreamLoop if o.upstream else NanoGPTLoop, dtype), "plain KV cache": (PlainCache, dtype),
             "ours": (Ours, dtype)}
    if not gpu and dtype == torch.float32:
        sides |= {"plain KV cache bf16": (PlainCache, torch.bfloat16), "ours bf16": (Ours, torch.bfloat16)}
    sides = {name: (kind(o, config, device, side_dtype), side_dtype) for name in wanted(o, sides)
             for kind, side_dtype in [sides[name]]}
    limits = measure.limits(device)
    matrix, vector = (torch.ones(1 << 15, 4096), torch.ones(4096)) if not gpu else (None, None)  # 0.5 GiB, larger than any cache
    until = time.monotonic() + 60 * o.minutes
    print(f"{o.model}: {prompt} tokens of prompt, then {tokens}, on {devices.describe(device)}; memory at "
          f"{limits['memory'] / 1e9:,.0f} GB/s")
    print(f"{'':>5} {'':<22} {'prefill':>10} {'tokens/s':>10} {'times nanoGPT':>14} {'times plain':>12} {'times batch 1':>14} "
          f"{'of the limit':>13}  latency of a token, ms: half, 90 %, 99 % of them")
    alone = {}  # tokens a second at batch 1
    for B in (int(text) for text in o.batch_sizes.split(",")):
        idx = torch.randint(config["vocab_size"], (B, prompt), generator=torch.Generator().manual_seed(B)).to(device)
        counts = {name: max(4, tokens // side.tokens_share) for name, (side, _) in sides.items()}
        runs = {}
        for name, (side, _) in sides.items():
            runs[name, 1] = lambda side=side: side.all(idx, 1)
            runs[name, counts[name]] = lambda side=side, n=counts[name]: side.all(idx, n)
        if not gpu:  # in turns, too: what a CPU's memory gives changes with who else uses it
            runs["memory"] = lambda: matrix @ vector
        samples = measure.interleaved(runs, o.rounds, warmup=1, until=until)
        if not all(samples.values()):
            raise measure.ToldToEnd
        median, found = measure.medians(samples), {}
        if not gpu:
            limits["memory"] = matrix.numel() * matrix.itemsize / median["memory"]
            print(f"      memory at {limits['memory'] / 1e9:,.1f} GB/s", flush=True)
        for name, (side, side_dtype) in sides.items():
            n = counts[name]
            later = median[name, n] - median[name, 1]  # what the tokens behind the first took
            rate = B * (n - 1) / later if later > 0 else B * n / median[name, n]  # noise hides it: count the prefill too
            limit = limits["memory"] * B / bytes_a_step(config, B, prompt + n / 2, side_dtype)
            latency = latencies(side, idx, n) if B == 1 else []
            found[name] = dict(prefill_s=median[name, 1], tokens_per_s=rate, tokens=n, of_limit=rate / limit, latency=latency,
                               first_samples=samples[name, 1], all_samples=samples[name, n])
            alone |= {name: rate} if B == 1 else {}
            plain = "plain KV cache" if side_dtype == dtype else "plain KV cache bf16"  # the one in the same dtype
            ratios = [rate / found[rival]["tokens_per_s"] if rival in found else float("nan") for rival in ("nanoGPT", plain)]
            print(f"{B:>5} {name:<22} {1e3 * median[name, 1]:>7.1f} ms {rate:>10,.1f} {ratios[0]:>14.1f} {ratios[1]:>12.2f} "
                  f"{rate / alone.get(name, float('nan')):>14.1f} {100 * rate / limit:>11.0f} %  " + percentiles(latency), flush=True)
        record(o, "generate", device, shape=config, batch_size=B, prompt=prompt, limits=limits,
               dtype=str(dtype).removeprefix("torch."), variants=found)


def latencies(side, idx, n):
    """Seconds between tokens as a reader sees them, on the host; the first, which is the prefill, is left out."""
    times = []
    for drawn in side.stream(idx, n):
        if torch.is_tensor(drawn):
            drawn.tolist()
        times.append(time.perf_counter())
    return [later - earlier for earlier, later in zip(times, times[1:])]


def percentiles(seconds):
    """Half, 90 and 99 percent of them are below: in ms, as text; empty for none."""
    ranked = sorted(seconds)
    return ", ".join(f"{1e3 * ranked[min(int(q * len(ranked)), len(ranked) - 1)]:.2f}" for q in (0.5, 0.9, 0.99) if ranked)


def bytes_a_step(config, B, T, dtype):
    """What one decoding step must read: all weights but the positions once, and the keys and values of B rows of T tokens."""
    C, L = config["n_embd"], config["n_layer"]
    return (config["vocab_size"] * C + 12 * L * C * C + 2 * L * C * T * B) * dtype.itemsize


# ------------------------------------------------------------------------------------------------------- loss against time

def loss(o, device, dtype):
    """The command `bench loss`: the sides train in turns of eval_interval steps, each against its own clock."""
    from .text import prepare
    from .text.batches import Batches
    folder = prepare.find(o.data, o.data_dir)
    vocabulary = prepare.load_tokenizer(folder).vocab_size
    config, B = shape_of(o.model, device, dropout=0.0, vocab_size=vocabulary)  # without dropout, both can be held to one loss
    compiled = device.type == "cuda"
    chosen = devices.choose_dtype("auto", device, config["n_embd"])
    bf16 = device.type == "cpu" and o.dtype == "auto" and chosen == torch.bfloat16
    both = {"nanoGPT": Variant(nanogpt=True, compiled=compiled), "ours": Variant(logits=False, compiled=compiled, bf16=bf16)}
    schedule = LossSchedule(learning_rate=o.learning_rate, min_lr=o.learning_rate / 10, warmup_iters=o.steps // 20,
                            lr_decay_iters=o.steps)

    def batches(split, seed):
        return Batches(folder, split, B, config["block_size"], device=device, generator=torch.Generator().manual_seed(seed))

    sides = {name: Side(Trainer(o, variant, config, B, device, dtype), batches("train", 1)) for name, variant in both.items()}
    print(f"{o.model} on {o.data}, {o.steps} steps of {B} x {config['block_size']} tokens, on {devices.describe(device)}")
    for step in range(0, o.steps + 1, o.eval_interval):
        for name, side in sides.items():
            with contextlib.closing(batches("val", 2)) as held_out:
                row = side.evaluate(step, held_out, o.eval_iters)
            print(f"step {row['step']:>6}  {name:<8} {row['seconds']:>8.1f} s  validation loss {row['val_loss']:.4f}",
                  flush=True)
            side.advance(step, min(o.eval_interval, o.steps - step), schedule, device)
    for side in sides.values():
        side.batches.close()
    record(o, "loss", device, shape=dict(config, batch_size=B), dtype=str(dtype).removeprefix("torch."), compiled=compiled,
           curves={name: side.rows for name, side in sides.items()})


@dataclass
class LossSchedule:
    """The fields that training.learning_rate reads."""
    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    decay_lr: bool = True


class Side:
    """One model on its way: what it has cost so far, and where it stands."""

    def __init__(self, trainer, batches):
        self.trainer, self.batches, self.seconds, self.rows = trainer, batches, 0.0, []

    def advance(self, start, count, schedule, device):
        """Train for `count` steps against the clock."""
        began = time.perf_counter()
        for step in range(start, start + count):
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule)
            x, y = self.batches.next()
            self.trainer.step(x, y)
            self.batches.prefetch()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def evaluate(self, step, batches, count):
        """Note the validation loss at this step; the clock stands."""
        model = self.trainer.model.eval()
        with self.trainer.context:
            values = [model(*batches.next())[1].item() for _ in range(count)]
        model.train()
        self.rows.append(dict(step=step, seconds=self.seconds, val_loss=statistics.mean(values)))
        return self.rows[-1]


COMMANDS = {"train": (BenchTrainOptions, train), "generate": (BenchGenerateOptions, generate), "loss": (BenchLossOptions, loss)}
