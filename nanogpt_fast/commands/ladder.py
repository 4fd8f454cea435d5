"""`nanogpt-fast ladder`: train the models of classic.py, from the bigram to the GPT, on the same text for the same number of tokens.

Five rungs, each adding one idea, and what each idea is worth: one table (parameters, steps, time, losses), one plot, and a sample of
text from each model. The GPT, the last rung, is saved as nanoGPT's ckpt.pt, for `nanogpt-fast chat`.
"""
import contextlib
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .. import classic, devices, options, tables
from ..checkpoints import convert
from ..files import replacing
from ..options import option
from ..text import prepare
from ..text.tokens import TokenCheck, open_tokens

# The best of a few, a factor of 3 apart, after 300 steps with the default settings (1,000 for the bigram); the GPT's was not tuned.
# The smaller the model, the further each weight has to travel: every entry of the bigram's table has to find its own value.
LEARNING_RATE = {"bigram": 3e-2, "one head": 3e-3, "many heads": 3e-3, "block": 1e-3, "GPT": 1e-3}


@dataclass
class LadderOptions:
    """Train bigram, one head, many heads, one block and a GPT on the same text for the same number of tokens; compare them.

    Writes to out_dir: ladder.md (the table and a sample of each), ladder.png, ladder.json (every figure), ckpt.pt (the GPT).
    About 3 minutes on 2 CPU cores.
    """

    data: str = option("embedded", "a corpus (embedded, shakespeare_char), a prepared folder, a text file or a folder of them",
                       alias="dataset", positional=True)
    out_dir: str = option("out-ladder", "where the results are written")
    data_dir: str = option("data", "where data sets live")
    steps: int = option(700, "training steps of each model", minimum=1)
    batch_size: int = option(32, "sequences per step", minimum=1)
    block_size: int = option(64, "T: the context, in tokens", minimum=1)
    n_layer: int = option(4, "blocks of the GPT", minimum=1)
    n_head: int = option(4, "heads of all but `one head`", minimum=1)
    n_embd: int = option(128, "C: width of all but the bigram", minimum=1)
    dropout: float = option(0.0, "probability", minimum=0, below=1)
    sample_tokens: int = option(200, "length of each sample", minimum=0)
    seed: int = option(1337, "of weights, batches and samples: the same for every model")
    device: str = option("auto", "auto, cpu, cuda, mps, ...")
    format: str = tables.format_option()


