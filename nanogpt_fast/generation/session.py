"""The generation state of a model: its weights in the dtype of generation, the key-value cache, and the captured CUDA graphs.

One call of `generate` at a time uses a session. A call takes an idle one or builds one, and gives it back at its end, so that calls in
several threads and streams that are read in turns share nothing. A session is validated against the model when it is taken, and `Watch`
notices what happens to the model's weights while it is in use, so that it is never stale after an optimizer step, a load or a move.
"""
import operator
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import backend
from ..ops import attention, mlp, norm, sampler
from ..ops.graphs import Recorder
from ..touched import program
from . import decode

_idle = weakref.WeakKeyDictionary()  # model -> [Session]: those that no call uses; never more than were in use at the same time


def autocast_dtype(device):
    """The dtype of matmuls under the enclosing autocast, or None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def session_of(model, rows, dtype=None):
    """A session of a model for this number of rows, up to date with the model's weights. It is the caller's alone until `give_back`.

    dtype: of the matmuls; None: autocast's, or the parameters' own.
    """
    tensors = _tensors(model)
    dtype = dtype or autocast_dtype(tensors[0].device) or tensors[0].dtype
    idle, session = _idle.setdefault(model, []), None
    while session is None:
        try:
            kept = idle.pop()                                                       # other threads may take from the list, too
        except IndexError:
            session = Session(model, rows, dtype)
        else:                                                                       # one that does not fit is dropped: a cache is large
            session = kept if (kept.rows, kept.dtype) == (rows, dtype) and kept.is_of(model, tensors) else None
    session.memory = [t.detach() for t in tensors]
    if session.given_back is not None:                                              # by a run whose kernels may still be running
        torch.cuda.current_stream(session.device).wait_event(session.given_back)
    session.refresh()
    return session


def give_back(model, session):
    """Let the next call use this session."""
    session.memory = session.watch = None
    if session.device.type == "cuda":
        session.given_back = torch.cuda.current_stream(session.device).record_event()
    _idle.setdefault(model, []).append(session)


class Watch:
    """The modules and weights of a model at one moment: tells whether any has been moved, replaced, changed or touched since.

    Changes of values are noticed where PyTorch counts them (`_version`), which it doesn't for a write through `p.data`, to an inference
    tensor, or by a fused optimizer (the trainer's steps count theirs).
    """

    def __init__(self, model):
        self.sites = [(parts, name) for module in model.modules() for parts in (module._modules, module._parameters) for name in parts]
        self.parts, self.modules = self._parts(), list(model.modules())
        self.parameters = list(model.parameters())
        self.counted = [p for p in self.parameters if not p.is_inference()]
        self.form = self._form()

    def _parts(self):
        return [parts.get(name) for parts, name in self.sites]

    def _form(self):
        every = self.parameters
        return [list(map(read, tensors)) for read, tensors in ((torch.Tensor.data_ptr, every), (torch.Tensor.stride, every),
                                                               (_dtype, every), (_version, self.counted))] + [
            [(module.training, bool(module._forward_hooks or module._forward_pre_hooks), "forward" in module.__dict__,
              module.__dict__.get("n_head")) for module in self.modules], program()]

    def unchanged(self):
        """Whether the model consists of the same tensors, in the same memory, with the same values, and of modules as touched as before."""
        return all(map(operator.is_, self._parts(), self.parts)) and self._form() == self.form


_dtype, _version = operator.attrgetter("dtype"), operator.attrgetter("_version")


# A prefill of at most this many tokens is captured: launching GPT-2 124M's 512 tokens takes the host 13 ms, an H100 runs them in 1 ms.
PREFILL_CAPTURED = 8192


def prefill_width(T, block_size):
    """The width to which prompts of T tokens are padded, so that few widths are captured: a multiple of 64 up to 512 tokens; from 256
    on, at most a quarter more than T."""
    step = max(64, 2 ** (T - 1).bit_length() // 8)
    return min(-(-T // step) * step, block_size)


@dataclass
class Prompts:
    """The tensors that a captured prefill of one shape reads and writes."""
    idx: torch.Tensor               # (B, width) int64; anything after a prompt's end
    lengths: torch.Tensor           # (B,)
    logits: torch.Tensor = None     # (B * copies, V)
    replay: object = None           # captured at the second prefill of this shape


def _tensors(model):
    """All that a session reads, in order: of every block, the embeddings, the last norm and the head."""
    t = model.transformer
    modules = [t.wte, t.wpe, t.ln_f, model.lm_head]
    for block in t.h:
        modules += [block.ln_1, block.ln_2, block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    pairs = [(module.weight, getattr(module, "bias", None)) for module in modules]
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def _settings(model):
    """What else it reads."""
    return (model.config.block_size, model.config.n_head, len(model.transformer.h),
            [block.mlp.gelu.approximate for block in model.transformer.h])


def _place(tensor):
    return tensor.data_ptr(), tensor.stride(), tensor.dtype


class Layer:
    """One block's weights, in the dtype of the matmuls."""

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

    As under autocast, the residual stream is fp32 (the embedding's dtype) and every matmul runs in `dtype`. The cache holds keys
    and values (rows, H, block_size, D) for every layer.
    """

    def __init__(self, model, rows, dtype):
        self.tensors = [(weakref.ref(t), _place(t)) for t in _tensors(model)]
        self.settings = _settings(model)
        self.memory = None                                                          # keeps what the decoder reads by address allocated, and
        self.watch = None                                                           # a stream's Watch, both while a run uses the session
        self.given_back = None                                                      # on CUDA: the event at the end of the last run
        self.used = backend.current()                                               # the choice of the enclosing `use`
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
        self.token = torch.zeros(rows, dtype=torch.long, device=device)             # each row's last token ...
        self.position = torch.zeros(rows, dtype=torch.long, device=device)          # ... and its position
        self.token_column, self.position_column = self.token[:, None], self.position[:, None]   # views, (rows, 1)
        self.row = torch.arange(rows, device=device)
        self.activation = self.layers[0].activation if self.layers else "gelu"
        self.native = decode.decoder(self)                                          # one call per step: C++ on a CPU, Triton on CUDA
        # Decoding and drawing as one step (`replay`), and its further inputs and outputs; see `start_drawing`.
        self.steps_whole = device.type == "cuda" or self.native is not None
        self.recorder = Recorder(device, "generation", "use_cache=False generates without a graph") if device.type == "cuda" else None
        self.replays_step, self.prefills = None, {}                                 # the captured step; {(prompts, width, copies): Prompts}
        self.drawn = torch.zeros(rows, self.block_size + 1, dtype=torch.long, device=device)
        self.seeds, self.offsets, self.top_k = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.temperature, self.top_p, self.min_p = (torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(3))
        self.tainted = torch.zeros(rows, 1, dtype=torch.float32, device=device)     # NaN once a token was drawn by a NaN or infinite logit
        self.logits = self.draw = None                                              # a fixed buffer for every step's logits, if there is one
        if device.type == "cpu" and self.native is not None and self.wte.size(0) <= sampler.MAX_VOCAB:
            self.logits = torch.zeros(rows, self.wte.size(0), dtype=torch.float32, device=device)
            self.draw = sampler.prepare(self.logits, **self._drawing())

    def _drawing(self):
        return dict(out=self.token, seed=self.seeds, offset=self.offsets, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                    min_p=self.min_p, backend=self.choices)

    def is_of(self, model, now):
        """Whether the model still has the same tensors, in the same memory, and the same backend choices as when this was built.

        now: the model's `_tensors`.
        """
        return (self.choices, self.used, self.settings, len(self.tensors)) == (
            model.backend, backend.current(), _settings(model), len(now)) and all(
            kept() is t and place == _place(t) for t, (kept, place) in zip(now, self.tensors))

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
        """Every matrix and bias of a matmul."""
        return [tensor for layer in self.layers for pair in (layer.c_attn, layer.c_proj, layer.c_fc, layer.mlp_proj) for tensor in pair] \
            + list(self.head)

    def start_drawing(self, filters, seeds, offsets):
        """Set the parameters with which the captured step draws. A filter that is None gets the value that turns it off."""
        self.seeds.copy_(seeds)
        self.offsets.copy_(offsets)
        self.tainted.zero_()
        for name, off in (("temperature", None), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            getattr(self, name).fill_(off if filters[name] is None else filters[name])

    def replay(self):
        """One more token for every row, drawn into `token` and `drawn`. On CUDA a graph, captured at the first call."""
        if self.recorder is None:
            return self._decode_and_draw()
        if self.replays_step is None:
            state = [(tensor, tensor.clone()) for tensor in (self.token, self.position, self.offsets)]

            def warm_up():                  # it writes to the cache at `position`, which the real step overwrites
                self._decode_and_draw()
                for tensor, value in state:
                    tensor.copy_(value)     # after each of the two: `position` may be the last one
            for _ in range(2):
                self.recorder.run(warm_up)
            self.replays_step = self.recorder.record(self._decode_and_draw)
        self.replays_step()

    def _decode_and_draw(self):
        logits = self.decode(self.block_size)
        if logits is self.logits:                                                   # the extension filled the fixed buffer
            self.draw()
        else:
            sampler.sample_out(logits, **self._drawing())
        # 0 times NaN or infinity is NaN. The drawn token's logit suffices: it is finite only if some logit is, and NaN in some logits alone
        # comes from the head's weight, so that the prompt's logits, which are checked whole, have shown it.
        self.tainted.add_(logits.gather(1, self.token_column), alpha=0)
        self.position += 1
        self.drawn.scatter_(1, self.position_column, self.token_column)

    def feed(self, token, position):
        """Set each row's token that the next `decode` processes, and its position."""
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
        prompts.idx[:, :T] = idx            # padded even if not replayed, so that both give the same bits
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
        """Logits after idx (B, T), without the cache -> (B, V)."""
        def attend(layer, qkv):
            return attention.causal_attention_qkvpacked(qkv, self.n_head, backend=self.choices)
        return self._head(self._trunk(idx, attend)[:, -1])

    def decode(self, upto):
        """Process `token` at `position` in every row, with the cache -> logits (rows, V). upto: the longest row, in tokens."""
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
        with torch.autocast(x.device.type, enabled=False):                          # the weights have been cast
            branch = None
            for i, layer in enumerate(self.layers):
                x, h = self._norm(x, branch, layer.ln_1)
                x, h = self._norm(x, F.linear(attend(i, F.linear(h, *layer.c_attn)), *layer.c_proj), layer.ln_2)
                branch = mlp.gelu_mlp(h, *layer.c_fc, *layer.mlp_proj, activation=layer.activation, backend=self.choices)
            return self._norm(x, branch, self.ln_f)[1]

    def _norm(self, x, branch, weights):
        return norm.add_layer_norm(x, branch, *weights, out_dtype=self.dtype, backend=self.choices)

    def _head(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, *self.head)
