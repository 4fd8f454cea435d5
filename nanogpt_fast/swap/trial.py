"""The trial: before a candidate is swapped, a copy of it runs its own forward and ours on the same weights and inputs.

Three things have to hold, in eval and in train mode, for a few tokens with gradients and for the model's whole context:

    equal results       Structure, types, shapes, values, gradients, and the random numbers that dropout draws. Weights and inputs are
                        random, and each dropout has another probability, so that neither zeros nor a rate of 0 hide its position.
    no other operation  A rule for large values, for one token id or for a distant position may not show in a few random numbers, but it
                        shows in the operations: none of our formulas needs clamp, gt, where or max, except inside PyTorch's own
                        functions. So a part that runs an operation outside of OPERATIONS is not swapped. Sums, products and changes of
                        shape are in all of its lists: where they differ, the values do.
    no other effect     stage.py lists what a call may write to.
"""
import functools
import math

import torch
import torch.nn as nn

from .. import backend as _backend
from . import gpt2, parts, stage
from .swapped import State, Swapped, swapped_class, watch

# Allowed difference between our result and the module's own, relative to the largest value. Erf GELU instead of tanh differs by 1e-4.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
LONGEST_PROBE = 16384

_SHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "t", "transpose", "permute", "split", "split_with_sizes", "slice",
           "select", "unsqueeze", "squeeze", "expand", "unbind", "clone", "cat", "stack", "as_strided", "lift_fresh", "unfold",
           "empty", "empty_like", "new_empty", "arange", "_to_copy", "unsafe_split", "unsafe_chunk"}
_SUMS = {"add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum"}
_DROPOUT = {"bernoulli_", "native_dropout"}
_NORM = {"native_layer_norm", "var_mean", "var", "mean", "rsqrt", "sqrt", "pow", "std"}
_MASK = {"ones", "zeros", "full", "tril", "triu", "eq", "logical_not", "bitwise_not", "masked_fill", "masked_fill_", "scalar_tensor",
         "_to_copy"}
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_safe_softmax", *_MASK}
_MLP = {"gelu", "relu", "tanh", "pow", "erf", "sqrt"}     # sqrt(2 / pi)
_PLAIN = _SHAPES | _SUMS | _DROPOUT
OPERATIONS = {"layer_norm": _SHAPES | _SUMS | _NORM, "attention": _PLAIN | _ATTENTION, "mlp": _PLAIN | _MLP,
              "block": _PLAIN | _NORM,          # and those of its parts
              "model": _PLAIN | _NORM | {"embedding", "index", "_log_softmax", "nll_loss_forward"},
              "forward": set(),         # "forward" and "generate" are for run.py, which adds those of a whole model
              # x[mask] = number is index_put_, and masked_fill_ from PyTorch 2.15 on.
              "generate": _PLAIN | {"topk", "lt", "index", "index_put_", "masked_fill", "masked_fill_", "_softmax", "multinomial"}}


def swap(module, mixins, state, tried):
    """Swap one module, with the first of `mixins` that computes the same. Returns None, or why_not, and then the module is unchanged."""
    own, first = type(module), None
    for mixin in mixins:
        lacking = tuple(name for name in getattr(mixin, "dropouts", ()) if name not in module._modules)
        cls = swapped_class(own, mixin, lacking)
        if used := sorted(set(lacking) & cls._mentioned):
            return f"its code uses {', '.join(used)}, which it lacks"
        key = _key(module, mixin, lacking)
        if key not in tried:
            try:
                tried[key] = _trial_why_not(module, cls, state)
            except stage.CannotCopy as error:
                tried[key] = f"it cannot be copied to be tried: {error}"
            except Exception as error:
                tried[key] = f"trying it out raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        why_not = tried[key]
        if why_not is None:
            try:
                object.__setattr__(module, "__class__", cls)      # bypasses a __setattr__ of the module's own
            except TypeError as error:              # the layouts differ, through __slots__ for example
                return f"its class cannot be replaced ({error})"
            module.__dict__["_swap_state"] = state
            watch(module)
            return None
        first = first or why_not
    return first


