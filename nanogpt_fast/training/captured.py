"""A training step as CUDA graphs: the host launches two graphs per step instead of a thousand kernels.

A small model is launch-bound: its kernels finish before Python can launch the next. All shapes of a step are static, so its
three parts are captured once and replayed from then on:

    first     forward and backward of the first micro-batch; gradients are written
    more      the same for every further micro-batch; gradients are accumulated     (A micro-batches replay it A - 1 times)
    update    clipping, AdamW, the half-precision copies of the weights

So a step without accumulation neither clears nor adds gradients, and 40 micro-batches do not need a graph 40 times the size. The
parts are ordinary functions: on a device without graphs, such as a CPU in the tests, they are called instead of replayed.

Nothing has to be restored after the warm-up, because the warm-up is training: the first WARM_UP_STEPS steps run the parts eagerly
on the stream that captures later, and capturing executes nothing. Everything that compiles, allocates or initialises lazily
(Triton, Inductor, cuBLAS, AdamW's moments) has done so by then. Dropout continues its random sequence: a graph draws from torch's
generator, whose offset each replay advances as far as the kernels would have.

Replays read and write only memory that stays allocated: parameters, moments, copies, and here the batch, the loss and the
learning rate. Between replays evaluation, sampling and checkpoints see the current parameters and an ordinary optimizer: its
learning rate is a tensor, and `capturable` is set, only while `update` runs.
"""
import contextlib

import torch
import torch.nn as nn

from .. import backend
from ..model import GPT, MLP, Block, CausalSelfAttention, LayerNorm
from ..ops.graphs import Recorder
from ..touched import replaced, touched

# One step completes all lazy initialisation; PyTorch's notes on CUDA graphs advise three.
WARM_UP_STEPS = 3

MOST_CAPTURES = 4       # a program that changes something at every step would have each captured anew

# Modules whose forward passes never wait for the GPU.
ASYNCHRONOUS = (GPT, Block, CausalSelfAttention, MLP, LayerNorm, nn.Linear, nn.Embedding, nn.Dropout, nn.GELU, nn.ModuleDict,
                nn.ModuleList)


