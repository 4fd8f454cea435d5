"""Draw the pictures of tour.md:  python docs/plots.py  (about a minute; writes docs/plots/*.png)

Each function draws one claim of the tour from classic.py's own functions. The last one counts, it does not measure.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanogpt_fast import classic
from nanogpt_fast.text import corpora
from nanogpt_fast.text.tokenizers import CharTokenizer

OUT = Path(__file__).parent / "plots"


def figure():
    fig = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(fig)  # draws without a display
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def save(fig, name):
    OUT.mkdir(exist_ok=True)
    fig.savefig(OUT / f"{name}.png", dpi=100, metadata={"Software": None})  # the same bytes at every run


def scale():
    """Softmax over 64 random keys: how much the largest weight takes, as the head size grows."""
    sizes = [2 ** i for i in range(1, 11)]
    largest = {"divided by sqrt(d)": [], "not divided": []}
    for d in sizes:
        q, k = torch.randn(500, 1, d), torch.randn(500, 64, d)
        scores = (q @ k.transpose(-2, -1)).squeeze(1)                                   # (500, 64)
        for label, divisor in (("divided by sqrt(d)", math.sqrt(d)), ("not divided", 1)):
            largest[label].append(F.softmax(scores / divisor, -1).amax(-1).mean())
    fig, ax = figure()
    for label, values in largest.items():
        ax.plot(sizes, values, marker=".", label=label)
    ax.set(xscale="log", xlabel="head size d", ylabel="largest of 64 weights", ylim=(0, 1.02))
    ax.legend(frameon=False)
    save(fig, "scale")


def mask():
    q, k = torch.randn(2, 12, 16)
    weights = classic.attention_weights(q, k, torch.ones(12, 12).tril())
    fig, ax = figure()
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="from position s", ylabel="to position t", xticks=range(0, 12, 2), yticks=range(0, 12, 2))
    fig.colorbar(image, label="weight")
    save(fig, "mask")


class WithoutResiduals(nn.Module):
    """A Block's layers one after the other, with nothing to go around them."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.ff(self.block.ln2(self.block.sa(self.block.ln1(x))))


def residual(steps=120):
    """The first steps of 12 layers without residuals, in post-norm and in pre-norm, all at one learning rate, not warmed up."""
    text = corpora.embedded()
    tokenizer = CharTokenizer.from_text(text)
    data = torch.tensor(tokenizer.encode(text))
    fig, ax = figure()
    for kind in ("no residuals", "post-norm", "pre-norm"):
        torch.manual_seed(0)
        model = classic.ClassicGPT(classic.ClassicConfig(
            vocab_size=tokenizer.vocab_size, block_size=32, n_layer=12, n_head=2, n_embd=32, init="xavier",
            norm="post" if kind == "post-norm" else "pre"))
        if kind == "no residuals":
            model.blocks = nn.Sequential(*map(WithoutResiduals, model.blocks))
        history = classic.train(model, data, data, steps=steps, batch_size=16, learning_rate=3e-3, eval_interval=steps // 12)
        ax.plot([r["step"] for r in history], [r["train_loss"] for r in history], marker=".", label=kind)
    ids = torch.bincount(data) / len(data)
    ax.axhline(-(ids * ids.clamp(min=1e-9).log()).sum(), color="0.6", lw=1, zorder=0, label="letter frequencies alone")
    ax.set(xlabel="step", ylabel="training loss")
    ax.legend(frameon=False)
    save(fig, "residual")


@torch.no_grad()
def init():
    """The residual stream of 48 fresh blocks, with and without 1 / sqrt(2 L) in the projections that end a branch."""
    torch.manual_seed(0)
    config = classic.ClassicConfig(vocab_size=256, block_size=16, n_layer=48, n_head=4, n_embd=256)
    model = classic.ClassicGPT(config)
    idx = torch.randint(256, (4, 16))
    fig, ax = figure()
    for label, factor in (("1 / sqrt(2 L)", 1), ("not scaled", math.sqrt(2 * config.n_layer))):
        for block in model.blocks:
            block.sa.proj.weight.mul_(factor)
            block.ff[2].weight.mul_(factor)
        x, sizes = classic.embed(idx, model.tok_emb, model.pos_emb), []
        for block in model.blocks:
            x = block(x)
            sizes.append(x.std())
        ax.plot(range(1, 49), sizes, marker=".", label=label)
    ax.set(xlabel="after block", ylabel="standard deviation of the stream", ylim=(0, None))
    ax.legend(frameon=False)
    save(fig, "init")


def tying():
    """Millions of parameters of GPT-2's four sizes: the rest, the embedding, and the head where it is not the same matrix."""
    sizes = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "XL": (48, 1600)}
    rest = [(n_layer * (12 * C * C + 13 * C) + 1024 * C + 2 * C) / 1e6 for n_layer, C in sizes.values()]
    embedding = [50257 * C / 1e6 for _, C in sizes.values()]
    fig, ax = figure()
    names = list(sizes)
    ax.bar(names, rest, label="blocks, positions, last norm")
    ax.bar(names, embedding, bottom=rest, label="token embedding")
    both = [a + b for a, b in zip(rest, embedding)]
    bars = ax.bar(names, embedding, bottom=both, fill=False, linestyle="--", label="head, if untied")
    ax.bar_label(bars, [f"+{100 * e / b:.0f} %" for e, b in zip(embedding, both)])
    ax.set(ylabel="million parameters")
    ax.legend(frameon=False)
    save(fig, "tying")


