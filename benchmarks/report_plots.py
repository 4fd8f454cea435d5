"""The plots of docs/measured/, drawn from the records in benchmarks/results/ (report.py)."""
import statistics
from pathlib import Path

from benchmarks.tables import GPU_KERNELS, last

PLOTS = Path(__file__).parent.parent / "docs" / "measured"


def draw(records):
    """All plots for which there is a measurement; returns their names."""
    drawn = []
    newest = {}
    for record in records:
        if record["benchmark"] == "kernel" and record["device"] == "cuda":
            newest[record["op"], str(record["shape"]), record["direction"], record["dtype"]] = record
    measured = list(newest.values())
    losses = [last(records, "loss", device, model=model) for device, model in (("cuda", "baby"), ("cpu", "cpu"))]
    losses = [record for record in losses if record]
    panels = (("cuda", "gpt2", "GPT-2 124M, GPU"), ("cpu", "gpt2", "GPT-2 124M, CPU"), ("cpu", "cpu", "CPU recipe"))
    trained = [(title, last(records, "train", device, model=model)) for device, model, title in panels]
    trained = [(title, record) for title, record in trained if record]
    for name, data, function in (("bars", measured, draw_bars), ("roofline", measured, draw_roofline),
                                 ("scaling", measured, draw_scaling), ("loss", losses, draw_loss),
                                 ("train", trained, draw_train)):
        if data and function(data):
            drawn.append(name)
    return drawn


def figure(panels=1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(5.2 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(fig)  # draws without a display
    axes = fig.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save(fig, name):
    PLOTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(PLOTS / f"{name}.png", dpi=130)
    return True


def medians(record):
    return {name: statistics.median(samples) for name, samples in record["samples"].items()}


def draw_bars(measured):
    """Each op of the training step against its peers: forward and backward of one call, in us."""
    by_op = [record for op, shape in GPU_KERNELS for record in measured if record["op"] == op and record["shape"] == shape
             and record["direction"] == "both" and record["dtype"] == "bfloat16"]
    if not by_op:
        return False
    fig, axes = figure(len(by_op))
    for ax, record in zip(axes, by_op):
        median = sorted(medians(record).items(), key=lambda item: -item[1])
        ax.barh([name for name, _ in median], [1e6 * seconds for _, seconds in median],
                color=["tab:orange" if name.startswith("our") else "tab:gray" for name, _ in median])
        ax.set(title=record["op"], xlabel="us, forward + backward")
    return save(fig, "bars")


def draw_roofline(measured):
    fig, (ax,) = figure()
    limits = measured[-1]["limits"]
    intensities = [2.0 ** i for i in range(-4, 15)]
    ax.plot(intensities, [min(limits["copy"] * i, limits["matmul"]) / 1e12 for i in intensities], color="black",
            label="this GPU")
    for op in dict.fromkeys(record["op"] for record in measured):
        points = [(max(r["flops"], r["bytes"] / 16) / r["bytes"], r) for r in measured
                  if r["op"] == op and "ours" in r["samples"]]
        ax.plot([i for i, _ in points], [i * r["bytes"] / medians(r)["ours"] / 1e12 for i, r in points], "o", label=op)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte (ops without matmuls stand at 1/16)", ylabel="TFLOP/s")
    ax.legend(fontsize=7)
    return save(fig, "roofline")


def draw_scaling(measured):
    """Attention in T, the number of tokens fixed: TFLOP/s, forward and both."""
    points = [r for r in measured if r["op"] == "attention" and r["sweep"] == "T" and r["dtype"] == "bfloat16"]
    if len({r["shape"]["T"] for r in points}) < 2:
        return False
    fig, axes = figure(2)
    for ax, direction in zip(axes, ("forward", "both")):
        chosen = sorted((r for r in points if r["direction"] == direction), key=lambda r: r["shape"]["T"])
        for name in dict.fromkeys(name for r in chosen for name in r["samples"]):
            has = [r for r in chosen if name in r["samples"]]
            ax.plot([r["shape"]["T"] for r in has], [r["flops"] / medians(r)[name] / 1e12 for r in has], "o-", label=name,
                    linewidth=2.5 if name == "ours" else 1)
        ax.set(xscale="log", xlabel="T", ylabel="TFLOP/s", title="forward" if direction == "forward" else "forward + backward")
        ax.legend(fontsize=6)
    return save(fig, "scaling")


def draw_loss(losses):
    fig, axes = figure(len(losses))
    for ax, record in zip(axes, losses):
        for name, curve in record["curves"].items():
            ax.plot([p["seconds"] for p in curve], [p["val_loss"] for p in curve], "o-", markersize=3, label=name)
        ax.set(xlabel="seconds of training", ylabel="validation loss",
               title=f"{record['options']['model']}, {record['device']}")
        ax.legend()
    return save(fig, "loss")


def draw_train(trained):
    fig, axes = figure(len(trained))
    for ax, (title, record) in zip(axes, trained):
        rows = [(name, row["tokens_per_s"]) for name, row in record["variants"].items() if "tokens_per_s" in row]
        rows.sort(key=lambda row: row[1])
        ax.barh([name for name, _ in rows], [rate for _, rate in rows],
                color=["tab:gray" if name.startswith("nanoGPT") else "tab:orange" for name, _ in rows])
        ax.set(title=title, xlabel="tokens/s")
    return save(fig, "train")
