"""Generation: complete prompts token by token, with a static KV cache.

Two ways lead to the next token's logits:

    cached     prefill sends the prompt through the model once and keeps every layer's keys and values; decode then sends one
               token a row. On CUDA a step of decode and draw is captured in one CUDA graph and replayed: the host looks at a
               token only when it is asked for one. So is the prefill of short prompts, padded to a few widths.
    uncached   nanoGPT's loop: the last block_size tokens go through the whole model for every new one. It is taken where the
               cache would not be right (a hook, a subclass, a replaced submodule, dropout in train mode), which is said once.

Past block_size positions restart at 0 in the cropped window, so every cached key is stale: from there on the window is encoded
anew at every step, as nanoGPT does.

The state of a model that is being generated from (`Session`) lives outside the model: pickling and copying a model never meet
a CUDA graph. It is checked against the model at every call: nothing in it outlives an optimizer step, a load or a move.
"""
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import backend, reference
from .graphs import Recorder
from .ops import attention, decode, layer_norm, mlp
from .ops import sample as sampler


def _gradless(function):
    """Decorates what makes tensors that outlive the call: without a gradient, and never in inference mode, whose tensors nobody could
    write to outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@_gradless
def generate(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, min_p=None, stop=None, seed=None, rng=None,
             num_samples=1, stream=False, use_cache=True):
    """Complete prompts.

    idx: (B, T) int64, or a list of 1-D prompts of different lengths.  num_samples: completions of each prompt, one prefill.
    temperature (0: greedy), top_k, top_p, min_p: see `ops.sample`.
    stop: a token id, or a list of ids and of sequences of ids; a row ends before the first of them, which is not returned.
    rng: "torch" draws as nanoGPT does, from torch's generator; "philox" takes our own counter-based sampler, one seed a row.
        None: "torch" on a CPU unless `seed` is given, else "philox".
    seed: an int (row i draws from seed + i) or one int a row: a row's text then depends on its seed and prompt alone.
        None: seeds come from torch's generator, so torch.manual_seed decides.

    Returns (B * num_samples, T + max_new_tokens) int64, or, for a list of prompts or with `stop`, a list of 1-D tensors.
    stream=True: an iterator instead; each step yields a list with, for every row, the list of its newly decided token ids
    (empty for a row that has ended, or that waits to see whether a stop sequence goes on).
    """
    prompts = idx
    if not torch.is_tensor(idx):
        prompts = [torch.as_tensor(prompt, dtype=torch.long) for prompt in idx]
        for i, prompt in enumerate(prompts):
            if prompt.dim() != 1:
                raise ValueError(f"prompt {i} has shape {tuple(prompt.shape)}; a list holds 1-D prompts")
    elif idx.dim() != 2:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; expected (B, T), one row a prompt, or a list of 1-D prompts")
    check(prompts, max_new_tokens, temperature, top_k, top_p, min_p, num_samples)
    stops = stop_sequences(stop)

    device = next(model.parameters()).device
    prompts = [prompt.to(device) for prompt in prompts for _ in range(num_samples)]
    run = Run(model, prompts, num_samples, dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), rng, seed, use_cache)
    if stream:
        return run.stream(max_new_tokens, stops)
    if stops:
        new = [[] for _ in prompts]
        for released in run.stream(max_new_tokens, stops):
            for tokens, more in zip(new, released):
                tokens.extend(more)
        return [torch.cat((prompt, torch.tensor(tokens, dtype=torch.long, device=device))) for prompt, tokens in zip(prompts, new)]
    new = run.tokens(max_new_tokens)                                                # (rows, max_new_tokens)
    if torch.is_tensor(idx):
        return torch.cat((idx.to(device).repeat_interleave(num_samples, dim=0), new), dim=1)
    return [torch.cat((prompt, tokens)) for prompt, tokens in zip(prompts, new)]


def check(prompts, max_new_tokens, temperature, top_k, top_p=None, min_p=None, num_samples=1):
    """ValueError naming the argument that cannot be."""
    for i, prompt in enumerate(prompts):
        if prompt.numel() == 0:
            raise ValueError(f"the prompt is empty (row {i}); give at least one token (nanoGPT's habit is a newline)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive, or 0 for greedy")
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for no limit")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it is a share of the probability, between 0 and 1, or None for no limit")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")


def stop_sequences(stop):
    """`stop` as a list of tuples of token ids."""
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, int) else list(stop)
    sequences = [(s,) if isinstance(s, int) else tuple(int(token) for token in s) for s in stops]
    if () in sequences:
        raise ValueError("stop holds an empty sequence; give token ids or non-empty sequences of them")
    return sequences


def draw(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One token a row from logits (B, V), with torch's generator, as nanoGPT draws it -> (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_p is not None or min_p is not None:
        probs = sampler.sample_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return torch.multinomial(probs, num_samples=1)[:, 0]
    logits = logits / temperature
    if top_k is not None:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float("-inf"))                    # ties with the k-th stay
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)[:, 0]


class Run:
    """One call of `generate`: rows of tokens that grow by one a step."""

    def __init__(self, model, prompts, num_samples, filters, rng, seed, use_cache):
        self.model, self.prompts, self.filters = model, prompts, filters
        self.block_size = model.config.block_size
        self.device = next(model.parameters()).device
        if rng not in (None, "torch", "philox"):
            raise ValueError(f"rng is {rng!r}; expected 'torch', 'philox' or None")
        if rng == "torch" and seed is not None:
            raise ValueError("seed needs rng='philox'; with rng='torch' call torch.manual_seed")
        self.rng = rng or ("torch" if self.device.type == "cpu" and seed is None else "philox")
        rows = len(prompts)
        if self.rng == "philox":
            self.seeds = row_seeds(seed, rows, self.device)
            self.offsets = torch.zeros(rows, dtype=torch.long, device=self.device)

        self.lengths = [prompt.numel() for prompt in prompts]                       # tokens of each row so far, on the host
        self.longest = max(self.lengths, default=0)
        reason = cache_why_not(model) if use_cache else "use_cache=False"
        if reason is not None and use_cache:
            backend.notice(f"generate recomputes the whole context for every token: {reason}")
        self.session = None if reason is not None or rows == 0 else session_of(model, rows)
        self.num_samples = num_samples                                              # so many rows in a row are still equal
        self.fresh = True                                                           # the cache does not hold these rows yet
        self.uncollected = 0                                                        # tokens that only the session holds yet

    def tokens(self, n):
        """n new tokens of every row, (rows, n) int64 on the device; the host never waits for one."""
        self._room(n)
        for _ in range(n):
            self.step()
        self.collect()
        rows = len(self.prompts)
        if rows == 0 or n == 0:
            return torch.empty(rows, n, dtype=torch.long, device=self.device)
        first = torch.tensor([length - n for length in self.lengths], device=self.device)
        return self.history.gather(1, first[:, None] + torch.arange(n, device=self.device))

    def stream(self, n, stops):
        """Yields, step by step, the token ids that each row has newly decided."""
        self._room(n)
        longest_stop = max(map(len, stops), default=1)
        pending = [[] for _ in self.prompts]                                        # drawn, but maybe the start of a stop
        ended = [False] * len(self.prompts)
        for _ in range(n):
            if all(ended):
                return
            drawn = self.step().tolist()
            released = []
            for i, token in enumerate(drawn):
                out = []
                if not ended[i]:
                    pending[i].append(token)
                    hit = next((s for s in stops if tuple(pending[i][-len(s):]) == s), None)
                    if hit is not None:
                        out, ended[i] = pending[i][:-len(hit)], True
                    else:
                        keep = could_start(pending[i][-(longest_stop - 1):] if longest_stop > 1 else [], stops)
                        out, pending[i] = pending[i][:len(pending[i]) - keep], pending[i][len(pending[i]) - keep:]
                released.append(out)
            yield released
        if any(pending[i] and not ended[i] for i in range(len(pending))):
            yield [[] if ended[i] else tokens for i, tokens in enumerate(pending)]

    @_gradless
    def _room(self, n):
        width = self.longest + n
        self.history = torch.zeros(len(self.prompts), width, dtype=torch.long, device=self.device)
        if len(set(self.lengths)) == 1:
            self.history[:, :self.longest] = torch.stack(self.prompts)
        else:
            for row, prompt in enumerate(self.prompts):
                self.history[row, :prompt.numel()] = prompt
        self.rows = torch.arange(len(self.prompts), device=self.device)
        self.ends = torch.tensor(self.lengths, dtype=torch.long, device=self.device)  # `lengths` on the device

    @_gradless
    def step(self):
        """Draw one token for every row; returns them, (rows,) int64 on the device, to be read before the next step."""
        if not self.prompts:
            return self.ends
        if self._replays():
            self.session.replay()
            token, self.uncollected = self.session.token, self.uncollected + 1
        else:
            self.collect()
            token = self.sample(self.logits())
            self.history[self.rows, self.ends] = token
            if self.session is not None:
                self.session.feed(token, self.ends)
            self.ends += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.longest += 1
        self.fresh = False
        return token

    def _replays(self):
        """Whether this step is the session's own (`Session.replay`): the cache holds our rows, all of them inside the window, our own sampler."""
        if self.session is None or not self.session.steps_whole or self.rng != "philox" or self.fresh or self.longest > self.block_size \
                or not self.session.belongs_to(self):
            return False
        if self.uncollected == 0:
            self.session.start_drawing(self.filters, self.seeds, self.offsets)
        return True

    @_gradless
    def collect(self):
        """Take over what replayed steps have drawn."""
        if self.uncollected:
            at = self.ends[:, None] + torch.arange(self.uncollected, device=self.device)
            self.history.scatter_(1, at, self.session.drawn.gather(1, at))
            self.ends += self.uncollected
            self.offsets += self.uncollected
            self.uncollected = 0
            self.session.feed(self.session.token, self.ends - 1)                    # brings positions back into the window

    def sample(self, logits):
        if self.rng == "torch":
            return draw(logits, **self.filters)
        return sampler.sample(logits, **self.filters, seed=self.seeds, offset=self.offsets, backend=self.model.backend)  # moves the offsets on

    def logits(self):
        """Logits of the next token of every row, (rows, V)."""
        if self.session is None:
            return self._windows(range(len(self.prompts)), self._model_logits)
        if not self.session.belongs_to(self):                                       # first step, or another run took the cache
            self.session.hand_to(self)
            self.fresh = True
        inside = [length <= self.block_size for length in self.lengths]
        if not any(inside):
            return self._windows(range(len(self.prompts)), self.session.encode)
        if self.fresh:
            copies, self.num_samples = self.num_samples, 1                          # equal prompts go through once
            logits = self.session.prefill(self.history[::copies, :min(self.longest, self.block_size)],
                                          self.ends[::copies].clamp(max=self.block_size), copies)
        else:
            logits = self.session.decode(min(self.longest, self.block_size))
        outside = [row for row, is_inside in enumerate(inside) if not is_inside]
        if outside:
            logits[torch.tensor(outside, device=self.device)] = self._windows(outside, self.session.encode).to(logits.dtype)
        return logits

    def _windows(self, rows, encode):
        """Logits behind the last block_size tokens of the given rows, each encoded from position 0."""
        logits = None
        for length in sorted({self.lengths[row] for row in rows}):                  # rows of one length go together
            group = [row for row in rows if self.lengths[row] == length]
            window = self.history[torch.tensor(group, device=self.device), max(0, length - self.block_size):length]
            some = encode(window)                                                   # (len(group), V)
            if logits is None:
                logits = some.new_empty(len(rows), some.size(-1))
            logits[torch.tensor([list(rows).index(row) for row in group], device=self.device)] = some
        return logits

    def _model_logits(self, window):
        return self.model(window)[0][:, -1, :]