def _key(module, mixin, lacking):
    """Class, attributes, children, shapes and buffers. Modules with equal keys compute the same function of their weights, so one of them
    is tried. Two exceptions for transformers, whose code is known: layer_idx numbers the cache, and matters to the result only with
    scale_attn_by_inverse_layer_idx; the mask buffers are not read."""
    known = issubclass(mixin, gpt2.FromTransformers)
    by_layer = getattr(module, "scale_attn_by_inverse_layer_idx", False)
    def facts(path, m):
        attributes = sorted((name, _frozen(value)) for name, value in m.__dict__.items() if name[:6] != "_swap_" and name not in _MEMBERS
                            and not ("hooks" in name and isinstance(value, dict))
                            and not (known and name == "layer_idx" and not by_layer))
        buffers = [(name, _frozen(buffer)) for name, buffer in m._buffers.items() if not (known and name in gpt2.MASK_BUFFERS)]
        return path, type(m), tuple(attributes), tuple(buffers)
    inside = [("", module)] if mixin is parts.NanoGPT else module.named_modules()
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return mixin, lacking, shapes, tuple(facts(path, m) for path, m in inside)


_MEMBERS = ("_parameters", "_buffers", "_modules")


def _frozen(value):
    """Something hashable that is equal for equal attributes; for an object of unknown type its id."""
    if isinstance(value, stage.PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), hash(bits.numpy().tobytes())
    if type(value) in (list, tuple, dict, set):
        return type(value).__name__, tuple(map(_frozen, value.items() if isinstance(value, dict) else value))
    return id(value)


def _trial_why_not(module, cls, state):
    """None if a copy's own forward and ours agree in everything that the module docstring lists; else what differs."""
    short, long = min(state.context, 16), min(state.context, LONGEST_PROBE)
    # float32 for the others: PyTorch's attention and a written-out one sum in different orders, and a whole vocabulary in float64 takes
    # seconds.
    dtype = torch.float64 if cls.part in ("layer_norm", "mlp") else torch.float32
    trial_state, twin = State(state.choices, long), None
    trial_state.forms, trial_state.operations = state.forms, state.operations
    with (torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]), _backend.use("reference"),
          torch.autocast("cpu", enabled=False), torch.device("cpu")):
        for B, T, training, precision in ((2, short, False, dtype), (2, short, True, dtype), (1, 1, False, dtype),
                                          (1, long, False, torch.float32)):
            if twin is None or next(twin.parameters()).dtype != precision:
                twin = _twin(module, cls, trial_state, precision)
            for m in twin.modules():
                m.__dict__["training"] = training
            if why_not := _twin_why_not(twin, type(module), cls, B, T, precision, with_gradients=training):
                return f"{why_not} in {'train' if training else 'eval'} mode"
    return None


def _twin(module, cls, state, dtype):
    """A copy with random weights in `dtype`, and a different probability for each dropout."""
    replaced = {id(m._swap_state): state for m in module.modules() if "_swap_state" in m.__dict__}
    if issubclass(cls, parts.NanoGPT):
        replaced.update({id(block): _Block(i) for i, block in enumerate(module.transformer.h)})
    twin = stage.copy_of(module, replaced)
    twin.__dict__["_swap_state"] = state
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5     # outputs of order one, so that no difference vanishes
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype, device="cpu").mul_(scale)
    for i, m in enumerate(twin.modules()):
        for tensors in (m._buffers, m.__dict__):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensors[name] = tensor.to(dtype)
        if isinstance(m, nn.Dropout):
            m.__dict__["p"] = 0.1 + 0.3 * i / (i + 5)
        elif isinstance(m, parts.NanoAttention) or issubclass(cls, parts.NanoAttention) and m is twin:
            if isinstance(m.__dict__.get("dropout"), (int, float)):
                m.__dict__["dropout"] = 0.25
    return twin


