"""A training script as nanoGPT's: globals, --key=value, `from model import`, DDP under torchrun."""
import os
import sys

import torch
import torch.nn as nn

from model import GPTConfig, GPT

batch_size, block_size, max_iters, status, backend = 2, 16, 3, 0, "gloo"
for word in sys.argv[1:]:
    key, value = word.removeprefix("--").split("=")
    globals()[key] = value if isinstance(globals()[key], str) else type(globals()[key])(int(value))

rank = int(os.environ.get("RANK", -1))
if rank >= 0:
    torch.distributed.init_process_group(backend)
torch.manual_seed(1337)
model = GPT(GPTConfig(block_size=block_size, vocab_size=17, n_layer=2, n_head=2, n_embd=32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # ours makes a fused AdamW, which rounds in another order
ddp = nn.parallel.DistributedDataParallel(model) if rank >= 0 else model
torch.manual_seed(max(rank, 0))
for it in range(max_iters):
    x = torch.randint(17, (batch_size, block_size + 1))
    loss = ddp(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"rank {rank} iter {it}: loss {loss.item():.9f} {type(model).__module__}")
if rank >= 0:
    # First what holds the group: freed later, at the exit, DDP waits with the GIL for a thread of gloo's that waits for the GIL (PyTorch 2.13).
    del ddp, loss
    torch.distributed.destroy_process_group()
if status == 99:
    raise OSError("the disk is full")
sys.exit(status)
