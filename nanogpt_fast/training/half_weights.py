"""Half-precision copies of the matmul weights, cast once per optimizer step instead of at every use.

Autocast casts every fp32 weight in every forward pass: 4 bytes read and 2 written per parameter, 0.75 GB per micro-batch of GPT-2
124M, and with 40 micro-batches per step 40 times the same result. Here each matmul weight has one copy:

    with weights.in_use():       attention, MLP and head find the copies in their attribute `copies`, beside their fp32 weights
        loss = model(x, y)[1]
        loss.backward()          gradients go to the fp32 weights
    optimizer.step()             updates the fp32 weights
    weights.refresh()            the only cast; a step in one pass over memory (ops/adamw.py) makes it itself

The results are autocast's: it casts the same weight to the same bits, and its gradient back to fp32. Where a kernel or the extension
computes the gradient, or cuBLAS in fp32, it is never even rounded to half precision: all of them on a GPU and on a CPU with AMX
(ops/linear.py). On the CPU the extension runs the GEMMs in float32, too, where nothing needs casting. The embedding, which shares the
vocabulary head's weight, keeps reading fp32; biases and LayerNorms are small and stay with autocast.
"""
import contextlib

import torch
import torch.nn as nn

from .. import backend
from ..model import GPT, MLP, Block
from ..ops import linear
from ..touched import touched


class HalfWeights:
    """The copies of a GPT's matmul weights in `dtype`; none if dtype is float32, or if `leave` gives a reason not to make any.

    compiled: the forward is compiled, and torch.compile generates the matmuls itself. in_place: a backward may add to a weight's gradient
    instead of handing autograd one to add (ops/linear.py): only `loss.backward()` finds it.

    weights, copies: each matmul weight, and its copy. own: the Linears whose weight gradients come from the extension, which do not match
    PyTorch's bit for bit. why_not: why weights were left to autocast, one text per block or head: a replaced or hooked module may read
    its weight while it computes.
    """

    def __init__(self, model, dtype, leave=None, compiled=False, in_place=False):
        groups, self.why_not = ([], [leave]) if leave else _untouched_linears(model)
        cast = dtype != torch.float32
        self.model, self.groups, self.own = model, [], []
        for module, linears in groups:
            if any(linear.weight.dtype != torch.float32 for linear in linears):
                continue
            # The head (module is model) is excluded: the loss op runs its matmuls.
            own = (not compiled and module is not model and not (isinstance(module, MLP) and _is_reference("mlp", module))
                   and all(_by_extension(linear, dtype, module.backend) for linear in linears))
            if cast or own:
                self.groups.append((module, tuple(linear.weight for linear in linears)))
            self.own += linears if own else ()
        self.weights = [weight for _, weights in self.groups for weight in weights]
        shared = {weight: weight.detach().to(dtype) for weight in self.weights} if cast else {}     # two modules may have one weight
        self.copies = [shared[weight] for weight in self.weights] if cast else []
        self._cast_from = self._states()
        for copy, weight in zip(self.copies, self.weights):
            copy.in_place = in_place and weight.is_leaf

    @contextlib.contextmanager
    def in_use(self):
        """Inside, forward and backward passes use the copies."""
        self.follow()
        copies = iter(self.copies or [weight.detach() for weight in self.weights])
        for module, weights in self.groups:     # bypass nn.Module.__setattr__
            module.__dict__["copies"] = weights, tuple(next(copies) for _ in weights)
        try:
            yield
        finally:
            for module, _ in self.groups:
                module.__dict__.pop("copies", None)

    def follow(self):
        """Refresh the copies if weights changed since they were cast: a checkpoint was loaded, or an average swapped in. What PyTorch does not
        count as a change, `weight.data.copy_(...)`, needs `refresh()`. Raises RuntimeError if the model has a third dtype since."""
        if self._states() != self._cast_from:
            for copy, weight in zip(self.copies, self.weights):
                if weight.dtype not in (torch.float32, copy.dtype):
                    raise RuntimeError(f"the model became {weight.dtype} after the training step was made, whose copies are {copy.dtype} of "
                                       "float32 weights: make a new step, or call model.float()")
            self.refresh()

    def _states(self):
        return [(weight._version, weight.data_ptr(), weight.dtype) for weight in self.weights] if self.copies else []

    @torch.no_grad()
    def refresh(self, left_out=False):
        """Cast the current weights; left_out: only those without a gradient, which a step in one pass over memory leaves as they are.
        Calling it between a forward and its backward makes the backward raise."""
        pairs = [(copy, weight) for copy, weight in zip(self.copies, self.weights) if not left_out or weight.grad is None]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs)))
        self.were_cast()

    def were_cast(self):
        """Note that the copies are those of the present weights."""
        self._cast_from = self._states()


def _is_reference(op, module):
    return backend.choice(op, module.backend) == "reference"


def _by_extension(module, dtype, choices):
    """Whether the extension runs the GEMMs of this Linear in `dtype`."""
    weight = module.weight
    return linear.implementation(weight, weight.detach()[:0].to(dtype), backend=choices) == "cpp"


def _untouched_linears(model):
    """([(module, its Linears whose weights only our own code reads)], [the reasons for the others])."""
    reason = touched(model, GPT)
    if reason is not None:
        return [], [reason]
    found, left = [], []
    for i, block in enumerate(model.transformer.h):
        reason = block.why_not_fused() if isinstance(block, Block) else f"{type(block).__name__} replaces Block"
        inside = [] if reason else [(block.attn, (block.attn.c_attn, block.attn.c_proj)), (block.mlp, (block.mlp.c_fc, block.mlp.c_proj))]
        reason = reason or next(filter(None, (touched(linear, nn.Linear) for _, linears in inside for linear in linears)), None)
        if reason is None:
            found += inside
        else:
            left.append(f"block {i}: {reason}")
    reason = touched(model.lm_head, nn.Linear)
    if reason is None:
        found.append((model, (model.lm_head,)))
    else:
        left.append(f"lm_head: {reason}")
    return found, left
