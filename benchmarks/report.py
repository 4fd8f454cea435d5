"""Turns benchmarks/results/ into the tables of README.md, docs/measured.md, docs/gpu.md and docs/swap.md, and into plots.

    python -m benchmarks.report                   print the generated sections
    python -m benchmarks.report --write           write them into those four files, and draw docs/measured/*.png
    python -m benchmarks.report --summary FILE    one screen of one results file

No figure there is typed by hand. Where something was measured more than once, the newest measurement counts; a row without one says
so. A section stands between `<!-- generated: NAME -->` and `<!-- end -->`, each name in exactly one file (`DOCUMENTS`).
tests/benchmarks/test_benchmarks.py checks that the files hold what this prints.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from benchmarks import RESULTS, optimizers, report_gpu, report_plots, swap_table
from benchmarks.tables import GPU_KERNELS, MISSING, device_of, last, read, small, spread, table, where  # noqa: F401 (tests take them from here)
from nanogpt_fast import cli, tables
from nanogpt_fast.bench.common import MODELS
from nanogpt_fast.bench.generate import percentiles
from nanogpt_fast.bench.train import TRAIN_VARIANTS, rival_of, strongest_of

ROOT = Path(__file__).parent.parent
PEERS = ("eager", "compile", "compile max-autotune", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "FlexAttention",
         "flash-attn", "Liger", "quack", "F.linear_cross_entropy")
# What a decoding step is made of.
GPU_STEPS = (("decode attention", dict(B=1, T=1024, H=12, D=64)), ("sampler", dict(rows=1, V=50304)))


# ------------------------------------------------------------------------------------------------------------------ tables

TRAIN_ROWS = ("nanoGPT", "nanoGPT compiled", "nanoGPT bf16 fused", "nanoGPT bf16 fused compiled", "one import", "one import compiled",
              "one import bf16", "our trainer", "our trainer compiled", "our trainer bf16", "our trainer bf16 compiled")


def train(records, device, model, title, batch_size=None):
    if batch_size is not None:
        records = [record for record in records if record["benchmark"] == "train" and record["shape"]["batch_size"] == batch_size]
    record = last(records, "train", device, model=model)
    if record is None:
        return f"**{title}**: {MISSING} (nanoGPT, one import, our trainer; each eager and compiled)"
    found, gpu = record["variants"], device == "cuda"
    # On a GPU nanoGPT compiled is what its user runs. On a CPU both are shown: as it is shipped, and with all that can be switched on.
    rivals, rows = [rival_of(found)] if gpu else [found.get("nanoGPT"), strongest_of(found)], []
    for name in [name for name in TRAIN_ROWS if not gpu or name in TRAIN_VARIANTS]:
        row = found.get(name, {})
        if batch_size is not None and not row:
            continue        # a table of one batch size has what was run
        if "tokens_per_s" not in row:
            rows.append([name, row.get("error", MISSING)] + [""] * 5)
            continue
        more = [f"{100 * row['mfu']:.1f} %" if row["mfu"] else ""] if gpu else []
        more.append(f"{row['peak_memory'] / 2**30:.2f} GiB" if row["peak_memory"] else "")
        ratios = [f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}" if rival and "tokens_per_s" in rival else ""
                  for rival in rivals]
        rows.append([name, f"{row['tokens_per_s']:,.0f}", *ratios, *more, f"{row['first_step_s']:.1f} s",
                     f"{100 * spread(row['samples']):.1f} %"])
    against = "times nanoGPT" + (" compiled" if "tokens_per_s" in found.get("nanoGPT compiled", ()) else "")
    ratios = [against, "MFU"] if gpu else ["times nanoGPT", "times its strongest"]
    head = ["", "tokens/s", *ratios, "peak memory", "first step", "spread"]
    return f"**{title}**\n\n" + table(head, rows) + small(record, lambda r: (
        f"{r['shape']['batch_size']} x {r['shape']['block_size']} tokens a step, {r['dtype']} unless said; nanoGPT is "
        f"{r['against']}; spread: half the width of the middle half of the samples"))


def trained_on_a_gpu(records):
    """GPT-2 124M at each batch size that was measured, the largest first; then the other models."""
    sizes = {record["shape"]["batch_size"] for record in records
             if record["benchmark"] == "train" and device_of(record) == "cuda" and record["options"]["model"] == "gpt2"}
    first = [train(records, "cuda", "gpt2", "GPT-2 124M", B) for B in sorted(sizes, reverse=True)]
    return first or [train(records, "cuda", "gpt2", "GPT-2 124M")]


def generate(records, device, batches=(1, 8, 64)):
    rows, shown = [], []
    if last(records, "generate", device, model="gpt2") is None:
        return f"**GPT-2 124M**, batch {', '.join(map(str, batches))}: {MISSING} (nanoGPT's loop, a plain KV cache, ours)"
    names = ["nanoGPT", "plain KV cache", "ours", *(["plain KV cache bf16", "ours bf16"] if device == "cpu" else [])]
    alone = {}  # tokens a second at batch 1
    for B in batches:
        record = last(records, "generate", device, model="gpt2", batch_size=B)
        shown += [record] if record else []
        found = record["variants"] if record else {}
        for name in names:
            if name not in found:
                rows.append([B, name, MISSING, "", "", "", "", "", ""])
                continue
            row = found[name]
            alone |= {name: row} if B == 1 else {}
            rivals = found.get("nanoGPT"), found.get("plain KV cache bf16" if name.endswith("bf16") else "plain KV cache"), alone.get(name)
            ratios = [f"{row['tokens_per_s'] / rival['tokens_per_s']:,.1f}" if rival else "" for rival in rivals]
            rows.append([B, name, f"{row['tokens_per_s']:,.0f}", *ratios, f"{100 * row['of_limit']:.0f} %",
                         f"{1e3 * row['prefill_s']:,.1f} ms", percentiles(row["latency"])])
    head = ["batch", "", "tokens/s", "times nanoGPT", "times a plain cache", "times batch 1", "of the memory limit", "prefill", "ms a token: median, 90 %, 99 %"]
    return table(head, rows) + small(shown[-1] if shown else None, lambda r: (
        f"GPT-2 124M, {r['prompt']} tokens of prompt, {r['dtype']} unless said; nanoGPT is {r['against']}; the limit: weights "
        f"and cache read once a step at the {r['limits']['memory'] / 1e9:,.0f} GB/s that the same run reached"), shown)


def kernels(records, device="cuda"):
    rows, shown = [], []
    wanted = [(op, shape, direction) for op, shape in GPU_KERNELS for direction in ("forward", "both")]
    wanted += [(op, shape, "forward") for op, shape in GPU_STEPS]
    for op, shape, direction in wanted:
        record = last(records, "kernel", device, op=op, shape=shape, direction=direction, dtype="bfloat16")
        shown += [record] if record else []
        size = ", ".join(f"{key}={value:,}" for key, value in shape.items())
        way = "forward" if direction == "forward" else "forward + backward"
        rows.append([op, size, way, *(kernel_row(record) if record else [MISSING, "", "", "", ""])])
    head = ["op", "shape", "", "ours, us", "of the limit", "eager, us", "torch.compile, us", "fastest peer, us"]
    return table(head, rows) + small(shown[-1] if shown else None, lambda r: (
        "bf16; medians, cold caches; the limit is the copy bandwidth or matmul rate that the same run reached "
        f"({r['limits']['copy'] / 1e12:.2f} TB/s, {r['limits']['matmul'] / 1e12:.0f} TFLOP/s)"), shown)


def kernel_row(record):
    median = {name: statistics.median(samples) for name, samples in record["samples"].items()}
    us = {name: f"{1e6 * seconds:,.1f}" for name, seconds in median.items()}
    peers = {name: seconds for name, seconds in median.items() if name in PEERS}
    best = min(peers, key=peers.get, default=None)
    limit = limit_share(record, median["ours"]) if "ours" in median else None
    return [us.get("ours", record["absent"].get("ours", MISSING)), "" if limit is None else f"{100 * limit:.0f} %",
            us.get("eager", ""), us.get("compile", ""), f"{us[best]} ({best})" if best else ""]


def limit_share(record, seconds):
    done = record["bytes"] if record["bound"] == "copy" else record["flops"]
    return done / seconds / record["limits"][record["bound"]]


def sampler(records, device):
    titles = list(dict.fromkeys(r["row"] for r in records if r["benchmark"] == "sampler" and device_of(r) == device))
    found = [last(records, "sampler", device, row=title) for title in titles]
    rows = []
    for record in found:
        median, rival = record["median"], record["rival"]
        for name in median:
            if name != rival:
                rows.append([record["row"], name, f"{1e6 * median[name]:,.0f}", f"{1e6 * median[rival]:,.0f} ({rival})",
                             f"{median[rival] / median[name]:.1f}"])
    rows = rows or [["1 row, top_k=200", "sampler", MISSING, "", ""]]
    return table(["logits, V = 50,304", "", "us", "against, us", "times as fast"], rows) + small(found[-1] if found else None)


def drop_in(records):
    rows, newest = [], last(records, "import", "cpu")
    seconds = f"{newest['seconds']:.2f} s" if newest else MISSING
    rows.append(["`import nanogpt_fast` beyond `import torch`", seconds, ""])
    for shape in ("GPT-2 124M, B=4, T=256", "CPU recipe, B=12, T=64"):
        record = last(records, "training step, eager fp32 reference", "cpu", shape=shape)
        newest = record or newest
        rows.append([f"training step, eager fp32, {shape}", f"{record['ratio']:.3f} of nanoGPT's time" if record else MISSING,
                     f"{record['memory_ratio']:.3f} of its peak memory" if record else ""])
    for op in ("layer_norm", "add_layer_norm", "causal_attention_qkvpacked", "causal_attention"):
        record = last(records, "overhead", op=op)
        found = record["microseconds"]["forward + backward"] if record else None
        rows.append([f"the host's part of `{op}`, forward + backward, without its launches",
                     f"{found['op']:.0f} us" if found else MISSING, f"{found['ratio']:.2f} of a bare autograd.Function's" if found else ""])
    return table(["what the drop-in costs beside its kernels", "", ""], rows) + small(newest)


def loss(records, device):
    models = ("baby",) if device == "cuda" else ("cpu",)
    rows, newest = [], None
    for model in models:
        record = last(records, "loss", device, model=model)
        newest = record or newest
        if record is None:
            rows.append([model, MISSING, "", "", ""])
            continue
        for name, curve in record["curves"].items():
            end = curve[-1]
            rows.append([model, name, f"{end['step']:,}", f"{end['val_loss']:.4f}", f"{end['seconds']:,.1f} s"])
    return table(["model", "", "steps", "validation loss", "after"], rows) + small(
        newest, lambda r: f"the same text, batches and initial weights, in turns; {r['dtype']}{_untimed(r)}")


def _untimed(record):
    """What stood before the clock of a loss curve, as text."""
    untimed = record.get("untimed")
    if not untimed or not untimed["steps"]:
        return ""
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in untimed["seconds"].items())
    return f"; without the first {untimed['steps']} steps, which compile ({took})"


def recipes(records):
    """Runs whose end is known: the demo, and nanoGPT's CPU recipe (1.88 +- 0.05)."""
    rows = []
    for name in ("demo", "nanoGPT's CPU recipe on tinyshakespeare", "nanoGPT's CPU recipe on tinyshakespeare, its own calls in float32"):
        record = last(records, "recipe", name=name)
        rows.append([name, MISSING, "", ""] if record is None else
                    [name, f"{record['val_loss']:.4f}", f"{record['steps']:,}", f"{record['seconds']:,.0f} s"])
    text = table(["run", "validation loss", "steps", "time in all"], rows)
    newest = last(records, "recipe")
    commands = [f"`{r['command']}`" for r in (last(records, "recipe", name=row[0]) for row in rows[1:]) if r]
    return "\n\n".join([text, *commands, *([where(newest)] if newest else [])])


