"""One training step of GPT-2 or the baby GPT, as `bench train` runs it, on fake tensors: `count` lists its operations.

`fake_cuda.start` must have run before this is imported.
"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_fast.bench import train
from nanogpt_fast.bench.common import shape_of
from nanogpt_fast.training import captured

from . import compiled as inductor
from .trace import Trace, overridden

VARIANTS = {"trainer": "our trainer", "import": "one import", "nanogpt": "nanoGPT"}     # names in bench.train


def count(model="gpt2", batch_size=64, dropout=None, who="trainer", compiled=False, upstream="", accumulation=1):
    """[Operation] of one training step after the first, in bfloat16.

    model: a name of `bench train`. dropout: None is the model's own. who: "trainer", "import" or "nanogpt". upstream: a nanoGPT checkout;
    without it nanoGPT is GPT(backend="reference"). accumulation: micro-batches per step, of our trainer.
    """
    device = torch.device("cuda")
    config, _ = shape_of(model, device, **({} if dropout is None else dict(dropout=dropout)))
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    trace = Trace(config["n_embd"] // config["n_head"])
    # Modules are made on "cuda", since `Module.to` cannot move fake parameters; and CUDA graphs need a GPU.
    not_moved = overridden(torch.nn.Module, to=lambda module, *_, **__: module)
    with trace.stubs(), not_moved, overridden(captured, why_not=lambda *_, **__: "operations are counted"):
        with fake_mode, torch.device("cuda"):
            trainer = train.Trainer(train.BenchTrainOptions(model=model, upstream=upstream), train.TRAIN_VARIANTS[VARIANTS[who]], config,
                                    batch_size, device, torch.bfloat16)
            if accumulation > 1:
                ours, forward_backward = trainer.ours, trainer.ours.forward_backward

                def micro_batch(*args):
                    trace.phase = "forward"
                    return forward_backward(*args)
                ours.accumulation, ours.forward_backward = accumulation, micro_batch
            x = torch.zeros(batch_size, config["block_size"], dtype=torch.int64)
            trainer.step(x, x)
            with trace:
                trainer.step(x, x)
        if not compiled:
            return trace.operations
        network = torch.compile(trainer.model)

        def call():
            with fake_mode, trainer.context:
                return network(x, x, return_logits=False) if who == "trainer" else network(x, x)
        weights = trainer.ours.weights.in_use() if who == "trainer" else None
        rest = [each for each in trace.operations if each.phase == "update"]
        if who == "import":         # its loss runs after the graph (nanogpt_fast/apart.py)
            before = len(trace.operations)
            with fake_mode, trainer.context:
                hidden = trainer.model._hidden(x).detach().requires_grad_()
                with trace:
                    trainer.model._logits_and_loss(hidden, x)[1].backward()
            rest += trace.operations[before:]
        return inductor.operations(call, weights, fake_mode, trace) + rest
