"""Draws figure.svg of csrc/README.md: how the CPU sampler finds the top-k of a row without sorting, and where the draw falls.

    python csrc/sampler/figure.py
"""
from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

from nanogpt_fast.ops.sampler import _philox, sample, sample_probs  # noqa: E402

SEGMENT, SEGMENTS, K, SEED = 32, 40, 8, 5
GREY, BLUE, RED, BAND = "#9aa0a6", "#1a73e8", "#d93025", "#e8f0fe"


def main():
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "figure", "axes.spines.top": False, "axes.spines.right": False})
    x = torch.randn(SEGMENT * SEGMENTS, generator=torch.Generator().manual_seed(SEED)) * 2
    maxima = x.view(SEGMENTS, SEGMENT).amax(-1)
    cut = maxima.sort(descending=True).values[K - 1]
    probs = sample_probs(x[None], top_k=K)[0]
    kept = probs.nonzero()[:, 0]
    token = sample(x[None], top_k=K, seed=SEED)[0]

    figure, (row, mass) = plt.subplots(2, 1, figsize=(8, 4.6), height_ratios=[3, 1], layout="constrained")
    for s in (maxima >= cut).nonzero()[:, 0].tolist():
        row.axvspan(s * SEGMENT, (s + 1) * SEGMENT, color=BAND, lw=0, label="read again" if s == int(maxima.argmax()) else None)
    row.plot(x, ".", color=GREY, ms=2, label="logits", rasterized=True)
    row.hlines(maxima, torch.arange(SEGMENTS) * SEGMENT, (torch.arange(SEGMENTS) + 1) * SEGMENT, color=BLUE, lw=1.2, label=f"largest of each {SEGMENT}")
    row.axhline(cut, color=BLUE, ls="--", lw=0.9)
    row.annotate(f"cut: the {K}th largest maximum", (len(x), cut), (0, 3), textcoords="offset points", ha="right", color=BLUE)
    row.plot(kept, x[kept], "o", color=RED, ms=4, label=f"top {K}")
    row.set(xlim=(0, len(x)), xlabel="token", ylabel="logit")
    row.legend(loc="lower right", ncols=4, fontsize=8)

    end = probs.cumsum(0)
    for i in kept.tolist():
        mass.barh(0, probs[i], left=end[i] - probs[i], color=RED if i == token else "#f6c7c3", edgecolor="white")
    r = _philox(torch.tensor([SEED]), torch.tensor([0])).item() % 2**64 / 2**64
    mass.annotate("r: one Philox draw per row and token", (r, 0.42), (r, 1.0), ha="center", arrowprops={"arrowstyle": "->"})
    mass.set(xlim=(0, 1), ylim=(-0.5, 1.4), yticks=[], xlabel="integer mass of the kept tokens, in ascending index, as a share of their sum")
    mass.spines["left"].set_visible(False)
    figure.savefig(Path(__file__).with_name("figure.svg"), dpi=150, metadata={"Date": None})


if __name__ == "__main__":
    main()