def why_not(model, optimizer, device, *, ranks=1, scaled=False):
    """None if the training step of this model and optimizer can be captured, else the reason as text.

    ranks: number of processes that train together; scaled: whether a GradScaler is in use.
    """
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this one is {device.type}"
    if ranks > 1:
        return f"{ranks} ranks train together: the host decides when DDP sends which gradients"
    if scaled:
        return "float16's GradScaler keeps part of its state on the host"
    if not all("capturable" in group for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no `capturable`: its step reads the learning rate on the host"
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection checks every gradient on the host"
    return why_not_asynchronous(model)


def why_not_asynchronous(model):
    """None if this model's step never waits for the GPU, else the reason as text."""
    reason = replaced("scaled_dot_product_attention", "layer_norm", "cross_entropy")    # the others are their modules'
    if reason is not None:
        return f"what computes it may wait for the GPU: {reason}"
    for name, module in model.named_modules():
        cls = type(module)
        reason = touched(module, cls) if cls in ASYNCHRONOUS else f"{cls.__name__} is not one of nanoGPT's modules"
        if reason is not None:
            return f"{name or 'the model'} may wait for the GPU: {reason}"
    return None


class CapturedStep:
    """A step in parts: `micro_step(x, y, first=True)`, `micro_step(x, y, first=False)` for every further micro-batch, `update()`.

    forward_backward(x, y): runs both passes and returns the micro-batch's detached loss, 0-d, without waiting for the GPU.
    update(): clips, steps the optimizer and does whatever else ends a step; it must not clear gradients. prepare(): called before
    `update` is captured, when the gradients are where every replay will find them.
    batch_shape: (B, T) of every x and y, int64. fixed(): what forward_backward reads on the host, and a replay would not see change.
    why_not(): None if the step can be captured as it is now, else the reason.

    `loss` is the sum of forward_backward's results since the first micro-step, 0-d on the device; the next step overwrites
    it. A learning rate set in optimizer.param_groups takes effect at the next `update()`. Where fixed(), another option of the optimizer, its
    parameters or its state has changed since the capture, the step is run as at first, and captured again; without graphs from then on, where
    why_not() says so, or after MOST_CAPTURES.
    """

    def __init__(self, forward_backward, update, optimizer, batch_shape, device, prepare=lambda: None, fixed=tuple,
                 why_not=lambda: None):
        self._forward_backward, self._optimizer_step, self._prepare, self._of_model = forward_backward, update, prepare, fixed
        self._why_not, self.captures = why_not, 0
        self.optimizer, self.device = optimizer, device
        self.x, self.y = torch.zeros(2, *batch_shape, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.recorder = Recorder(device, "the training step", "--cuda_graph=off trains without graphs") if device.type == "cuda" else None
        self._begin()

    def _begin(self):
        # Fused AdamW reads the learning rate as fp32 on a GPU and as fp64 on a CPU, where fp32 would round it.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self.learning_rates = [torch.zeros((), dtype=dtype, device=self.device) for _ in self.optimizer.param_groups]
        self.steps = 0                      # completed since
        self.replays = {}                   # {name of a part: the function that replays it}
        self._captured_with = None          # `_fixed` then
        if self.recorder is not None:
            self.recorder.pool = None       # the old graphs' memory goes with them

    def _fixed(self):
        optimizer, tensors = [], []
        for group in self.optimizer.param_groups:
            optimizer.append({key: value for key, value in group.items() if key not in ("params", "lr", "capturable")})
            for p in group["params"]:
                tensors += [p.data_ptr(), *(value.data_ptr() for value in self.optimizer.state.get(p, {}).values() if torch.is_tensor(value))]
        return self._of_model(), optimizer, tensors

    def micro_step(self, x, y, first):
        """Forward and backward on x and y (B, T) int64."""
        if first and self.replays and self._captured_with != self._fixed():
            why_not = self._why_not() or (f"they have changed {self.captures} times" if self.captures >= MOST_CAPTURES else None)
            backend.notice("the model or the optimizer has changed since the training step was captured in CUDA graphs: "
                           + ("it is captured again" if why_not is None else f"from here on it runs without graphs: {why_not}"))
            self._begin()
            if why_not is not None:
                self.recorder = None
        elif first and len(self.learning_rates) != len(self.optimizer.param_groups):
            self._begin()
        self.x.copy_(x)
        self.y.copy_(y)
        self._run(self._first if first else self._more)

    def update(self):
        """The optimizer's step, with the current learning rates of its groups."""
        for rate, group in zip(self.learning_rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.steps == WARM_UP_STEPS:
            self._prepare()
        self._run(self._update)
        self.steps += 1
        if not self.replays:                # after capture, gradients live in the graphs' memory
            self.optimizer.zero_grad(set_to_none=True)

    def _first(self):
        self.optimizer.zero_grad(set_to_none=True)      # a gradient that is None is written, not accumulated
        self.loss.copy_(self._forward_backward(self.x, self.y))

    def _more(self):
        self.loss.add_(self._forward_backward(self.x, self.y))

    def _update(self):
        with _learning_rates_on_device(self.optimizer, self.learning_rates):
            self._optimizer_step()

    def _run(self, part):
        name = part.__name__
        if self.recorder is None:
            return part()
        if self.steps < WARM_UP_STEPS:
            return self.recorder.run(part)
        if name not in self.replays:
            if self._captured_with is None:
                self._captured_with, self.captures = self._fixed(), self.captures + 1
            self.replays[name] = self.recorder.record(part)
        self.replays[name]()


@contextlib.contextmanager
def _learning_rates_on_device(optimizer, rates):
    """Inside, each group's learning rate is a tensor, which a graph reads at every replay; a number would be baked into it."""
    capturing = rates[0].is_cuda and torch.cuda.is_current_stream_capturing()   # outside of a capture, `capturable` would warn
    before = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, capturable=capturing)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)
