"""`nanogpt-fast bench`: training and generation end to end, against nanoGPT.

    nanogpt-fast bench train       tokens/s, MFU (share of the GPU's peak), peak memory, first step       train.py
    nanogpt-fast bench generate    prefill, tokens/s at several batch sizes, latency, share of the        generate.py
                                   memory bandwidth limit
    nanogpt-fast bench loss        loss against wall-clock time, on the same text                         loss.py
    nanogpt-fast bench op          each op against its peers, or a function of yours beside them          op.py

Variants take turns (`measure.interleaved`), so a slow minute of the machine falls on all of them; only ratios within one run mean
anything. "nanoGPT" is the model.py of the checkout that `--upstream DIR` names. Without one it is `GPT(config, backend="reference")`,
which makes exactly the PyTorch calls of nanoGPT's model (tests/contract asserts equality bit for bit), with nanoGPT's
optimizer and training step, and with its sampling loop for generation.
"""
import sys

import torch

from .. import devices, options
from . import generate, loss, measure, op, train

COMMANDS = {"train": (train.BenchTrainOptions, train.run), "generate": (generate.BenchGenerateOptions, generate.run),
            "loss": (loss.BenchLossOptions, loss.run), "op": (op.BenchOpOptions, op.run)}


def main(argv):
    """The command `nanogpt-fast bench`."""
    if not argv or argv[0] not in COMMANDS:
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"no benchmark {argv[0]!r}; there are {', '.join(COMMANDS)}")
        print(__doc__.strip())
        return
    cls, function = COMMANDS[argv[0]]
    o = options.parse(cls, argv[1:], f"nanogpt-fast bench {argv[0]}")
    device = devices.make_current(devices.choose_device(o.device))
    if argv[0] != "op" and not o.model:
        o.model = "cpu" if device.type != "cuda" else "gpt2" if argv[0] == "train" else "baby"
    if device.type == "cuda":  # as in nanoGPT's train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    dtype = devices.choose_dtype("bfloat16" if o.dtype == "auto" and device.type == "cuda" else o.dtype, device)
    try:
        with measure.sigterm_raises():
            return function(o, device, dtype)
    except measure.Interrupted:
        print("interrupted; what was measured so far is recorded", file=sys.stderr)
        return 128 + 15  # a shell's exit status for SIGTERM
