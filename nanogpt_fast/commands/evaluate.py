"""`nanogpt-fast eval`: how well a GPT predicts a text, and how often it chooses the right one of several endings.

A text is measured over every token, not over a sample: a window of block_size tokens moves by `stride`, and each token is scored once, in
the first window that holds it. So all but those of the first window have at least block_size - stride + 1 tokens before them. The first
token of all has none, and is not scored.

    loss           mean of -ln p over the scored tokens, in nats, as in training
    perplexity     e^loss
    bits per byte  the bits of all scored tokens over the bytes of UTF-8 that they stand for: the figure to compare models of different
                   tokenizers by. The token <|endoftext|> costs bits and stands for no byte

HellaSwag (Zellers et al. 2019) is measured by the rule of EleutherAI's lm-evaluation-harness: the ending with the largest sum of
log-likelihoods, and the one with the largest sum over its number of characters.
"""
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .. import backend as ops_backend, devices, options, tables
from ..checkpoints.huggingface import SIZES
from ..options import option
from ..text import corpora, prepare, tokenizers
from ..text.tokens import bad_id, open_tokens
from .sampling import open_model


@dataclass
class EvalOptions:
    """Measure a GPT on a text, over every token of it: loss, perplexity and bits per byte; or on HellaSwag's questions.

    Examples: nanogpt-fast eval --out_dir=out; nanogpt-fast eval book.txt --out_dir=out; nanogpt-fast eval data/openwebtext
    --init_from=gpt2; nanogpt-fast eval --hellaswag=hellaswag_val.jsonl --init_from=gpt2
    """

    data: str = option("", "a data set or its folder, a token file (.bin), or a text as in `prepare`, whose tokens are all scored; empty: "
                       "the data set that the checkpoint was trained on", positional=True, section="What to measure on")
    split: str = option("val", "of a data set", choices=("val", "train"))
    field: str = option("text", "of .jsonl and .parquet texts: the field that holds the text")
    data_dir: str = option("data", "where data sets live")
    stride: int | None = option(None, "tokens by which the window moves (None: half of block_size; block_size: no overlap, fastest)",
                                minimum=1)
    hellaswag: str = option("", "a file of questions, as hellaswag_val.jsonl has them, to measure on in place of a text")
    init_from: str = option("resume", "resume (the checkpoint in out_dir) | gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
                            "folder with such weights", section="Model")
    out_dir: str = option("out", "where the checkpoint is (ckpt.pt), or a checkpoint file itself")
    format: str = tables.format_option(section="Output")
    json: bool = option(False, "print one JSON object in place of the table")
    batch_size: int | None = option(None, "windows at a time (None: 8,192 tokens)", minimum=1, section="Machine")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "of the forward pass; the others are faster on GPUs, and less exact",
                        choices=("float32", "bfloat16", "float16"))
    backend: str = option("auto", "implementation of the ops: auto, fused, reference, or one by one as in auto,attention=reference")

    def __post_init__(self):
        ops_backend.parse(self.backend)
        if self.init_from not in ("resume", *SIZES) and not Path(self.init_from).is_dir():
            raise ValueError(f"init_from is {self.init_from!r}; expected resume, {', '.join(SIZES)}, or a folder of GPT-2 weights")
        if self.hellaswag and self.data:
            raise ValueError(f"data is {self.data!r} and hellaswag {self.hellaswag!r}; one run measures on one of them")


def main(argv):
    """The command `nanogpt-fast eval`."""
    o = options.parse(EvalOptions, argv, "nanogpt-fast eval")
    device = devices.make_current(devices.choose_device(o.device))
    model, tokenizer, about = open_model(o, device, only_ids=True)
    context = devices.autocast(device, devices.choose_dtype(o.dtype, device))
    began = time.perf_counter()
    if o.hellaswag:
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer to encode the questions with: {about['no_tokenizer']}")
        with context:
            found = {"data": o.hellaswag, **hellaswag(model, tokenizer, read_questions(o.hellaswag), device)}
    else:
        where, tokens, tokenizer = find_tokens(o, tokenizer, about, model.config.vocab_size)
        with context:
            found = {"data": str(where), **measure(model, tokens, tokenizer, o.stride, o.batch_size, device, where)}
    found = {"model": str(about.get("path", o.init_from)), **found, "device": devices.describe(device), "dtype": o.dtype,
             "seconds": round(time.perf_counter() - began, 3)}
    if o.json:
        print(json.dumps(found))
        return
    print(f"{found['model']} on {found['data']} ({found['device']}, {found['dtype']}, {found['seconds']:.1f} s)",
          file=tables.aside(o.format))
    print(table(found, o.format))


# ------------------------------------------------------------------------------------------------------------ a text

