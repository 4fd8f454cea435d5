"""`nanogpt-fast sample` and `nanogpt-fast chat`: a trained GPT completes prompts.

A single sample streams: its text appears as it is drawn. Several samples run as one batch and appear when all are done, with
nanoGPT's line between them. Only the text goes to stdout; all messages go to stderr.
"""
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import backend as ops_backend, devices, options
from ..checkpoints import huggingface_tokenizer, nanogpt as checkpoint
from ..checkpoints.huggingface import SIZES
from ..model import GPT
from ..options import option
from ..text import corpora, tokenizers

HELP = """Each line that you type is a prompt of its own, and the model continues it; it does not answer questions, and forgets
the line before. An empty line is a line break as the prompt. Ctrl-C interrupts a completion; at the prompt, Ctrl-C or Ctrl-D exits.
Length and draws are set when chat starts: --max_new_tokens, --temperature, --top_k, --top_p, --greedy (nanogpt-fast chat --help)."""
SEPARATOR = "---------------"  # between samples, as nanoGPT prints it


@dataclass
class ChatOptions:
    """Type the beginning of a text and a trained GPT continues it. Each line is a separate prompt; an empty line is a line break.

    Ctrl-C interrupts a completion; at the prompt, Ctrl-C or Ctrl-D exits, and /help says what can be typed.
    """

    init_from: str = option("resume", "resume (the checkpoint in out_dir) | gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
                            "folder with such weights", section="Model")
    out_dir: str = option("out", "where the checkpoint is (ckpt.pt), or a checkpoint file itself")
    max_new_tokens: int = option(500, "tokens to generate", minimum=0, section="Text")
    temperature: float = option(0.8, "below 1: less random, above: more; 0: greedy", minimum=0)
    top_k: int | None = option(200, "keep only this many of the most likely tokens; 0 or None: all", minimum=0)
    top_p: float | None = option(None, "keep the most likely tokens that together have this probability", minimum=0, maximum=1)
    min_p: float | None = option(None, "keep tokens at least this likely relative to the most likely one", minimum=0, maximum=1)
    greedy: bool = option(False, "always take the most likely token")
    stop: str = option("", r"end before this text; on its own, \n means a line break")
    seed: int = option(1337, "of the draws: the same seed, prompt and machine give the same text", minimum=0)
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps", section="Machine")
    dtype: str = option("auto", "auto: bfloat16 on GPUs that have it, float16 on older ones, else float32",
                        choices=("auto", "float32", "bfloat16", "float16"))
    cache: str = option("on", "keep keys and values; off: recompute the whole context for every token, as nanoGPT does (the same "
                        "text, slower)", choices=("on", "off"))
    compile: bool = option(False, "accepted because nanoGPT has it; as there, torch.compile does not affect generation, which has "
                           "its own KV cache and CUDA graphs")
    backend: str = option("auto", "implementation of the ops: auto, fused, reference, or one by one as in "
                          "auto,attention=reference")

    def __post_init__(self):
        ops_backend.parse(self.backend)
        if self.init_from not in ("resume", *SIZES) and not Path(self.init_from).is_dir():
            raise ValueError(f"init_from is {self.init_from!r}; expected resume, {', '.join(SIZES)}, or a folder of GPT-2 "
                             "weights")


@dataclass
class SampleOptions(ChatOptions):
    """Complete a prompt with a trained GPT, or with OpenAI's GPT-2. nanoGPT's names and defaults.

    One sample (--num_samples=1) is printed as it is drawn; several are drawn as one batch.
    """

    start: str = option("\n", r"the prompt, or FILE:prompt.txt; on its own, \n means a line break; GPT-2 also knows "
                        "<|endoftext|>", section="Prompt")
    num_samples: int = option(10, "completions to draw", minimum=1)


