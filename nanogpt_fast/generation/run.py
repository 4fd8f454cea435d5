"""One call of `generate`: check prompts and stops, add one token per row and step, and return tokens as soon as they are final.

session.py computes the next token's logits; without a cache, the model itself does.
"""
import contextlib
import numbers
import threading

import torch
import torch.nn.functional as F

from .. import backend
from ..config import whole
from ..ops import sampler
from .session import Watch, autocast_dtype, give_back, session_of

# Held by a step on CUDA: while one thread captures a graph, PyTorch's generator and some calls of CUDA fail in every other thread.
_step_on_cuda = threading.RLock()


def _gradless(function):
    """Decorator for functions whose tensors outlive the call: no gradients, and no inference mode either, since inference tensors
    cannot be written to outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@_gradless
def generate(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, min_p=None, stop=None, seed=None, rng=None,
             generator=None, num_samples=1, stream=False, use_cache=True):
    """Complete prompts.

    idx: (B, T) int64, or a list of 1-D prompts of different lengths.  num_samples: completions of each prompt, one prefill.
    temperature (0: greedy), top_k (0 or None: no limit), top_p, min_p: see `ops.sample`.
    stop: a token id, or a list of ids and of sequences of ids; a row ends before the first match, which is not returned.
    rng: "torch" draws as nanoGPT does, from torch's generator; "philox" uses our own counter-based sampler, with a seed per row.
        None: "torch" on a CPU unless `seed` is given, else "philox".
    seed: an int (row i draws from seed + i) or one int per row: a row's text then depends only on its seed and prompt.
        None: seeds come from torch's generator, so torch.manual_seed controls them.
    generator: a torch.Generator on the model's device, used instead of torch's global one, which all threads share.

    Returns (B * num_samples, T + max_new_tokens) int64, or, for a list of prompts or with `stop`, a list of 1-D tensors.
    stream=True: an iterator instead; each step yields one list of new token ids per row (empty for a row that has ended, or whose
    last tokens may be the start of a stop sequence).

    Raises ValueError for an argument, IndexError for a token id outside the vocabulary, RuntimeError for a row whose logits are NaN or
    infinite: on a CPU at once, on a GPU when the host reads tokens, at the end of the call or at every step of a stream.
    """
    prompts = idx
    if not torch.is_tensor(idx):
        prompts = [torch.as_tensor(prompt) for prompt in idx]
        for i, prompt in enumerate(prompts):
            if prompt.dim() != 1:
                raise ValueError(f"prompt {i} has shape {tuple(prompt.shape)}; a list holds 1-D prompts")
    elif idx.dim() != 2:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; expected (B, T), one prompt per row, or a list of 1-D prompts")
    max_new_tokens, num_samples = whole("max_new_tokens", max_new_tokens), whole("num_samples", num_samples)
    top_k = whole("top_k", top_k or 0) or None
    check(prompts, max_new_tokens, temperature, top_k, top_p, min_p, num_samples)
    for i, prompt in enumerate(prompts):
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise ValueError(f"the prompt of row {i} is a tensor of {prompt.dtype}; token ids are integers")
    if len(prompts) > 0:
        model.check_ids(idx if torch.is_tensor(idx) else torch.cat([prompt.long() for prompt in prompts]))
    stops = stop_sequences(stop)

    device = next(model.parameters()).device
    prompts = [prompt.to(device, torch.long) for prompt in prompts for _ in range(num_samples)]
    run = Run(model, prompts, num_samples, dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), rng, seed, use_cache,
              generator)
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
    """Raise ValueError, naming the argument, if one is invalid."""
    for i, prompt in enumerate(prompts):
        if prompt.numel() == 0:
            raise ValueError(f"the prompt is empty (row {i}); give at least one token (nanoGPT starts from a newline)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive, or 0 for greedy")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or 0 or None for no limit")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it is a share of the probability, between 0 and 1, or None for no limit")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")


def stop_sequences(stop):
    """`stop` as a list of tuples of token ids."""
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, numbers.Integral) else list(stop)
    sequences = [(int(s),) if isinstance(s, numbers.Integral) else tuple(whole("a token of stop", token) for token in s) for s in stops]
    if () in sequences:
        raise ValueError("stop holds an empty sequence; give token ids or non-empty sequences of them")
    return sequences


def draw(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """One token per row from logits (B, V), with torch's generator or the given one, as nanoGPT draws it -> (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_p is not None or min_p is not None:
        probs = sampler.sample_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]
    logits = logits / temperature
    if top_k is not None:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float("-inf"))                    # ties with the k-th stay
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)[:, 0]