class _Block(nn.Module):
    """Replaces a block in the trial of a whole model (blocks have a trial of their own): cheap, and a change of their order shows."""

    def __init__(self, i):
        super().__init__()
        self.scale, self.shift = 1.0 + 0.1 * (i % 7), 0.3 + 0.01 * i

    def forward(self, x):
        return x * self.scale + self.shift


def _twin_why_not(twin, own, cls, B, T, dtype, with_gradients):
    """None, or what differs between the own forward and ours on B rows of T tokens."""
    inputs, more = _inputs(twin, cls, B, T, dtype)
    for args in inputs:
        seen = []
        for which in (own, cls):
            object.__setattr__(twin, "__class__", which)
            with torch.no_grad():
                what = stage.call(twin, functools.partial(_call, which is cls, cls), args, more)
            if what.effects:
                return f"its forward does more than return: it {', '.join(what.effects[:4])},"
            drawn = torch.random.default_generator.get_state()
            gradients = stage.call(twin, functools.partial(_gradients, which is cls, cls), args, more).result if with_gradients else ()
            seen.append((what, drawn, gradients))
        (theirs, drawn, gradients), (ours, drawn_by_ours, gradients_of_ours) = seen
        if _structure(theirs.result) != _structure(ours.result):
            return f"it returns {_structure(theirs.result)}, nanoGPT's {_structure(ours.result)},"
        if not torch.equal(drawn, drawn_by_ours):
            return "it computes something else: it draws other random numbers than nanoGPT's"
        if (difference := _largest(map(_difference, _tensors(theirs.result), _tensors(ours.result)))) > TOLERANCE[dtype]:
            return f"it computes something else: {difference:.1e} of the largest value away from nanoGPT's"
        # Relative to the largest of all gradients: some of them are 0 up to rounding.
        largest = max((g.abs().max() for g in gradients if g is not None and g.numel()), default=None)
        difference = _largest(_difference(a, b, largest) for a, b in zip(gradients, gradients_of_ours))
        if difference > TOLERANCE[dtype]:
            return f"it computes something else: its gradients are {difference:.1e} of the largest value away from nanoGPT's"
        inside = [twin._swap_state.operations[m._own] for m in twin.modules() if m is not twin and isinstance(m, Swapped)]
        if not _known(own) and (others := sorted(theirs.operations.difference(ours.operations, OPERATIONS[cls.part], *inside))):
            return f"it computes something else, where a rule may hide: {', '.join(others[:4])},"
        twin._swap_state.operations[own] |= theirs.operations
    return None


def _difference(expected, found, largest=None):
    """The largest difference between two tensors, relative to `largest` or the largest value; 0 for two Nones, inf for one."""
    if expected is None or found is None or not expected.numel():
        return 0.0 if (expected is None) == (found is None) else float("inf")
    largest = expected.abs().max() if largest is None else largest
    return ((expected - found).abs().max() / largest.clamp(min=1e-30)).item()


def _largest(differences):
    """The largest; infinity if one is NaN."""
    return max((float("inf") if math.isnan(d) else d for d in differences), default=0.0)


def _known(own):
    return own.__module__.startswith("transformers.models.gpt2")


def _call(fast, cls, module, *args, plain=False, **keywords):
    """Call the own forward or ours; transformers' parts with and without a cache, unless `plain` (checkpointing drops the cache)."""
    def method(*args, **keywords):
        return cls.fast(module, *module.inputs(args, keywords)) if fast else cls._own.forward(module, *args, **keywords)
    if issubclass(cls, gpt2.FromTransformers) and not plain:
        return _with_and_without_cache(method, module, cls, *args)
    return method(*args, **keywords)