def ladder():
    """The table and the plot that `nanogpt-fast ladder` made."""
    path = RESULTS / "ladder.md"
    if not path.exists():
        return f"`nanogpt-fast ladder`: {MISSING}"
    return path.read_text().split("\n\n**")[0] + "\n\n![ladder](ladder.png)"


def gate():
    """Registers, shared memory and floors of the kernels of a training step, from the compile gate."""
    path = RESULTS / "gate.json"
    rows = [row for row in json.loads(path.read_text())] if path.exists() else []
    rows = [row for row in rows if row["arch"] == 90 and row["in_model"]]
    body = [[f"`{r['name']}`", r["tile_row"], r["registers"], r["spill_bytes"], f"{r['shared'] / 1024:.0f} KiB",
             r["resident_blocks"], "" if r["floor_us"] is None else f"{r['floor_us']:,.0f}", f"{r['compile_seconds']:.1f}"]
            for r in rows]
    head = ["kernel, compiled for sm_90", "tile", "registers", "spill, B", "shared", "blocks/SM", "floor, us", "compile, s"]
    return table(head, body or [[MISSING] + [""] * 7])


def command_output(name):
    path = RESULTS / f"{name}.txt"
    if not path.exists():
        return f"`nanogpt-fast {name}`: {MISSING}"
    return f"```\n$ nanogpt-fast {name}\n{shorten(path.read_text().strip())}\n```"


