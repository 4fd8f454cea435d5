"""The losses of training steps: read late, so that the host does not stall the device, and an error with advice if one is not finite."""
import collections
import math
from pathlib import Path

import torch

from .. import devices


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the message gives the step, the batch and what to try."""


def advice(o, step, loss, dtype, batch):
    """The text of NonFiniteLoss."""
    tries = [f"a lower --learning_rate (it is {o.learning_rate:g})", f"a longer --warmup_iters ({o.warmup_iters})"]
    tries += ["--grad_clip=1.0"] if o.grad_clip == 0 else []
    tries += {torch.float16: ["--dtype=bfloat16 or float32"], torch.bfloat16: ["--dtype=float32"]}.get(dtype, [])
    tries += ["--backend=reference, to see whether a kernel is at fault"]
    return (f"step {step}: the loss is {loss}. Its batch: {batch}. No checkpoint was written after it, so "
            f"{Path(o.out_dir, 'last.pt')}, if it exists, is from an earlier step. Try " + ", ".join(tries) + ".")


class Losses:
    """A queue of step losses. The host reads a step's loss only after queueing the next step, so that the GPU never waits for the host.

    late: how many later steps are queued before a loss is read: 1 on a GPU; 0 on a CPU, where it would gain nothing.
    """

    def __init__(self, o, ranks, batches, dtype, device):
        self.o, self.ranks, self.batches, self.dtype = o, ranks, batches, dtype
        self.late = 1 if device.type == "cuda" else 0
        self.unread = collections.deque()

    def put(self, step, lr, windows, loss, stop):
        """Queue a step: its loss, 0-d; windows, where in the text its batches start; stop, whether this rank received a signal."""
        # One all-reduce tells all ranks the mean loss and whether any rank is to stop.
        report = self.ranks.mean(torch.stack((loss, torch.full_like(loss, stop))))
        self.unread.append((step, lr, windows, devices.start_reading(report)))

    def read(self, report, late=0):
        """Call report(step, loss, lr) for all steps but the last `late`; returns whether a rank is to stop. Raises NonFiniteLoss."""
        stopping = False
        while len(self.unread) > late:
            step, lr, windows, read = self.unread.popleft()
            loss, stop = read()
            if not math.isfinite(loss):
                batch = (f"seed {self.o.seed + self.ranks.rank}, the windows of {self.batches.path} that start at tokens "
                         + ", ".join(map(str, torch.cat(windows).tolist())))
                raise NonFiniteLoss(advice(self.o, step, loss, self.dtype, batch))
            report(step, loss, lr)
            stopping |= stop > 0
        return stopping