def _inputs(twin, cls, B, T, dtype):
    """([arguments of each call], keywords): the same inputs every time; None for arguments without a default."""
    generator = torch.Generator().manual_seed(1)
    more = {} if issubclass(cls, gpt2.FromTransformers) else {name: None for name in cls._required}
    if issubclass(cls, parts.NanoGPT):
        idx, targets = (torch.randint(twin.lm_head.weight.size(0), (B, T), generator=generator) for _ in range(2))
        targets[torch.rand(B, T, generator=generator) < 0.1] = -1
        return [(idx, targets), (idx,)], more
    x = torch.randn(B, T, _width(twin, cls), generator=generator, dtype=dtype)
    return [(x,), (1e6 * x,)] if dtype == torch.float64 else [(x,)], more  # large ones too: an activation that clips only far out shows there


def _gradients(fast, cls, twin, *args, **keywords):
    """Gradients of a weighted sum of the results of a call with respect to the weights and the input."""
    leaves = list(twin.parameters())
    if args[0].is_floating_point():
        leaves.append(args[0].clone().requires_grad_())
        args = (leaves[-1] * 1, *args[1:])
    outputs = [t for t in _tensors(_call(fast, cls, twin, *args, plain=True, **keywords)) if t.requires_grad]
    generator = torch.Generator().manual_seed(2)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs)
    for leaf in leaves:
        leaf.grad = None
    if outputs:
        torch.autograd.backward(total)      # reentrant checkpoints refuse autograd.grad; total.backward() may be patched (run.py does)
    return [leaf.grad for leaf in leaves]


def _with_and_without_cache(method, module, cls, x):
    """What two calls of a part of transformers' GPT-2 return, and the cache's contents after them; records the forms of the results."""
    plain = method(x)
    name = gpt2.cache_name(cls._own.forward)
    if name == "layer_past":
        cached, kept = method(x, use_cache=True), ()
    else:
        from transformers import DynamicCache
        cache = DynamicCache()
        cached = method(x, use_cache=True, **{name: cache})
        attn = getattr(module, "attn", module)
        heads = x.new_zeros(x.size(0), attn.num_heads, 1, attn.head_dim)
        kept = cache.update(heads, heads, attn.layer_idx)                           # returns the old contents and the new entry
    # The own forward is called first and sets the forms; ours returns results in them.
    module._swap_state.forms.setdefault(cls._own, {False: gpt2.form(plain), True: gpt2.form(cached)})
    return plain, cached, kept


def _structure(result):
    """The types and shapes of what a call returned, as text."""
    if torch.is_tensor(result):
        return f"a {str(result.dtype).removeprefix('torch.')} tensor {tuple(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__} of {', '.join(map(_structure, result)) or 'nothing'}"
    return repr(result) if isinstance(result, stage.PLAIN) else type(result).__name__


def _tensors(result):
    """The tensors of nested tuples, in order."""
    return [result] if torch.is_tensor(result) else [t for item in result or () for t in _tensors(item)]


def _width(module, cls):
    """C of the input."""
    for name in ("ln_1", "ln1"):
        if hasattr(module, name):
            return getattr(module, name).weight.numel()
    if issubclass(cls, parts.Norm):
        return module.weight.numel()
    for name in ("n_embd", "embed_dim"):
        if name in module.__dict__:
            return getattr(module, name)
    if issubclass(cls, parts.SeparateAttention):
        return module.query.in_features
    return cls.weights(module)[0].size(1)


def context_length(model):
    """The longest context of a model in tokens: from its config, else from causal masks and position embeddings, else 1024."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("block_size", "n_positions", "max_seq_len", "n_ctx", "sequence_len", "context_length"):
            if type(length := getattr(config, name, None)) is int:
                return length
    masks = [b.size(-1) for b in model.buffers() if b.dim() >= 2 and b.size(-1) == b.size(-2)]
    positions = [m.num_embeddings for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "pos" in name]
    return min(masks + positions, default=1024)