def shorten(text, head=30, tail=8, width=150):
    """A long output's beginning and end."""
    lines = [line if len(line) <= width else line[:width - 3] + "..." for line in text.splitlines()]
    if len(lines) > head + tail:
        lines = lines[:head] + [f"... {len(lines) - head - tail} more lines ..."] + lines[-tail:]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- documents

def front_page(records):
    """{name: markdown} of the generated sections of README.md."""
    return {"result": result(records), "at a glance": at_a_glance(records), "sample": sample()}


def measured(records):
    """{name: markdown} of the generated sections of docs/measured.md."""
    return {
        "train on a GPU": "\n\n".join([*trained_on_a_gpu(records), *(train(records, "cuda", model, title) for model, title in (
            ("gpt2-medium", "GPT-2 350M"), ("baby", "baby character GPT")))]),
        "generate on a GPU": generate(records, "cuda"),
        "kernels on a GPU": kernels(records) + image("bars") + image("roofline") + image("scaling"),
        "train on a CPU": "\n\n".join(train(records, "cpu", model, title) for model, title in (
            ("gpt2", "GPT-2 124M"), ("cpu", "nanoGPT's CPU recipe, 0.8M parameters"))) + image("train"),
        "generate on a CPU": generate(records, "cpu", (1, 8)),
        "sampler": sampler(records, "cpu"),
        "drop-in": drop_in(records),
        "loss against time": loss(records, "cuda") + "\n\n" + loss(records, "cpu") + image("loss"),
        "optimizers": optimizers.section(records),
        "recipes": recipes(records),
        "ladder": ladder(),
        "compile gate": gate(),
        "doctor": command_output("doctor"),
        "verify": command_output("verify"),
    }