def sample(argv):
    """The command `nanogpt-fast sample`."""
    o = options.parse(SampleOptions, argv, "nanogpt-fast sample")
    prompt = read_prompt(o.start)
    torch.manual_seed(o.seed)  # before the model is built, which also draws: nanoGPT's sample.py does the same, and prints this text
    loaded = load(o)
    ids = encode(prompt, loaded, said=set())
    began, count = time.perf_counter(), 0
    if o.num_samples == 1:
        say(prompt)
        for text, drawn in complete(loaded, ids, o):
            say(text)
            count += drawn
        say(f"\n{SEPARATOR}\n")
    else:
        texts, count = complete_batch(loaded, ids, o)
        for text in texts:
            say(f"{prompt}{text}\n{SEPARATOR}\n")
    seconds = time.perf_counter() - began
    note(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s, {o.num_samples} at a time, prompt included"
         + (", without the cache" if o.cache == "off" else ""))


def chat(argv):
    """The command `nanogpt-fast chat`."""
    o = options.parse(ChatOptions, argv, "nanogpt-fast chat")
    loaded = load(o)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # importing it gives input() a history and line editing
            import readline  # noqa: F401
        note("Type the beginning of a text. Ctrl-C interrupts a completion, and exits at the prompt; /help says more.")
    torch.manual_seed(o.seed)
    said = set()
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            say("\n" if terminal else "")
            return
        if line.strip() == "/help":
            note(HELP)
            continue
        prompt = line or "\n"
        try:
            ids = encode(prompt, loaded, said)
        except tokenizers.TokenizerError as error:  # a typing mistake should not end the chat
            note(str(error))
            continue
        with contextlib.suppress(KeyboardInterrupt):
            say(line)
            for text, _ in complete(loaded, ids, o):
                say(text)
        say("\n")


# ------------------------------------------------------------------------------------------------------------ model and prompt

class Loaded(NamedTuple):
    model: GPT
    tokenizer: tokenizers.Tokenizer
    device: torch.device
    context: Any  # the autocast context of the forward pass


def load(o):
    """The model and tokenizer that the options name, on their device. Raises what `checkpoint.load_model` raises."""
    device = devices.make_current(devices.choose_device(o.device))
    dtype = devices.choose_dtype(o.dtype, device)
    model, tokenizer, about = open_model(o, device)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer to encode a prompt with: {about['no_tokenizer']}")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if o.compile:
        note("--compile has no effect on generation")
    source = o.out_dir if o.init_from == "resume" else o.init_from
    note(f"{source} on {devices.describe(device)}, {str(dtype).removeprefix('torch.')}")
    return Loaded(model, tokenizer, device, devices.autocast(device, dtype))


def open_model(o, device, only_ids=False):
    """(model in eval mode on the device, tokenizer or None, meta) that o.init_from, o.out_dir and o.backend name. meta: as
    `load_model`'s; of weights that are no checkpoint, {} or why there is no tokenizer. Raises what `checkpoint.load_model` raises, and
    RuntimeError where the tokenizer of such weights is not available; only_ids: not, as ids are enough."""
    with contextlib.redirect_stdout(sys.stderr):  # GPT prints its size
        if o.init_from != "resume":
            try:
                tokenizer, about = huggingface_tokenizer.read(o.init_from) or tokenizers.GPT2Tokenizer(), {}
            except RuntimeError as error:
                if not only_ids:
                    raise
                tokenizer, about = None, {"no_tokenizer": str(error)}
            return GPT.from_pretrained(o.init_from, dict(dropout=0.0), backend=o.backend).eval().to(device), tokenizer, about
        if not Path(o.out_dir).exists():
            raise FileNotFoundError(f"no folder {o.out_dir}: pass your run's folder as --out_dir, or train first "
                                    "(nanogpt-fast train --dataset=embedded)")
        return checkpoint.load_model(o.out_dir, device, backend=o.backend)


def read_prompt(start):
    """The text of --start: itself, or the file that FILE:... names."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {path}")
        start = corpora.decode(path.read_bytes(), path)
    else:
        start = typed(start)
    if not start:
        raise ValueError(r"the prompt is empty; give at least one character (nanoGPT's default is a line break, --start='\n')")
    return start


def typed(text):
    r"""The text, with \n and \t replaced if it holds nothing else: a shell passes these on as typed, with the backslash."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t") if not text.replace(r"\n", "").replace(r"\t", "") else text


