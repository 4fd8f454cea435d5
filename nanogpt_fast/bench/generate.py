"""`nanogpt-fast bench generate`: prefill and decoding with nanoGPT's loop, a plain key-value cache and ours, in turns."""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import devices, reference, tables
from ..options import option
from . import measure
from .common import MODELS, TimedOptions, build, record, wanted


HEAD = ("batch", "", "prefill", "tokens/s", "times nanoGPT", "times plain", "times batch 1", "of the limit",
        "ms a token: p50, p90, p99")

FEWEST = 4      # tokens: a rate needs some after the first


@dataclass
class BenchGenerateOptions(TimedOptions):
    """Times generation: prefill of a prompt, then one token at a time."""
    model: str = option("gpt2", "the model's shape (weights are random)", choices=tuple(MODELS))
    batch_sizes: str = option("1,8,64", "prompts at a time, separated by commas")
    prompt: int | None = option(None, "tokens of a prompt; None: 512 on a GPU, 128 on a CPU, at most half of the context", minimum=1)
    tokens: int | None = option(None, "tokens to draw; None: 256 on a GPU, 32 on a CPU; nanoGPT's loop draws an eighth", minimum=FEWEST)
    rounds: int = option(5, "samples of each variant", minimum=1)


class NanoGPTLoop:
    """nanoGPT's generate: the whole context goes through the model for every token."""

    tokens_share = 8  # its tokens are so slow that an eighth of them suffices

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
    """The key-value cache that most people write in plain PyTorch: static, weights cast once, one token at a time."""

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
        """Logits (B, V) after idx (B, T), which is at positions start .. start + T - 1; the first call is the prefill."""
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
    """One token per row, (B, 1), with temperature 0.8 and top-k 200."""
    logits = logits / 0.8
    kth = torch.topk(logits, min(200, logits.size(-1))).values[:, [-1]]
    logits[logits < kth] = -float("inf")
    return torch.multinomial(F.softmax(logits.float(), dim=-1), num_samples=1)


def run(o, device, dtype):
    """The command `bench generate`."""
    gpu = device.type == "cuda"
    config = {**MODELS[o.model][0], "dropout": 0.0}  # with its whole context, on a CPU too
    prompt = o.prompt or min(512 if gpu else 128, config["block_size"] // 2)
    room = config["block_size"] - prompt        # within the context, where a cache works
    if room < FEWEST:
        raise ValueError(f"prompt is {prompt}, and the context of {o.model} is {config['block_size']} tokens; expected at most "
                         f"{config['block_size'] - FEWEST}, so that {FEWEST} can be generated")
    tokens = min(o.tokens or (256 if gpu else 32), room)
    sides = {"nanoGPT": (UpstreamLoop if o.upstream else NanoGPTLoop, dtype), "plain KV cache": (PlainCache, dtype),
             "ours": (Ours, dtype)}
    if not gpu and dtype == torch.float32:
        sides |= {"plain KV cache bf16": (PlainCache, torch.bfloat16), "ours bf16": (Ours, torch.bfloat16)}
    sides = {name: (kind(o, config, device, side_dtype), side_dtype) for name in wanted(o, sides)
             for kind, side_dtype in [sides[name]]}
    limits = measure.limits(device)
    matrix, vector = (torch.ones(1 << 15, 4096), torch.ones(4096)) if not gpu else (None, None)  # 0.5 GiB, larger than any cache
    until = time.monotonic() + 60 * o.minutes
    aside, lines = tables.aside(o.format), tables.Lines(HEAD, o.format, "rlrrrrrrl", (0, 19, 11, 9))
    print(f"{o.model}: a prompt of {prompt} tokens, then {tokens} more, on {devices.describe(device)}; memory at "
          f"{limits['memory'] / 1e9:,.0f} GB/s", file=aside)
    print("\n".join(lines.head), flush=True)
    alone = {}  # tokens a second at batch 1
    for B in (int(text) for text in o.batch_sizes.split(",")):
        idx = torch.randint(config["vocab_size"], (B, prompt), generator=torch.Generator().manual_seed(B)).to(device)
        counts = {name: max(FEWEST, tokens // side.tokens_share) for name, (side, _) in sides.items()}
        runs = {}
        for name, (side, _) in sides.items():
            runs[name, 1] = lambda side=side: side.all(idx, 1)
            runs[name, counts[name]] = lambda side=side, n=counts[name]: side.all(idx, n)
        if not gpu:  # in turns, too: a CPU's memory bandwidth changes with the load of other processes
            runs["memory"] = lambda: matrix @ vector
        samples = measure.interleaved(runs, o.rounds, warmup=1, until=until)
        if not all(samples.values()):
            raise measure.Interrupted
        median, found = measure.medians(samples), {}
        if not gpu:
            limits["memory"] = matrix.numel() * matrix.itemsize / median["memory"]
            print(f"batch {B}: memory at {limits['memory'] / 1e9:,.1f} GB/s", file=aside, flush=True)
        for name, (side, side_dtype) in sides.items():
            n = counts[name]
            later = median[name, n] - median[name, 1]  # the time of all tokens after the first
            rate = B * (n - 1) / later if later > 0 else B * n / median[name, n]  # if noise hides it, count the prefill too
            limit = limits["memory"] * B / bytes_a_step(config, B, prompt + n / 2, side_dtype)
            latency = latencies(side, idx, n) if B == 1 else []
            found[name] = dict(prefill_s=median[name, 1], tokens_per_s=rate, tokens=n, of_limit=rate / limit, latency=latency,
                               first_samples=samples[name, 1], all_samples=samples[name, n])
            alone |= {name: rate} if B == 1 else {}
            plain = "plain KV cache" if side_dtype == dtype else "plain KV cache bf16"  # the one in the same dtype
            rivals = [found[rival]["tokens_per_s"] if rival in found else None for rival in ("nanoGPT", plain)]
            ratios = [f"{rate / rival:.{digits}f}" if rival else "-" for rival, digits in zip((*rivals, alone.get(name)), (1, 2, 1))]
            print(lines.row((B, name, f"{1e3 * median[name, 1]:,.1f} ms", f"{rate:,.1f}", *ratios, f"{100 * rate / limit:.0f} %",
                             percentiles(latency))), flush=True)
        record(o, "generate", device, shape=config, batch_size=B, prompt=prompt, limits=limits,
               dtype=str(dtype).removeprefix("torch."), variants=found)


def latencies(side, idx, n):
    """Seconds between tokens as a reader sees them, on the host; without the first, which is the prefill."""
    times = []
    for drawn in side.stream(idx, n):
        if torch.is_tensor(drawn):
            drawn.tolist()
        times.append(time.perf_counter())
    return [later - earlier for earlier, later in zip(times, times[1:])]


def percentiles(seconds):
    """The 50th, 90th and 99th percentile in ms, as text; empty without samples."""
    ranked = sorted(seconds)
    return ", ".join(f"{1e3 * ranked[min(int(q * len(ranked)), len(ranked) - 1)]:.2f}" for q in (0.5, 0.9, 0.99) if ranked)


def bytes_a_step(config, B, T, dtype):
    """What one decoding step must read: all weights but the position embeddings once, and the keys and values of B rows of T tokens."""
    C, L = config["n_embd"], config["n_layer"]
    return (config["vocab_size"] * C + 12 * L * C * C + 2 * L * C * T * B) * dtype.itemsize
