"""A run of a few seconds: a tiny text, a tiny GPT, and how to read back what a run logged."""
import json
from pathlib import Path

from nanogpt_fast.text import prepare
from nanogpt_fast.training.trainer import TrainOptions

TEXT = "".join(f"{i} times {i} is {i * i},\nand {i} plus one is {i + 1}.\n" for i in range(400))


def data(folder, name="sums", text=TEXT):
    """Prepare TEXT in folder/data; returns the options that name it."""
    prepare.write(text, Path(folder, "data", name), "char", say=lambda _: None)
    return dict(dataset=name, data_dir=str(Path(folder, "data")))


def options(folder, out="out", **changed):
    """TrainOptions of a tiny run in `folder`, which holds what `data` prepared."""
    given = dict(
        out_dir=str(Path(folder, out)), dataset="sums", data_dir=str(Path(folder, "data")), eval_interval=10, eval_iters=2,
        sample_tokens=0, gradient_accumulation_steps=1, batch_size=4, block_size=16, n_layer=2, n_head=2, n_embd=32,
        learning_rate=1e-2, max_iters=20, lr_decay_iters=20, warmup_iters=5, min_lr=1e-3, device="cpu", dtype="float32",
        compile=False, backend="reference")
    return TrainOptions(**{**given, **changed})


def words(o):
    """The options as words of the command line."""
    return [f"--{name}={value}" for name, value in vars(o).items() if value != ""]


def rows(o_or_folder):
    folder = getattr(o_or_folder, "out_dir", o_or_folder)
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def losses(o_or_folder):
    """{step: training loss}, every bit of it: json writes the shortest text that reads back as the same float."""
    return {row["iter"]: row["loss"] for row in rows(o_or_folder) if "loss" in row}


def evaluations(o_or_folder):
    """{step: (training loss, validation loss)} of the evaluations."""
    return {row["iter"]: (row["train_loss"], row["val_loss"]) for row in rows(o_or_folder) if "val_loss" in row}