class Run:
    """One call of `generate`: rows of tokens that grow by one per step.

    `history` (the tokens), `ends` (each row's length, on the device) and `offsets` (each row's position in its random stream) belong to
    the run. While steps are replayed, the session's `drawn`, `position` and `offsets` are ahead by `uncollected` tokens; `collect` brings
    the run's up to date. `lengths`, on the host, include every token immediately.
    """

    def __init__(self, model, prompts, num_samples, filters, rng, seed, use_cache, generator=None):
        self.model, self.prompts, self.filters, self.generator = model, prompts, filters, generator
        self.block_size = model.config.block_size
        self.device = next(model.parameters()).device
        if rng not in (None, "torch", "philox"):
            raise ValueError(f"rng is {rng!r}; expected 'torch', 'philox' or None")
        if rng == "torch" and seed is not None:
            raise ValueError("seed needs rng='philox'; with rng='torch' call torch.manual_seed")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator are both given; a text's random numbers come from one of them")
        self.rng = rng or ("torch" if self.device.type == "cpu" and seed is None else "philox")
        rows = len(prompts)
        self.turn = _step_on_cuda if self.device.type == "cuda" else contextlib.nullcontext()
        if self.rng == "philox":
            with self.turn:
                self.seeds = row_seeds(seed, rows, self.device, generator)
            self.offsets = torch.zeros(rows, dtype=torch.long, device=self.device)

        self.lengths = [prompt.numel() for prompt in prompts]                       # tokens of each row so far, on the host
        self.longest = max(self.lengths, default=0)
        self.cached = use_cache
        self._see_model()
        self.watches = False
        self.session = None                                                         # taken at the first step, given back at the end
        self.dtype = autocast_dtype(self.device)                                    # as at the call, wherever a stream is read
        self.tainted = torch.zeros(rows, 1, device=self.device)                     # NaN for a row with NaN or infinite logits
        self.num_samples = num_samples                                              # consecutive identical rows; prefilled once
        self.fresh = True                                                           # the cache does not hold these rows yet
        self.uncollected = 0                                                        # tokens that so far only the session holds

    def _see_model(self):
        """Choose the path for the model as it is now."""
        if self.cached and (reason := self.model.why_not_cached()) is not None:
            backend.notice(f"generate recomputes the whole context for every token: {reason}")
            self.cached = False

    def release(self):
        """Give the session back."""
        session, self.session = self.session, None
        if session is not None:
            give_back(self.model, session)

    def tokens(self, n):
        """n new tokens of every row, (rows, n) int64 on the device; the host waits for it only once, at the end."""
        self._room(n)
        try:
            for _ in range(n):
                self.step()
            self.collect()
            self.check_logits()
        finally:
            self.release()
        rows = len(self.prompts)
        if rows == 0 or n == 0:
            return torch.empty(rows, n, dtype=torch.long, device=self.device)
        first = torch.tensor([length - n for length in self.lengths], device=self.device)
        return self.history.gather(1, first[:, None] + torch.arange(n, device=self.device))

    def stream(self, n, stops):
        """Yield, at every step, each row's new token ids that cannot be part of a stop sequence any more."""
        try:
            yield from self._stream(n, stops)
        finally:                                                                    # also where the caller stops reading
            self.release()

    def _stream(self, n, stops):
        self._room(n)
        self.watches = True                                                         # the reader may change the model between two steps
        longest_stop = max(map(len, stops), default=1)
        pending = [[] for _ in self.prompts]                                        # drawn, but possibly the start of a stop sequence
        ended = [False] * len(self.prompts)
        for _ in range(n):
            if all(ended):
                return
            self._follow_model()
            drawn = self.step().tolist()
            self.check_logits()
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
        """Draw one token for every row; returns them, (rows,) int64 on the device. The next step may overwrite them."""
        if not self.prompts:
            return self.ends
        with self.turn:
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

    def _follow_model(self):
        """Go on with the model's present weights if the reader of a stream has changed, moved or replaced them since the last step."""
        if self.session is not None:
            if self.session.watch.unchanged():
                return
            self.collect()
            self.session = None                                                     # its addresses and cached keys are stale
            self._see_model()
        if (device := next(self.model.parameters()).device) != self.device:
            raise RuntimeError(f"the model was moved from {self.device} to {device} while it generated; call generate again with the "
                               "tokens so far as the prompt")
        self.block_size = self.model.config.block_size

    def _replays(self):
        """Whether `Session.replay` can run this step: the cache holds our rows, all inside the window, and the sampler is "philox"."""
        if self.session is None or not self.session.steps_whole or self.rng != "philox" or self.fresh or self.longest > self.block_size:
            return False
        if self.uncollected == 0:
            self.session.start_drawing(self.filters, self.seeds, self.offsets)
        return True

    @_gradless
    def collect(self):
        """Copy the tokens that replayed steps have drawn from the session."""
        if self.uncollected:
            at = self.ends[:, None] + torch.arange(self.uncollected, device=self.device)
            self.history.scatter_(1, at, self.session.drawn.gather(1, at))
            self.ends += self.uncollected
            self.offsets += self.uncollected
            self.tainted += self.session.tainted
            self.uncollected = 0
            self.session.feed(self.session.token, self.ends - 1)                    # clamps positions to the window

    def check_logits(self):
        """Raise RuntimeError, naming the row, if NaN or infinite logits were drawn from. Waits for the device."""
        tainted = self.tainted if self.uncollected == 0 else self.tainted + self.session.tainted
        for row, (value,) in enumerate(tainted.tolist()):
            if value != value:
                raise RuntimeError(f"row {row}: the model's logits are NaN or infinite, so no token can be drawn. Its weights hold NaN or "
                                   "infinity, or the dtype is too small for its numbers (float16: try bfloat16 or float32)")

    def sample(self, logits):
        self.tainted.add_(logits.amax(-1, keepdim=True), alpha=0)                   # a row's largest value is finite, or 0 times it is NaN
        if self.device.type == "cpu":
            self.check_logits()
        if self.rng == "torch":
            return draw(logits, **self.filters, generator=self.generator)
        return sampler.sample(logits, **self.filters, seed=self.seeds, offset=self.offsets, backend=self.model.backend)  # adds 1 to offsets

    def logits(self):
        """Logits of the next token of every row, (rows, V)."""
        if not self.cached:
            return self._windows(range(len(self.prompts)), self._model_logits)
        if self.session is None:                                                    # first step, or the model was changed
            self.session, self.fresh = session_of(self.model, len(self.prompts), self.dtype), True
            self.session.watch = Watch(self.model) if self.watches else None
        inside = [length <= self.block_size for length in self.lengths]
        if not any(inside):
            return self._windows(range(len(self.prompts)), self.session.encode)
        if self.fresh:
            copies, self.num_samples = self.num_samples, 1                          # encode identical prompts once
            logits = self.session.prefill(self.history[::copies, :min(self.longest, self.block_size)],
                                          self.ends[::copies].clamp(max=self.block_size), copies)
        else:
            logits = self.session.decode(min(self.longest, self.block_size))
        outside = [row for row, is_inside in enumerate(inside) if not is_inside]
        if outside:
            logits[torch.tensor(outside, device=self.device)] = self._windows(outside, self.session.encode).to(logits.dtype)
        return logits

    def _windows(self, rows, encode):
        """Logits after the last block_size tokens of the given rows, each encoded from position 0."""
        logits = None
        for length in sorted({self.lengths[row] for row in rows}):                  # rows of equal length form one batch
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
    """How many tokens at the end of `tail` could be the beginning of a stop sequence."""
    for keep in range(len(tail), 0, -1):
        if any(len(s) > keep and tuple(tail[-keep:]) == s[:keep] for s in stops):
            return keep
    return 0


def row_seeds(seed, rows, device, generator=None):
    """One int64 seed per row: as given, counted up from an int, or drawn from torch's generator."""
    if seed is None:
        return torch.randint(2 ** 62, (rows,), device=device, generator=generator)
    if isinstance(seed, numbers.Integral):
        seed = int(seed)
        return torch.arange(seed, seed + rows, device=device)
    seeds = torch.as_tensor(seed, dtype=torch.long)
    if seeds.shape != (rows,):
        raise ValueError(f"seed has {seeds.numel()} values for {rows} rows; give an int or one seed per row")
    return seeds.to(device)