LETTERS = list("etaoinshrdlu")
LOGITS = torch.linspace(2.5, -3, 12)[None]


def temperature():
    fig, ax = figure()
    for i, tau in enumerate((0.5, 1.0, 2.0)):
        ax.bar(torch.arange(12) + 0.27 * (i - 1), classic.next_token_probabilities(LOGITS, tau)[0], width=0.27,
               label=f"temperature {tau:g}")
    ax.set(xticks=range(12), xticklabels=LETTERS, ylabel="probability")
    ax.legend(frameon=False)
    save(fig, "temperature")


def top_k():
    fig, ax = figure()
    for i, k in enumerate((None, 3)):
        ax.bar(torch.arange(12) + 0.4 * (i - 0.5), classic.next_token_probabilities(LOGITS, top_k=k)[0], width=0.4,
               label=f"top_k = {k}" if k else "all")
    ax.set(xticks=range(12), xticklabels=LETTERS, ylabel="probability")
    ax.legend(frameon=False)
    save(fig, "top_k")


MATMUL, OTHER, MEMORY = 790e12, 60e12, 4.3e12  # an H200: bf16 FLOP/s in tensor cores, fp32 FLOP/s outside them, bytes/s


def layer_costs(B=64, T=1024, C=768, H=12):
    """[(operation, seconds of arithmetic, seconds of traffic), ...] of one GPT-2 layer's forward in bf16, each by itself.

    Counted by hand: what an operation must compute and move at least, at full speed.
    """
    N, weights = B * T, B * H * T * T  # positions; the numbers in the (T, T) matrices

    def linear(n_in, n_out):
        return 2 * N * n_in * n_out / MATMUL, 2 * (N * n_in + n_in * n_out + N * n_out) / MEMORY

    def elementwise(flops, numbers):
        return flops / OTHER, 2 * numbers / MEMORY

    matmuls = 2 * 2 * weights * (C // H)  # q k^T and weights @ v; half of both lies above the diagonal, which only fused skips
    return [("LayerNorms", *elementwise(2 * 8 * N * C, 2 * 2 * N * C)),
            ("qkv", *linear(C, 3 * C)),
            # the weights are written as scores, read and written by the mask, read and written by softmax, read by the product
            ("attention,\nwritten out", matmuls / MATMUL + 6 * weights / OTHER, 2 * (6 * weights + 4 * N * C) / MEMORY),
            ("attention,\nfused", matmuls / 2 / MATMUL + 6 * weights / 2 / OTHER, 2 * 4 * N * C / MEMORY),
            ("proj", *linear(C, C)),
            ("ff up", *linear(C, 4 * C)),
            ("GELU", *elementwise(20 * N * 4 * C, 2 * N * 4 * C)),
            ("ff down", *linear(4 * C, C)),
            ("residual\nadds", *elementwise(2 * N * C, 2 * 3 * N * C))]


def gpu():
    costs = layer_costs()
    fig, ax = figure()
    at = torch.arange(len(costs))
    ax.bar(at - 0.2, [1e6 * arithmetic for _, arithmetic, _ in costs], width=0.4, label="arithmetic")
    ax.bar(at + 0.2, [1e6 * traffic for _, _, traffic in costs], width=0.4, label="memory")
    ax.set(ylabel="microseconds, counted")
    ax.set_xticks(at, [name for name, _, _ in costs], rotation=40, fontsize=8)
    ax.legend(frameon=False)
    save(fig, "gpu")


if __name__ == "__main__":
    for draw in (scale, mask, residual, init, tying, temperature, top_k, gpu):
        torch.manual_seed(0)
        draw()