def find_tokens(o, tokenizer, about, vocab_size):
    """(where they are from, tokens (N,), tokenizer or None) of what --data names. Raises FileNotFoundError, ValueError."""
    config = about.get("config") or {}
    if not o.data:
        if not config.get("dataset"):
            raise ValueError(f"{o.init_from if o.init_from != 'resume' else o.out_dir} does not say what it was trained on: name a data "
                             "set, a token file or a text (nanogpt-fast eval DATA)")
        data_dir = o.data_dir if options.is_given(o, "data_dir") else config.get("data_dir") or o.data_dir
        folder = prepare.prepared(config["dataset"], data_dir, of_text=True)
        if folder is None:
            raise FileNotFoundError(f"the data set {config['dataset']!r} that this model was trained on is not in {data_dir}: name "
                                    "another, or a text (nanogpt-fast eval DATA), or its --data_dir")
        path = folder / f"{o.split}.bin"
    elif o.data.endswith(".bin") and Path(o.data).is_file():
        path = Path(o.data)
    elif (folder := prepare.prepared(o.data, o.data_dir)) is not None:
        path = folder / f"{o.split}.bin"
    else:
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer to encode {o.data} with: {about['no_tokenizer']}")
        between = "\n" if tokenizer.end_of_text is None else tokenizers.END_OF_TEXT
        try:
            text = corpora.Text(o.data, o.field, between)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; nor is it a data set in {o.data_dir}") from None
        anywhere = isinstance(tokenizer, tokenizers.CharTokenizer)
        ids = [np.array(tokenizer.encode(part), dtype=np.int32) for part in tokenizers.chunks(text, anywhere)]
        return o.data, np.concatenate(ids), tokenizer
    theirs = _tokenizer_of(path.parent)
    if theirs is not None and tokenizer is not None and theirs != tokenizer:
        raise ValueError(f"{path} was made with another vocabulary ({theirs}) than the model's ({tokenizer}): the same ids mean other "
                         "text. Measure on the text itself: nanogpt-fast eval FILE")
    return path, open_tokens(path), tokenizer or theirs


def _tokenizer_of(folder):
    """The tokenizer that a folder says it has, or None if it says none or a package is missing."""
    if not any((folder / name).exists() for name in prepare.VOCABULARIES):
        return None
    try:
        return prepare.load_vocabulary(folder)[1]
    except RuntimeError:
        return None