DOCUMENTS = {"README.md": front_page, "docs/measured.md": measured, "docs/gpu.md": report_gpu.sections, "docs/swap.md": swap_table.sections,
             "docs/tune.md": lambda records: {"tune": command_output("tune")}}


def result(records):
    """The result that README.md begins with."""
    told = {"nanoGPT compiled", "one import", "our trainer"}
    record = last([r for r in records if told <= _timed(r)], "train", "cuda", model="gpt2", batch_size=64)
    if record is None:
        return f"On a GPU: {MISSING}."
    rate = {name: row["tokens_per_s"] for name, row in record["variants"].items() if "tokens_per_s" in row}
    rival, e = rate["nanoGPT compiled"], record["environment"]
    return (f"**GPT-2 124M on one {e['gpu']}: {rate['our trainer']:,.0f} tokens/s with our trainer, {rate['our trainer'] / rival:.2f} times "
            f"nanoGPT under torch.compile ({rival:,.0f}); with one import changed and nothing compiled "
            f"{rate['one import'] / rival:.2f} times.** In {record['variants']['our trainer']['peak_memory'] / 2**30:.0f} GiB "
            f"instead of {record['variants']['nanoGPT compiled']['peak_memory'] / 2**30:.0f} ([docs/gpu.md](docs/gpu.md)).")


# README.md's table: (what, device, benchmark, the fastest that is not ours, ours, what the record must have).
GLANCE = (
    ("train GPT-2 124M, {batch_size} x {block_size} tokens a step", "cuda", "train", "nanoGPT compiled", "our trainer", dict(model="gpt2", batch_size=64)),
    ("the same script, one import changed", "cuda", "train", "nanoGPT compiled", "one import", dict(model="gpt2", batch_size=64)),
    ("train the baby character GPT, {batch_size} x {block_size} tokens a step", "cuda", "train", "nanoGPT compiled", "our trainer", dict(model="baby")),
    ("generate, GPT-2 124M, one sequence", "cuda", "generate", "nanoGPT", "ours", dict(model="gpt2", batch_size=1)),
    ("train GPT-2 124M, {batch_size} x {block_size} tokens a step", "cpu", "train", "nanoGPT bf16 fused compiled", "our trainer bf16", dict(model="gpt2")),
    ("generate, GPT-2 124M, one sequence", "cpu", "generate", "plain KV cache bf16", "ours bf16", dict(model="gpt2", batch_size=1)),
)


def at_a_glance(records):
    """README.md's one table. It has only what was measured; docs/measured.md names what was not."""
    rows = []
    for what, device, benchmark, rival, ours, fields in GLANCE:
        record = last([r for r in records if {rival, ours} <= _timed(r)], benchmark, device, **fields)
        if record is not None:
            theirs, mine = (record["variants"][name]["tokens_per_s"] for name in (rival, ours))
            e = record["environment"]
            machine = e["gpu"] if device == "cuda" else f"{e['cpu']}, {e['threads']} threads"
            rows.append([what.format_map(record.get("shape", {})), machine, f"{theirs:,.0f} ({rival})", f"{mine:,.0f} ({ours})", f"{mine / theirs:.2f}"])
    return table(["", "on", "the fastest other, tokens/s", "nanogpt_fast, tokens/s", "times"], rows or [[MISSING, "", "", "", ""]])


