"""The training step: forward and backward of its micro-batches, clipping, AdamW, and refreshing the weights' copies.

`nanogpt-fast train` runs it, and `nanogpt-fast bench train` times it. On a GPU it is replayed as CUDA graphs if possible (captured.py).
Clipping, AdamW and the copies are one pass over memory: a kernel's (ops/adamw.py), or on a CPU the extension's (cpu.py).
"""
import weakref

import torch
from torch.profiler import record_function

from .. import devices
from ..ops import adamw
from ..touched import program
from . import captured, cpu, embedding, sharding
from .half_weights import HalfWeights


class TrainingStep:
    """`loss = step(next_batch)`: one step of a GPT and its optimizer.

    network: the callable: the model itself, compiled, or wrapped in DDP. dtype: of the forward pass, by autocast. batch_shape: (B, T) of
    a micro-batch. accumulation: micro-batches per step. grad_clip: the largest norm of the gradient; 0: no limit. ranks: number of
    processes that train together; sharded: whether they divide the model (sharding.py). not_captured: the reason not to capture the step
    in CUDA graphs (`captured.why_not`); None: capture it.

    weights: the copies of the weights that the forward uses (HalfWeights). scaler: float16's.
    """

    def __init__(self, model, optimizer, network=None, *, dtype, batch_shape, not_captured, compiled=False, accumulation=1, grad_clip=1.0,
                 ranks=1, sharded=False):
        self.model, self.optimizer, self.network = model, optimizer, model if network is None else network
        self.accumulation, self.grad_clip, self.ranks, self.sharded = accumulation, grad_clip, ranks, sharded
        self.device = next(model.parameters()).device
        self.context = devices.autocast(self.device, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self._not_by_row = ("torch.compile fuses them itself" if compiled else "FSDP divides their gradients" if sharded
                            else "DDP sends a gradient as soon as autograd has it" if ranks > 1 else None)
        # DDP splits a compiled graph into buckets by parameter, so that some gradients are sent while others are computed. The copies are
        # not parameters: with them all gradients would be sent at the end.
        leave = sharding.NO_COPIES if sharded else "DDP splits a compiled graph by its parameters" if compiled and ranks > 1 else None
        self.weights = HalfWeights(model, dtype, leave, compiled=compiled, in_place=self._not_by_row is None)
        self._on_cpu = self.device.type == "cpu"
        self.one_pass = adamw.OnePass(model, optimizer, dict(zip(self.weights.weights, self.weights.copies)))
        step = weakref.proxy(self)      # the graphs' memory goes with the step at once; in a cycle it would wait for Python's collector
        self.graphs = None if not_captured is not None else captured.CapturedStep(
            lambda x, y: step.forward_backward(x, y), lambda: step.update(), optimizer, batch_shape, self.device, lambda: step.prepare(),
            lambda: step._read_on_the_host(), lambda: captured.why_not_asynchronous(step.model))

    def __call__(self, next_batch, meanwhile=lambda: None):
        """Train on `accumulation` micro-batches; returns their mean loss, 0-d on the device, which the next step may overwrite.

        next_batch(): (x, y), each (B, T) int64 on the device. meanwhile(): called once per micro-batch, for host work while the device
        computes, usually drawing the next batch.
        """
        if self.graphs is not None:
            self.weights.follow()       # a replay does not
            with record_function("forward and backward"):
                for micro_step in range(self.accumulation):
                    self.graphs.micro_step(*next_batch(), first=micro_step == 0)
                    meanwhile()
            with record_function("update"):
                self.graphs.update()
                self._count_writes()
            return self.graphs.loss
        loss = None
        with record_function("forward and backward"):
            for micro_step in range(self.accumulation):
                last = micro_step == self.accumulation - 1  # gradients are averaged over the ranks once, with the last micro-batch
                if self.sharded:
                    self.model.set_requires_gradient_sync(last)
                elif self.ranks > 1:
                    self.network.require_backward_grad_sync = last
                share = self.forward_backward(*next_batch(), meanwhile)
                loss = share if loss is None else loss + share
        with record_function("update"):
            self.update()
            self._count_writes()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def forward_backward(self, x, y, meanwhile=lambda: None):
        """Add the gradients of one micro-batch; returns its share of the step's loss. `meanwhile` runs between the passes."""
        # By row only inside the step: between steps, `generate` and the user's code find the embedding untouched.
        with embedding.gradient_by_row(self.model, wanted=self._not_by_row is None), self.weights.in_use():
            with self.context:
                _, loss = self.network(x, y, return_logits=False)
                loss = loss / self.accumulation if self.accumulation > 1 else loss
            meanwhile()
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _count_writes(self):
        """Let PyTorch know that the step wrote the weights and their copies, which neither a replay nor its fused AdamW tells it: a backward
        that saved a weight raises, and a stream that generates from the model follows."""
        torch.autograd.graph.increment_version([p for group in self.optimizer.param_groups for p in group["params"]] + self.weights.copies)
        self.weights.were_cast()

    def _read_on_the_host(self):
        """What decides which operations a step is: numbers, and of each parameter and module, in order, and of their classes."""
        return (self.accumulation, self.grad_clip, program(),
                [(p.data_ptr(), p.requires_grad, bool(p._backward_hooks)) for p in self.model.parameters()],
                [(type(module), module.training, vars(module).get("p"), vars(module).get("dropout"), bool(
                    module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks))
                 for module in self.model.modules()])

    def why_not_by_row(self):
        """None if the embeddings are one operation, and the token embedding's gradient only its rows (embedding.py), else the reason."""
        return self._not_by_row or embedding.why_not_by_row(self.model)

    def why_not_in_one_pass(self):
        """None if a kernel or the extension ends the step in one pass over memory, else the reason."""
        if self.sharded:
            return "the norm of a divided model is a sum over the ranks"
        if self.scaler.is_enabled():
            return "float16's GradScaler looks for infinities first"
        if self._on_cpu:
            return cpu.why_not_in_one_pass(self.optimizer, self.weights, self.grad_clip)
        return (adamw.why_not_clipped(self.model, self.optimizer) if self.grad_clip != 0.0 else None) or self.one_pass.why_not()

    def prepare(self):
        """What has to be done before `update` is captured."""
        if not self._on_cpu and self.why_not_in_one_pass() is None:
            self.one_pass.prepare()

    def update(self):
        """Clip the gradients, step the optimizer, and refresh the weights' copies."""
        if self.sharded:    # the norm is a sum over all ranks' parts, which PyTorch's own calls know
            if self.grad_clip != 0.0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
            self.optimizer.step()
            return
        if self._on_cpu and not self.scaler.is_enabled():
            cpu.update(self.optimizer, self.weights, self.grad_clip)
            return
        if self.why_not_in_one_pass() is None:
            factor = None
            if self.grad_clip != 0.0:
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                factor = (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)       # clip_grad_norm_'s
            self.one_pass.step(factor)
            self.weights.refresh(left_out=True)
            return
        if self.grad_clip != 0.0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.weights.refresh()