def main(argv):
    """The command `nanogpt-fast ladder`."""
    o = options.parse(LadderOptions, argv, "nanogpt-fast ladder")
    device = devices.make_current(devices.choose_device(o.device))
    folder = prepare.find(o.data, o.data_dir)
    tokenizer = prepare.load_tokenizer(folder)
    with contextlib.closing(TokenCheck(folder, tokenizer.vocab_size, o.block_size)) as check:
        check.wait()
    train_data, val_data = (torch.from_numpy(open_tokens(folder / f"{split}.bin", o.block_size).astype("int64"))
                            for split in ("train", "val"))
    if tokenizer.vocab_size > 8192:
        raise ValueError(f"{folder} has a vocabulary of {tokenizer.vocab_size:,}, and the bigram's table is its square; prepare "
                         "the text with --tokenizer=char, or with --tokenizer=word --vocab_size=4096")
    config = classic.ClassicConfig(
        vocab_size=tokenizer.vocab_size, block_size=o.block_size, n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd,
        dropout=o.dropout, tied=True)  # tied, so that the GPT fits nanoGPT's layout as it is
    out_dir = Path(o.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    aside = tables.aside(o.format)
    print(f"{len(train_data):,} tokens of {o.data} to train on, {len(val_data):,} to validate on, a vocabulary of "
          f"{tokenizer.vocab_size}; {o.steps:,} steps of {o.batch_size} x {o.block_size} tokens for each model, "
          f"on {devices.describe(device)}\n", file=aside)

    rows = []
    for name, build in classic.LADDER.items():
        torch.manual_seed(o.seed)
        model = build(config).to(device)
        row = climb(name, model, train_data, val_data, tokenizer, o)
        rows.append(row)
        print(f"{name}: validation loss {row['val_loss']:.3f} after {row['seconds']:.0f} s", file=aside, flush=True)
        if row["sample"]:
            print(f"{_indented(row['sample'])}\n", file=aside, flush=True)
    report = {"settings": asdict(o) | {"out_dir": out_dir.name}, "device": devices.describe(device), "torch": torch.__version__,
              "python": platform.python_version(), "vocab_size": tokenizer.vocab_size, "models": rows}
    with replacing(out_dir / "ladder.json") as f:
        f.write(json.dumps(report, indent=1).encode() + b"\n")
    with replacing(out_dir / "ladder.md") as f:
        f.write(markdown(report).encode("utf-8", "surrogatepass"))
    draw(report, out_dir / "ladder.png")
    convert.save_gpt(out_dir / "ckpt.pt", convert.to_gpt(model), tokenizer, iter_num=o.steps, best_val_loss=row["val_loss"],
                     config={"dataset": folder.name})
    print(table(rows, o.format))
    print(f"\nWritten to {out_dir}/: ladder.md, ladder.png, ladder.json, and the GPT as ckpt.pt.\n"
          f"For more of its text: nanogpt-fast chat --out_dir={out_dir}", file=aside)


def climb(name, model, train_data, val_data, tokenizer, o):
    """Train one model and draw a sample from it; returns its row of the table, with the history of its losses."""
    with tqdm(total=o.steps, desc=f"{name:>10}", leave=False, disable=None) as bar:  # None: no bar unless on a terminal
        def log(step, record):
            bar.update(step - bar.n)
            if record is not None:
                bar.set_postfix(val_loss=f"{record['val_loss']:.3f}")
        history = classic.train(model, train_data, val_data, steps=o.steps, batch_size=o.batch_size,
                                learning_rate=LEARNING_RATE[name], eval_interval=max(1, o.steps // 10), log=log)
    model.eval()
    torch.manual_seed(o.seed)
    start = train_data[:1].to(next(model.parameters()).device)[None]
    sample = tokenizer.decode(model.generate(start, o.sample_tokens, temperature=0.8)[0, 1:])
    return {"name": name, "parameters": sum(p.numel() for p in model.parameters()), "learning_rate": LEARNING_RATE[name],
            **history[-1], "history": history, "sample": sample}


COLUMNS = (("model", "{name}"), ("parameters", "{parameters:,}"), ("steps", "{step:,}"), ("tokens", "{tokens:,}"),
           ("time", "{seconds:.0f} s"), ("training loss", "{train_loss:.3f}"), ("validation loss", "{val_loss:.3f}"))


def table(rows, format):
    """The comparison of the models."""
    return tables.table([title for title, _ in COLUMNS], [[form.format(**row) for _, form in COLUMNS] for row in rows], format)


def markdown(report):
    """ladder.md: the table, then a sample of each model."""
    o = report["settings"]
    parts = [f"Each model on {o['data']} for {o['steps']:,} steps of {o['batch_size']} x {o['block_size']} tokens. Losses in "
             f"nats per token; a uniform guess has a loss of {math.log(report['vocab_size']):.2f}. "
             f"{report['device']}, torch {report['torch']}.",
             table(report["models"], "markdown")]
    parts += [f"**{row['name']}** writes:\n\n{_indented(row['sample'])}" for row in report["models"] if row["sample"]]
    return "\n\n".join(parts) + "\n"


def _indented(text):
    return "\n".join("    " + line for line in text.split("\n"))


def draw(report, path):
    """The validation losses over the tokens seen, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user's pyplot has
    axes = figure.subplots()
    for row in report["models"]:
        history = row["history"][1:]  # before the first step all models guess, some worse than uniformly
        axes.plot([record["tokens"] for record in history], [record["val_loss"] for record in history], marker=".",
                  label=f"{row['name']}  {row['val_loss']:.2f}")
    axes.set(xlabel="tokens seen", ylabel="validation loss (nats per token)", title="What each idea is worth")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}M" if tokens else "0")
    axes.grid(alpha=0.3)
    axes.legend(title="model, final loss")
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=120)