def _timed(record):
    """The names of the variants of an end-to-end record that have a rate."""
    return {name for name, row in record.get("variants", {}).items() if "tokens_per_s" in row}


def sample():
    """What a model that `nanogpt-fast demo` has just trained writes."""
    path = RESULTS / "demo.txt"
    if not path.exists():
        return f"`nanogpt-fast demo`: {MISSING}"
    completion = re.search(r"^The prompt .*?(?=^\d+ seconds, )", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return f"```text\n$ nanogpt-fast demo\n...\n{completion[0].rstrip()}\n```"


def image(name):
    """A line that shows a plot in docs/measured.md, or nothing where it was not drawn."""
    return f"\n\n![{name}](measured/{name}.png)" if (report_plots.PLOTS / f"{name}.png").exists() else ""


MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text, found):
    """A document's text with its generated sections replaced.

    Raises ValueError for a marker that nothing fills, for a section that has no marker, and for a marker that stands there twice.
    """
    marked = [name for _, name, _ in MARKED.findall(text)]
    for name in marked:
        if name not in found:
            raise ValueError(f"there is a marker for a section {name!r}; the report has {', '.join(found)}")
    for name in found:
        if marked.count(name) != 1:
            raise ValueError(f"the marker <!-- generated: {name} --> stands there {marked.count(name)} times; expected once")
    return MARKED.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n\n{match[3]}", text)


# ----------------------------------------------------------------------------------------------------------------- summary

def summary(records, format="text"):
    """One screen of a run: a table of training, of generation, and of the first kernels."""
    trained, generated, timed = [], [], []
    for model in MODELS:
        record = last(records, "train", model=model)
        if record:
            rival, shape = rival_of(record["variants"]), record["shape"]
            for name, row in record["variants"].items():
                what = (f"{model}, {shape['batch_size']} x {shape['block_size']}, against {record['against']}", name)
                trained.append((*what, row["error"], "", "", "") if "tokens_per_s" not in row else (
                    *what, f"{row['tokens_per_s']:,.0f}", f"{100 * row['mfu']:.1f} %" if row["mfu"] else "",
                    f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}" if rival else "", f"{row['first_step_s']:.0f} s"))
    for B in sorted({r["batch_size"] for r in records if r["benchmark"] == "generate"}):
        for name, row in last(records, "generate", batch_size=B)["variants"].items():
            generated.append((B, name, f"{row['tokens_per_s']:,.0f}", f"{100 * row['of_limit']:.0f} %"))
    for record in [r for r in records if r["benchmark"] == "kernel"][:20]:
        ours, share, _, compiled, best = kernel_row(record)
        shape = " ".join(f"{key}={value}" for key, value in record["shape"].items())
        timed.append((record["op"], record["direction"], shape, ours, share, compiled, best))
    parts = ((trained, ("train", "", "tokens/s", "MFU", "x nanoGPT", "first step"), "llr"),
             (generated, ("generate, batch", "", "tokens/s", "of the memory limit"), "llr"),
             (timed, ("op", "", "shape", "ours, us", "of limit", "compile, us", "best peer, us"), "lllr"))
    return "\n\n".join(tables.table(head, rows, format, align) for rows, head, align in parts if rows) or "nothing was measured"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the documents' generated sections and the plots")
    parser.add_argument("--summary", metavar="FILE", help="one screen of this results file")
    tables.add_format(parser)
    args = parser.parse_args(argv)
    if args.summary:
        path = Path(args.summary)
        print(summary(read(path) if path.exists() else [], args.format))
        return
    records = read()
    if args.write:
        print("drawn: " + (", ".join(report_plots.draw(records)) or "nothing"))
        for name, found in DOCUMENTS.items():
            document = ROOT / name
            try:
                text = fill(document.read_text(encoding="utf-8"), found(records))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            document.write_text(text, encoding="utf-8")
        return
    for found in DOCUMENTS.values():
        for name, text in found(records).items():
            print(f"<!-- generated: {name} -->\n\n{text}\n\n<!-- end -->\n")


if __name__ == "__main__":
    sys.exit(cli.until_nobody_reads(main))