def could_start(tail, stops):
    """How many of the last tokens of `tail` could be the beginning of a stop sequence."""
    for keep in range(len(tail), 0, -1):
        if any(len(s) > keep and tuple(tail[-keep:]) == s[:keep] for s in stops):
            return keep
    return 0


def row_seeds(seed, rows, device):
    """One int64 seed a row: given, counted up from an int, or drawn from torch's generator."""
    if seed is None:
        return torch.randint(2 ** 62, (rows,), device=device)
    if isinstance(seed, int):
        return torch.arange(seed, seed + rows, device=device)
    seeds = torch.as_tensor(seed, dtype=torch.long)
    if seeds.shape != (rows,):
        raise ValueError(f"seed has {seeds.numel()} values for {rows} rows; give an int or one seed a row")
    return seeds.to(device)


def cache_why_not(model):
    """None where the cached path computes what calling the model would; else the reason it would not."""
    from .model import GPT, LayerNorm, touched
    if type(model).forward is not GPT.forward or touched(model, type(model)) is not None:
        return touched(model, GPT)
    t = model.transformer
    reason = touched(t.wte, nn.Embedding) or touched(t.wpe, nn.Embedding) or touched(t.drop, nn.Dropout) \
        or touched(t.ln_f, LayerNorm) or touched(model.lm_head, nn.Linear)
    for block in t.h:
        reason = reason or (block.unfused_reason() if hasattr(block, "unfused_reason") else f"a block is a {type(block).__name__}")
        if reason is not None:
            return reason
        reason = touched(block.attn.c_attn, nn.Linear) or touched(block.attn.c_proj, nn.Linear) \
            or touched(block.mlp.c_fc, nn.Linear) or touched(block.mlp.c_proj, nn.Linear) or touched(block.mlp.gelu, nn.GELU) \
            or (None if block.attn.flash else "attn.flash is False")
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.training] \
        + [block.attn.dropout for block in t.h if block.attn.training]
    return reason or ("the model is in train mode with dropout" if any(dropouts) else None)


