"""A training step as CUDA graphs: the host launches two graphs a step instead of a thousand kernels.

A small model is launch-bound: its kernels end sooner than Python can start the next. All shapes of a step are static, so its
three parts are recorded once and replayed from then on:

    first     forward and backward of the first micro-batch; gradients are written
    more      the same of every further one; gradients are added to     (gradient accumulation of A replays it A - 1 times)
    update    clipping, AdamW, the half-precision copies of the weights

So a step without accumulation clears and adds nothing, and one of 40 micro-batches needs no graph of 40 times the size. The
parts are ordinary functions: a device without graphs, a CPU under test, calls them instead of replaying them.

Nothing has to be put back after warming up, because the warm-up is training: the first WARM_UP_STEPS steps run the parts as
they are, on the stream that captures later, and recording executes nothing. What compiles, allocates or initialises lazily
(Triton, Inductor, cuBLAS, AdamW's moments) has done so by then. Dropout goes on where it would have: a graph draws from torch's
generator, whose offset every replay moves as far as the kernels would have moved it.

What a replay reads and writes lies in memory that stays: parameters, moments, copies, and here the batch, the loss and the
learning rate. Between two replays evaluation, sampling and checkpoints see the parameters as they are. The optimizer looks
like any other then: its learning rate is a tensor, and `capturable` set, only while `update` runs.
"""
import contextlib

import torch
import torch.nn as nn

from ..model import GPT, MLP, Block, CausalSelfAttention, LayerNorm
from ..ops.graphs import Recorder
from ..touched import touched

# Everything lazy has happened after one; three are what PyTorch's notes on CUDA graphs advise.
WARM_UP_STEPS = 3

# Modules whose forward passes never wait for the GPU.
ASYNCHRONOUS = (GPT, Block, CausalSelfAttention, MLP, LayerNorm, nn.Linear, nn.Embedding, nn.Dropout, nn.GELU, nn.ModuleDict,
                nn.ModuleList)


def why_not(model, optimizer, device, *, ranks=1, scaled=False):
    """None where the training step of this model and optimizer can be captured, else the reason as text.

    ranks: processes that train together; scaled: a GradScaler is in use.
    """
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this one is {device.type}"
    if ranks > 1:
        return f"{ranks} ranks train together: when DDP sends gradients, and which, is decided on the host"
    if scaled:
        return "float16's GradScaler keeps part of its state on the host"
    if not all("capturable" in group for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no `capturable`: its step reads the learning rate on the host"
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection looks at every gradient on the host"
    for name, module in model.named_modules():
        cls = next((cls for cls in ASYNCHRONOUS if type(module) is cls), None)
        reason = f"{type(module).__name__} is not one of nanoGPT's modules" if cls is None else touched(module, cls)
        if reason is not None:
            return f"{name or 'the model'} may wait for the GPU: {reason}"
    return None


class CapturedStep:
    """A step in parts: `micro_step(x, y, first=True)`, `micro_step(x, y, first=False)` for every further one, `update()`.

    forward_backward(x, y): runs both passes and returns the micro-batch's detached loss, 0-d, without waiting for the GPU.
    update(): clips, steps the optimizer and whatever else an optimizer step ends with; it must not clear gradients.
    batch_shape: (B, T) of every x and y, int64.

    `loss` is the sum of what forward_backward returned since the first micro-step, 0-d on the device; the next step overwrites
    it. A learning rate set in optimizer.param_groups is obeyed at the next `update()`.
    """

    def __init__(self, forward_backward, update, optimizer, batch_shape, device):
        self._forward_backward, self._optimizer_step = forward_backward, update
        self.optimizer, self.device = optimizer, device
        self.x, self.y = torch.zeros(2, *batch_shape, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        # Fused AdamW reads a float on a GPU and a double on a CPU, where a float would round the learning rate.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.learning_rates = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]
        self.steps = 0                      # taken
        self.replays = {}                   # {name of a part: what replays it}
        self.recorder = Recorder(device, "the training step", "--cuda_graph=off trains without") if device.type == "cuda" else None

    def micro_step(self, x, y, first):
        """Forward and backward of x and y (B, T) int64."""
        self.x.copy_(x)
        self.y.copy_(y)
        self._run(self._first if first else self._more)

    def update(self):
        """The optimizer's step, with the learning rates that its groups have now."""
        for rate, group in zip(self.learning_rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._run(self._update)
        self.steps += 1
        if not self.replays:                # once captured, gradients lie in the graphs' memory and stay there
            self.optimizer.zero_grad(set_to_none=True)

    def _first(self):
        self.optimizer.zero_grad(set_to_none=True)      # gradients that are not there are written, not added to
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
            self.replays[name] = self.recorder.record(part)
        self.replays[name]()


@contextlib.contextmanager
def _learning_rates_on_device(optimizer, rates):
    """Inside, each group's learning rate is a tensor, which a graph reads anew at every replay, not a number baked into it."""
    capturing = rates[0].is_cuda and torch.cuda.is_current_stream_capturing()   # outside of a capture `capturable` warns
    before = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, capturable=capturing)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)