def encode(prompt, loaded, said):
    """The prompt's ids (1, T) on the device. If it is longer than the context, a note says so, once per session."""
    ids = loaded.tokenizer.encode(prompt)
    T = loaded.model.config.block_size
    if len(ids) > T and "cropped" not in said:
        said.add("cropped")
        note(f"the prompt is {len(ids):,} tokens long and the context {T:,}: the model sees the last {T:,} of them")
    return torch.tensor([ids], dtype=torch.long, device=loaded.device)


# ------------------------------------------------------------------------------------------------------------ completion

def complete(loaded, ids, o):
    """One completion of ids (1, T): yields (text, number of tokens drawn) as the text is decided."""
    text = TextStream(loaded.tokenizer, typed(o.stop))
    with torch.no_grad(), loaded.context:
        for rows in loaded.model.generate(ids, o.max_new_tokens, stream=True, **asked(o)):
            yield text.feed(rows[0]), len(rows[0])
            if text.ended:
                return
    yield text.finish(), 0


def complete_batch(loaded, ids, o):
    """(num_samples completions of ids (1, T) as text, number of tokens drawn), all in one batch."""
    with torch.no_grad(), loaded.context:
        if not o.stop:  # no decision depends on the text, so the host need not read tokens before the end
            drawn = loaded.model.generate(ids, o.max_new_tokens, num_samples=o.num_samples, **asked(o))
            new = drawn[:, ids.size(1):]  # (num_samples, max_new_tokens)
            return [TextStream(loaded.tokenizer).all(row) for row in new.tolist()], new.numel()
        texts = [TextStream(loaded.tokenizer, typed(o.stop)) for _ in range(o.num_samples)]
        pieces, count = [[] for _ in texts], 0
        for rows in loaded.model.generate(ids, o.max_new_tokens, num_samples=o.num_samples, stream=True, **asked(o)):
            for piece, text, row in zip(pieces, texts, rows):
                if not text.ended:
                    piece.append(text.feed(row))
                    count += len(row)
            if all(text.ended for text in texts):
                break
    return ["".join(piece) + text.finish() for piece, text in zip(pieces, texts)], count


def asked(o):
    """The arguments of `generate` besides the number of tokens."""
    return dict(temperature=0.0 if o.greedy else o.temperature, top_k=o.top_k, top_p=o.top_p, min_p=o.min_p, use_cache=o.cache == "on")


class TextStream:
    """Token ids in, text out as soon as it is decided: only whole characters, and nothing from the stop text on.

    A token of a byte-pair vocabulary may end in the middle of a character; it is then held back until the rest arrives.
    """

    WAIT = 8  # tokens; a character has at most four bytes, so more tokens cannot be an unfinished character

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False  # the stop text has appeared
        self.ids = []       # not decoded yet
        self.held = ""      # decoded, but possibly the beginning of the stop text

    def feed(self, ids):
        """The text that is decided by these ids."""
        self.ids += [i for i in ids if i < self.tokenizer.vocab_size]  # ids of a padded vocabulary mean nothing
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and len(self.ids) < self.WAIT:
            return ""
        self.ids = []
        return self._release(text)

    def finish(self):
        """The text that is still held back; no more ids come."""
        text = "" if self.ended else self._release(self.tokenizer.decode(self.ids)) + self.held
        self.ids, self.held = [], ""
        return text

    def all(self, ids):
        """The text of all ids at once."""
        return self.feed(ids) + self.finish()

    def _release(self, text):
        if self.ended:
            return ""
        self.held += text
        if not self.stop:
            text, self.held = self.held, ""
        elif self.stop in self.held:
            text, self.held, self.ended = self.held[:self.held.index(self.stop)], "", True
        else:
            keep = next(n for n in range(len(self.stop) - 1, -1, -1) if self.held.endswith(self.stop[:n]))
            cut = len(self.held) - keep
            text, self.held = self.held[:cut], self.held[cut:]
        return text


def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text):
    print(text, file=sys.stderr, flush=True)