_sessions = weakref.WeakKeyDictionary()  # model -> {(rows, dtype): Session}


def session_of(model, rows):
    """The session of a model for so many rows, brought up to date with the model's weights."""
    device = next(model.parameters()).device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else next(model.parameters()).dtype
    kept = _sessions.setdefault(model, {})
    session = kept.get((rows, dtype))
    if session is None or not session.is_of(model):
        kept.clear()                                                                # one cache at a time: they are large
        session = kept[rows, dtype] = Session(model, rows, dtype)
    session.refresh()
    return session


# Up to so many tokens a prefill is captured: GPT-2 124M's takes the host 13 ms and an H100 1 (512 tokens), so the card waits.
PREFILL_CAPTURED = 8192


def prefill_width(T, block_size):
    """Prompts are padded to so many tokens, that few widths have to be captured: at most a quarter more from 256 on, up to 512 a multiple of 64."""
    step = max(64, 2 ** (T - 1).bit_length() // 8)
    return min(-(-T // step) * step, block_size)


@dataclass
class Prompts:
    """What a captured prefill of one shape reads and writes."""
    idx: torch.Tensor               # (B, width) int64; behind a prompt's end anything
    lengths: torch.Tensor           # (B,)
    logits: torch.Tensor = None     # (B * copies, V)
    replay: object = None           # from the second on


class Layer:
    """One block's weights, in the dtype that the matmuls take."""

    def __init__(self, block, cast):
        self.ln_1 = (block.ln_1.weight, block.ln_1.bias)
        self.ln_2 = (block.ln_2.weight, block.ln_2.bias)
        self.c_attn = (cast(block.attn.c_attn.weight), cast(block.attn.c_attn.bias))
        self.c_proj = (cast(block.attn.c_proj.weight), cast(block.attn.c_proj.bias))
        self.c_fc = (cast(block.mlp.c_fc.weight), cast(block.mlp.c_fc.bias))
        self.mlp_proj = (cast(block.mlp.c_proj.weight), cast(block.mlp.c_proj.bias))
        self.activation = "gelu_tanh" if block.mlp.gelu.approximate == "tanh" else "gelu"


class Session:
    """A model's weights in the dtype of generation, and the KV cache of `rows` rows.

    The residual stream is as under autocast: fp32 (the embedding's dtype), every matmul in `dtype`. The cache holds, a layer,
    keys and values (rows, H, block_size, D).
    """

    def __init__(self, model, rows, dtype):
        self.parameters = [(weakref.ref(p), p.data_ptr(), p.dtype) for p in model.parameters()]
        self.around = backend.current()
        self.rows, self.dtype = rows, dtype
        self.n_head = model.config.n_head
        self.block_size = model.config.block_size
        self.choices = model.backend
        self.copies = []                                                            # (parameter, its copy in dtype)
        self.layers = [Layer(block, self._cast) for block in model.transformer.h]
        self.head = (self._cast(model.lm_head.weight), self._cast(model.lm_head.bias))
        self.wte, self.wpe = model.transformer.wte.weight, model.transformer.wpe.weight
        self.ln_f = (model.transformer.ln_f.weight, model.transformer.ln_f.bias)
        self.device = device = self.wte.device
        D = model.config.n_embd // self.n_head
        self.cache = torch.zeros(len(self.layers), 2, rows, self.n_head, self.block_size, D, dtype=dtype, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)             # the last token of each row ...
        self.position = torch.zeros(rows, dtype=torch.long, device=device)          # ... and where it stands
        self.row = torch.arange(rows, device=device)
        self.owner = None                                                           # weakref of the Run whose rows the cache holds
        self.activation = self.layers[0].activation if self.layers else "gelu"
        self.native = decode.decoder(self)                                          # one call a step: C++ on a CPU, Triton on CUDA
        # Decoding and drawing as one step, and what it reads and writes besides; see `start_drawing`.
        self.steps_whole = device.type == "cuda" or self.native is not None
        self.recorder = Recorder(device, "generation", "use_cache=False does without") if device.type == "cuda" else None
        self.replays_step, self.prefills = None, {}                                 # of the recorder; {(prompts, width, copies): Prompts}
        self.drawn = torch.zeros(rows, self.block_size + 1, dtype=torch.long, device=device)
        self.seeds, self.offsets, self.top_k = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.temperature, self.top_p, self.min_p = (torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(3))
        self.logits = self.draw = None                                              # of every step, where they always lie in one place
        if device.type == "cpu" and self.native is not None and self.wte.size(0) <= sampler.MAX_VOCAB:
            self.logits = torch.zeros(rows, self.wte.size(0), dtype=torch.float32, device=device)
            self.draw = sampler.prepare(self.logits, **self._drawing())

    def _drawing(self):
        return dict(out=self.token, seed=self.seeds, offset=self.offsets, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                    min_p=self.min_p, backend=self.choices)

    def is_of(self, model):
        """Whether the model still has the very parameters, in the very memory, and the choices that this was built for."""
        now = list(model.parameters())
        return (self.choices, self.block_size, self.around, len(self.parameters)) == (
            model.backend, model.config.block_size, backend.current(), len(now)) and all(
            kept() is p and (pointer, dtype) == (p.data_ptr(), p.dtype) for p, (kept, pointer, dtype) in zip(now, self.parameters))

    def _cast(self, parameter):
        if parameter is None or parameter.dtype == self.dtype:
            return parameter
        copy = torch.empty_like(parameter, dtype=self.dtype, requires_grad=False)
        self.copies.append((weakref.ref(parameter), copy))
        return copy

    def refresh(self):
        """Bring the half-precision copies up to date: the weights may have been trained since."""
        if self.copies:
            torch._foreach_copy_([copy for _, copy in self.copies], [parameter() for parameter, _ in self.copies])

    def weights(self):
        """Every matrix and bias that a matmul takes."""
        return [tensor for layer in self.layers for pair in (layer.c_attn, layer.c_proj, layer.c_fc, layer.mlp_proj) for tensor in pair] \
            + list(self.head)

    def belongs_to(self, run):
        return self.owner is not None and self.owner() is run

    def hand_to(self, run):
        """Give the cache to another run. What the former one has drawn and not yet taken over, it takes now."""
        former = self.owner() if self.owner is not None else None
        if former is not None:
            former.collect()
        self.owner = weakref.ref(run)

    def start_drawing(self, filters, seeds, offsets):
        """Set what the captured step draws with. A filter that is None gets the value that turns it off."""
        self.seeds.copy_(seeds)
        self.offsets.copy_(offsets)
        for name, off in (("temperature", None), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            getattr(self, name).fill_(off if filters[name] is None else filters[name])

    def replay(self):
        """One more token for every row, drawn into `token` and `drawn`. On CUDA a graph, captured at the first call."""
        if self.recorder is None:
            return self._decode_and_draw()
        if self.replays_step is None:
            state = [(tensor, tensor.clone()) for tensor in (self.token, self.position, self.offsets)]

            def warm_up():                  # what it writes into the cache lies at `position` and is overwritten
                self._decode_and_draw()
                for tensor, value in state:
                    tensor.copy_(value)     # also between the two: `position` may be the last
            for _ in range(2):
                self.recorder.run(warm_up)
            self.replays_step = self.recorder.record(self._decode_and_draw)
        self.replays_step()

    def _decode_and_draw(self):
        logits = self.decode(self.block_size)
        if logits is self.logits:                                                   # the extension has filled them
            self.draw()
        else:
            sampler.sample_out(logits, **self._drawing())
        self.position += 1
        self.drawn.scatter_(1, self.position[:, None], self.token[:, None])

    def feed(self, token, position):
        """Set the token that the next `decode` processes, and its position, a row each."""
        self.token.copy_(token)
        self.position.copy_(position.clamp(max=self.block_size - 1))                # a row past the window is encoded elsewhere

    def prefill(self, idx, lengths, copies=1):
        """Encode prompts idx (B, T), padded on the right to their lengths (B,), into the cache -> logits (B * copies, V).

        Row i of the prompts becomes rows i * copies ... of the cache. Padding is harmless: attention is causal, and decoding
        overwrites it from position `lengths` on.
        """
        B, T = idx.shape
        width = prefill_width(T, self.block_size)
        if self.recorder is None or B * width > PREFILL_CAPTURED:
            return self._encode_into_cache(idx, lengths, copies)
        key = B, width, copies
        if key not in self.prefills:
            self.prefills[key] = Prompts(*(torch.zeros(shape, dtype=torch.long, device=self.device) for shape in ((B, width), (B,))))
        prompts = self.prefills[key]
        prompts.idx[:, :T] = idx            # padded also where it is no replay, so that both give the same bits
        prompts.lengths.copy_(lengths)

        def run():
            logits = self._encode_into_cache(prompts.idx, prompts.lengths, copies)
            if prompts.logits is None:
                prompts.logits = torch.empty_like(logits)
            prompts.logits.copy_(logits)
        if prompts.logits is None:
            self.recorder.run(run)
        else:
            prompts.replay = prompts.replay or self.recorder.record(run)
            prompts.replay()
        return prompts.logits

    def _encode_into_cache(self, idx, lengths, copies):
        def attend(layer, qkv):                                                     # (B, T, 3C)
            B, T, _ = qkv.shape
            kv = qkv.view(B, T, 3, self.n_head, -1)[:, :, 1:].permute(2, 0, 3, 1, 4)        # (2, B, H, T, D)
            self.cache[layer][:, :, :, :T] = kv if copies == 1 else kv.repeat_interleave(copies, dim=1)
            return attention.causal_attention_qkvpacked(qkv, self.n_head, backend=self.choices)
        x = self._trunk(idx, attend)                                                # (B, T, C)
        last = x[torch.arange(x.size(0), device=x.device), lengths - 1]             # (B, C)
        logits = self._head(last)
        return logits if copies == 1 else logits.repeat_interleave(copies, dim=0)

    def encode(self, idx):
        """Logits behind idx (B, T), without the cache -> (B, V)."""
        def attend(layer, qkv):
            return attention.causal_attention_qkvpacked(qkv, self.n_head, backend=self.choices)
        return self._head(self._trunk(idx, attend)[:, -1])

    def decode(self, upto):
        """Process `token` at `position` in every row, with the cache -> logits (rows, V). upto: longest row, in tokens."""
        if self.native is not None:
            return decode.step(self.native, self.token, self.position, self.wte.size(0), out=self.logits)

        def attend(layer, qkv):                                                     # (rows, 3C)
            q, *kv = qkv.view(self.rows, 3, self.n_head, -1).split((1, 2), dim=1)   # (rows, 1 and 2, H, D)
            self.cache[layer][:, self.row, :, self.position] = kv[0]
            keys, values = self.cache[layer][:, :, :, :upto]
            y = attention.decode_attention(q.transpose(1, 2), keys, values, lengths, backend=self.choices)
            return y.transpose(1, 2).flatten(1)                                     # (rows, C)
        lengths = self.position + 1
        x = self.wte[self.token] + self.wpe[self.position]                          # (rows, C)
        return self._head(self._layers(x, attend))

    def _trunk(self, idx, attend):
        x = self.wte[idx] + self.wpe[:idx.size(1)]                                  # (B, T, C)
        return self._layers(x, attend)

    def _layers(self, x, attend):
        """The blocks and the final norm, on x (..., C) -> (..., C) in `dtype`."""
        with torch.autocast(x.device.type, enabled=False):                          # the weights are cast already
            branch = None
            for i, layer in enumerate(self.layers):
                x, h = self._norm(x, branch, layer.ln_1)
                x, h = self._norm(x, F.linear(attend(i, F.linear(h, *layer.c_attn)), *layer.c_proj), layer.ln_2)
                branch = mlp.gelu_mlp(h, *layer.c_fc, *layer.mlp_proj, activation=layer.activation, backend=self.choices)
            return self._norm(x, branch, self.ln_f)[1]

    def _norm(self, x, branch, weights):
        return layer_norm.add_layer_norm(x, branch, *weights, out_dtype=self.dtype, backend=self.choices)

    def _head(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, *self.head)
