"""Recognised, then tried: a candidate's own forward and ours run on the same random weights and inputs before it is swapped.

A fork that keeps nanoGPT's names and computes something else is found out here, and by how much it differs.
"""
import functools

import torch
import torch.nn as nn

from .. import backend as _backend
from . import gpt2, parts
from .swapped import swapped_class

# What ours may differ from the module's own, relative to the largest value: both are float64 except attention (float32, since
# its probe is long) and the whole model (its own weights and dtype). An erf GELU in the place of a tanh one shows as 1e-4.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LONGEST_PROBE = 1024


def swap(module, mixin, state, tried, context):
    """Swap one module, after trying it out. None, or why not; then the module is as it was."""
    own = type(module)
    cls = swapped_class(own, mixin)
    # Modules of one class whose plain attributes and shapes are equal compute the same function of their weights: one is tried.
    # transformers' code is known: layer_idx there numbers the cache, and may enter the scale; the mask buffers are not read.
    known = issubclass(mixin, gpt2.FromTransformers)
    by_layer = getattr(module, "scale_attn_by_inverse_layer_idx", False)
    plain = {name: value for name, value in module.__dict__.items()
             if isinstance(value, (int, float, str, type(None))) and (name != "layer_idx" or not known or by_layer)}
    inner = tuple((name, type(child), tuple(sorted((k, v) for k, v in vars(child).items() if isinstance(v, (int, float, str)))))
                  for name, child in module.named_modules() if child is not module and mixin is not parts.NanoGPT)
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    fixed = tuple((name, id(buffer)) for name, buffer in module.named_buffers()
                  if not (known and name.rpartition(".")[2] in gpt2.MASK_BUFFERS))
    key = (own, mixin, tuple(sorted(plain.items(), key=str)), inner, shapes, fixed)
    module.__dict__["_swap_state"] = state
    try:
        module.__class__ = cls
        if key not in tried:
            tried[key] = _tried(module, context)
    except TypeError as error:                  # __slots__ and the like: the layouts differ
        tried[key] = f"its class cannot be exchanged ({error})"
    if tried[key] is not None:
        module.__class__ = own
        del module.__dict__["_swap_state"]
    return tried[key]


def _tried(module, context):
    """None where the module's own forward and ours agree on random inputs, in eval and train mode; else what is different."""
    modes = [(m, m.training) for m in module.modules()]
    calls = module._swap_state.calls.copy()
    try:
        with (torch.no_grad(), torch.random.fork_rng(_devices(module)), _backend.use("reference"),
              torch.autocast("cpu", enabled=False)):
            for training in (False, True):
                module.train(training)
                probe = _model_probe(module) if isinstance(module, parts.NanoGPT) else _probe(module, context)
                reason = _compare(module, *probe)
                if reason is not None:
                    return f"{reason} in {'train' if training else 'eval'} mode"
    except Exception as error:
        return f"trying it out raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for m, training in modes:
            m.training = training
        module._swap_state.calls = calls
    return None


class _Call(nn.Module):
    """A function of a module, in a form that torch.func.functional_call takes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, method, *args):
        return method(self.module, *args)


def _probe(module, context):
    """(own, ours): two functions without arguments that run a part on the same random weights and inputs, on the CPU."""
    attends = isinstance(module, (parts.NanoAttention, parts.SeparateAttention, gpt2.GPT2Attention))
    dtype = torch.float32 if attends else torch.float64
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5     # outputs of order one: nothing hides in zeros
        tensors[f"module.{name}"] = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    for name, buffer in module.named_buffers():
        tensors[f"module.{name}"] = buffer.detach().to("cpu", dtype if buffer.is_floating_point() else buffer.dtype)
    T = min(context, LONGEST_PROBE if attends else 16)
    x = torch.randn(1, T, _width(module), generator=generator, dtype=dtype)
    call = _with_and_without_cache if isinstance(module, gpt2.FromTransformers) else (lambda method, module, x: method(module, x))
    run = lambda method: torch.func.functional_call(_Call(module), tensors, (functools.partial(call, method), x))
    return lambda: run(type(module)._own.forward), lambda: run(type(module).fast)


def _with_and_without_cache(method, module, x):
    """The tensors that two calls of a part of transformers' GPT-2 return, and what is in the cache then; records the forms."""
    plain = method(module, x)
    name = gpt2.cache_name(module._own.forward)
    if name == "layer_past":
        cached, kept = method(module, x, use_cache=True), ()
    else:
        from transformers import DynamicCache
        cache = DynamicCache()
        cached = method(module, x, use_cache=True, **{name: cache})
        attn = getattr(module, "attn", module)
        heads = x.new_zeros(1, attn.num_heads, 1, attn.head_dim)
        kept = cache.update(heads, heads, attn.layer_idx)                           # returns what is in it, and the new
    # The own forward is called first; ours returns by these.
    module._swap_state.forms.setdefault(module._own, {False: gpt2.form(plain), True: gpt2.form(cached)})
    return tuple(_tensors((plain, cached, kept)))


def _tensors(result):
    """The tensors of nested tuples, in order."""
    return [result] if torch.is_tensor(result) else [t for item in result or () for t in _tensors(item)]


def _model_probe(module):
    """The same for the whole model, on its own weights where they are: random ones would be a second model in memory."""
    T = min(module.config.block_size, 16)
    device = module.lm_head.weight.device
    idx = (torch.arange(2 * T, device=device) * 7 % module.lm_head.weight.size(0)).view(2, T)
    targets = idx.roll(-1, 1)
    targets[0, 0] = -1
    run = lambda method: (*method(module, idx, targets), method(module, idx)[0])
    return lambda: run(type(module)._own.forward), lambda: run(type(module).fast)


def _compare(module, own, ours):
    results = []
    for call in (own, ours):
        torch.manual_seed(0)                    # the same dropout masks, where they are drawn in the same order
        result = call()
        results.append([t for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t)])
    if [t.shape for t in results[0]] != [t.shape for t in results[1]]:
        return f"its results have shapes {[tuple(t.shape) for t in results[0]]}, ours {[tuple(t.shape) for t in results[1]]}"
    for expected, found in zip(*results):
        difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not difference <= TOLERANCE.get(expected.dtype, 1e-6):
            return f"it computes something else: {difference:.1e} of the largest value away from nanoGPT's"
    return None


def _width(module):
    """C, of what goes in."""
    for name in ("ln_1", "ln1"):
        if hasattr(module, name):
            return getattr(module, name).weight.numel()
    if isinstance(module, parts.Norm):
        return module.weight.numel()
    for name in ("n_embd", "embed_dim"):
        if name in module.__dict__:
            return getattr(module, name)
    if isinstance(module, parts.SeparateAttention):
        return module.query.in_features
    return module.weights()[0].size(1)


def context_length(model):
    """The longest context of a model, in tokens, where its config says so."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("block_size", "n_positions"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
    return 64


def _devices(module):
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