def measure(model, tokens, tokenizer=None, stride=None, batch_size=None, device="cpu", where="this text"):
    """The loss over every token but the first: a dict with tokens, scored, bytes, loss, perplexity, bits_per_byte, block_size, stride.

    tokens: (N,) ids, an array or a memory map. tokenizer: says how many bytes they stand for; without one, and for a text with unknown
    words, bytes and bits_per_byte are None. stride, batch_size: as in EvalOptions. Raises ValueError for ids outside of the vocabulary and a loss that is not finite.
    """
    N = len(tokens)
    if N < 2:
        raise ValueError(f"{where} holds {N} token(s); the first of a text is not scored, so it needs at least 2")
    block_size = model.config.block_size
    stride = stride or max(block_size // 2, 1)
    if stride > block_size:
        raise ValueError(f"stride is {stride}; expected at most the model's block_size, {block_size}: a larger one leaves tokens out")
    T = min(block_size, N - 1)
    ends = np.append(np.arange(T, N - 1, stride), N - 1)    # each window predicts tokens[end - T + 1 : end + 1] ...
    new = np.diff(ends, prepend=0)                          # ... and this many of them, at its end, for the first time
    nats, batch_size = 0.0, batch_size or max(8192 // T, 1)
    for start in tqdm(range(0, len(ends), batch_size), unit="batch", leave=False, disable=None, file=sys.stderr):
        end, count = ends[start:start + batch_size, None], new[start:start + batch_size, None]
        windows = torch.from_numpy(tokens[end - T + np.arange(T + 1)].astype(np.int64))    # (B, T + 1)
        if windows.max() >= model.config.vocab_size:
            b, t = map(int, (windows >= model.config.vocab_size).nonzero()[0])
            raise bad_id(where, windows[b, t].item(), int(end[b, 0]) - T + t, model.config.vocab_size)
        y = windows[:, 1:].clone()
        y[torch.arange(T) < torch.from_numpy(T - count)] = -1
        with torch.no_grad():
            loss = model(windows[:, :-1].to(device), y.to(device), return_logits=False)[1]
        nats += loss.item() * int(count.sum())
    if not math.isfinite(nats):
        raise ValueError(f"the loss is {nats}: the model's weights are not all finite, or too large for this --dtype")
    size = None if tokenizer is None else text_bytes(tokens, tokenizer)
    loss = nats / (N - 1)
    return {"tokens": N, "scored": N - 1, "bytes": size, "loss": loss, "perplexity": math.exp(loss) if loss < 700 else None,
            "bits_per_byte": nats / math.log(2) / size if size else None, "block_size": block_size, "stride": stride}


def text_bytes(tokens, tokenizer):
    """How many bytes of UTF-8 the tokens but the first stand for; None if one is an unknown word, or no word of the tokenizer's."""
    lengths = np.array([math.nan if length is None else length for length in tokenizer.byte_lengths()])
    counts = np.zeros(0, dtype=np.int64)
    for start in range(1, len(tokens), 1 << 20):
        more = np.bincount(tokens[start:start + (1 << 20)], minlength=len(counts))
        more[:len(counts)] += counts
        counts = more
    met = counts.nonzero()[0]
    if met[-1] >= len(lengths):
        return None
    total = (counts[met] * lengths[met]).sum()
    return None if math.isnan(total) else int(total)


# ------------------------------------------------------------------------------------------------------------ HellaSwag

def read_questions(path):
    """[(context, [ending, ...], index of the right one)] of a file as hellaswag_val.jsonl. Raises ValueError that names the line."""
    questions = []
    for number, line in enumerate("".join(corpora.Text(path, corpora.RAW)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
            endings, right = [_clean(ending) for ending in row["endings"]], int(row["label"])
            if not (len(endings) > 1 and all(endings) and 0 <= right < len(endings)):
                raise ValueError(f"{len(endings)} endings, the right one {right}; expected two or more, none empty, counted from 0")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a question of HellaSwag ({type(error).__name__}: {error}). It is a JSON object "
                             "with activity_label, ctx_a, ctx_b, endings and label") from None
        questions.append((context, endings, right))
    return questions


def _clean(text):
    """The text without WikiHow's marks, as the harness reads it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(model, tokenizer, questions, device="cpu"):
    """{"questions", "accuracy", "accuracy_per_character", "standard_error", "standard_error_per_character"}: how often the right ending has
    the largest log-likelihood, and the largest log-likelihood per character.

    questions: as `read_questions` returns them. Where a question is longer than the context, its beginning is left out.
    """
    hits = [0, 0]
    for context, endings, right in tqdm(questions, unit="question", leave=False, disable=None, file=sys.stderr):
        scores = log_likelihoods(model, tokenizer, context, endings, device)
        per_character = [score / len(ending) for score, ending in zip(scores, endings)]
        for i, found in enumerate((scores, per_character)):
            hits[i] += found.index(max(found)) == right
    n = len(questions)
    accuracy = [hit / n for hit in hits]
    errors = [math.sqrt(p * (1 - p) / max(n - 1, 1)) for p in accuracy]
    return {"questions": n, "accuracy": accuracy[0], "accuracy_per_character": accuracy[1], "standard_error": errors[0],
            "standard_error_per_character": errors[1]}


@torch.no_grad()
def log_likelihoods(model, tokenizer, context, endings, device="cpu"):
    """The log-likelihood of each ending after the context and a blank, in nats: a list. The endings are one batch."""
    T = model.config.block_size
    before = len(tokenizer.encode(context.rstrip()))    # what blanks remain belong to the ending, as in the harness
    rows = [tokenizer.encode(f"{context} {ending}") for ending in endings]
    kept = [row[-(T + 1):] for row in rows]
    x = torch.zeros(len(rows), max(map(len, kept)) - 1, dtype=torch.long)   # what pads a row is after it, where no logit of it looks
    y = torch.full_like(x, -1)
    for i, (row, end) in enumerate(zip(rows, kept)):
        new = min(len(row) - before, len(end) - 1)
        x[i, :len(end) - 1] = torch.tensor(end[:-1])
        y[i, len(end) - 1 - new:len(end) - 1] = torch.tensor(end[-new:])
    x, y = x.to(device), y.to(device)
    logits = model(x, y)[0].float()                                         # (endings, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    return (-losses.view(y.shape).double().sum(1)).tolist()


# ------------------------------------------------------------------------------------------------------------ the table

def table(found, format):
    """The result as text."""
    if "questions" in found:
        rows = [("questions", f"{found['questions']:,}", "")]
        for name, key in (("accuracy, sum", ""), ("accuracy, per character", "_per_character")):
            rows.append((name, f"{found['accuracy' + key]:.4f}", f"+- {found['standard_error' + key]:.4f}"))
    else:
        unknown = "unknown" if found["bytes"] is None else f"{found['bytes']:,}"
        rows = [("tokens", f"{found['tokens']:,}", f"{found['scored']:,} scored: all but the first"),
                ("bytes", unknown, "of the scored tokens, in UTF-8"),
                ("loss", f"{found['loss']:.4f}", "nats a token"),
                ("perplexity", "over e^700" if found["perplexity"] is None else f"{found['perplexity']:.2f}", ""),
                ("bits per byte", "unknown" if found["bits_per_byte"] is None else f"{found['bits_per_byte']:.4f}", ""),
                ("window", f"{found['block_size']:,}", f"tokens, moved by {found['stride']:,}")]
    return tables.table(("figure", "value", "note"), rows, format, "lrl")
