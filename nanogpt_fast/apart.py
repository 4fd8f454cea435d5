"""Under torch.compile the loss of a training call runs after the compiled graph, so that nobody pays for logits that nobody uses.

`model(x, y)` returns the logits, and most training loops drop them. A compiled graph cannot know: autograd fills the gradient of each
unused output with zeros, and the graph's backward reads them (pytorch#131794), 13 GB in a step of GPT-2 124M with 64 x 1024 tokens. Outside
of a graph our loss asks autograd for None instead (ops/cross_entropy.py).

Dynamo compiles frame by frame. It is told to skip two: that of `call`, which is GPT's `__call__` and that of an accelerated fork, and that
of the loss with all that it calls. The frame between them, from the embedding to the last LayerNorm, becomes one graph, as before; nothing
breaks it. A graph that holds a call of the model (a compiled training step, a module around it) is traced whole, since only frames are
skipped.
"""
import torch
import torch.nn as nn


def call(self, *args, **kwargs):
    """GPT.__call__, and that of nanoGPT's class on our ops (swap/parts.py)."""
    if _apart(self, args, kwargs):
        idx, targets = *args, *kwargs.values()
        return _after(self, self._hidden(idx), targets)
    return nn.Module.__call__(self, *args, **kwargs)


def _apart(model, args, kwargs):
    """Whether this is `model(idx, targets)` in training, of an untouched GPT whose loss a kernel computes: PyTorch's own loss is better off
    inside a graph, where Inductor fuses it."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and len(args) + len(kwargs) == 2 and kwargs.keys() <= {"targets"}):
        return False
    idx, targets = *args, *kwargs.values()
    try:
        return isinstance(targets, torch.Tensor) and model._why_not_apart(idx, targets) is None
    except RuntimeError:        # no kernel can run, and one was asked for: the first op says so
        return False


def _after(model, hidden, targets):
    return model._logits_and_loss(hidden, targets)


def _skip(function, callees):
    """Tell Dynamo not to compile the frames of a function; callees: nor those of the functions that it calls. Without importing the compiler,
    which takes a second; if a PyTorch has no such call, a compiled call is one graph, the loss in it."""
    try:
        dynamo = torch._C._dynamo.eval_frame
        skip, default = dynamo._FrameAction.SKIP, dynamo._FrameAction.DEFAULT
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip if callees else default))
    except (AttributeError, TypeError):
        pass


_skip(call, callees=False)
_skip(_apart, callees=True)
_skip(_after, callees=True)
