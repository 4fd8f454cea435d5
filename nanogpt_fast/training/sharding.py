"""--shard: a model whose weights, gradients and moments are divided among the ranks, by PyTorch's FSDP2 (`fully_shard`).

DDP keeps all of them on every rank; here a rank keeps its part, and gathers a block's weights only while it computes that block. It
takes the steps of DDP: in float32 on the reference path, bit for bit as long as no gradient is clipped. Our kernels see ordinary tensors,
because FSDP2 puts the gathered weights in the place of its DTensors before a module's forward. What reads weights between modules steps
aside: the residual adds that are fused across modules, the half-precision copies (FSDP2 gathers in half precision instead), CUDA graphs,
the KV cache of the samples, and on a CPU the extension's AdamW. Checkpoints: ../checkpoints/sharded.py.
"""
import os
import socket
import warnings

import torch
import torch.nn as nn

from ..checkpoints import folder as run_folder

NO_GRAPHS = "with --shard the host decides when FSDP2 gathers which weights"
NO_COPIES = "FSDP2 casts the weights before it gathers them"


def refuse(o, device, dtype):
    """Raise ValueError for options that cannot work with --shard."""
    if device.type == "mps":
        raise ValueError("--shard divides the weights among CPUs or CUDA GPUs, and the device is mps. Train without --shard")
    if dtype == torch.float16:
        chosen = " (auto's choice for this GPU)" * (o.dtype == "auto")
        raise ValueError(f"--shard with dtype float16{chosen}: the ranks would have to agree on the scale of the loss at every step, which "
                         "they do not. Use --dtype=bfloat16 or --dtype=float32")
    if o.optimizer == "muon":
        raise ValueError("--shard with --optimizer=muon: Muon orthogonalises whole matrices, and with --shard a rank has rows of each. Train "
                         "without --shard, or with --optimizer=adamw")
    if o.cuda_graph == "on":
        raise ValueError(f"cuda_graph is 'on', but {NO_GRAPHS}. cuda_graph=auto trains without graphs")


def shard(model, device, dtype, ranks):
    """Move a GPT to the device and divide its parameters among the ranks, in place. All get the first rank's, as with DDP.

    Attention and MLP of a block are gathered together, in `dtype`, and freed after use; embeddings, LayerNorms and an untied head stay
    gathered, in float32, through forward and backward. So the casts are autocast's, and gradients are reduced in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # Views matter where something is added to them in place, which Block.forward does not. That blocks are unfused stands in the banner.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    warnings.filterwarnings("ignore", "nanogpt_fast: a block runs unfused: FSDP", RuntimeWarning)
    mesh = init_device_mesh(device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)     # autocast does
    for block in model.transformer.h:   # one block at a time is whole on the device
        parts = [block.attn, block.mlp]
        _send(nn.ModuleList(parts), device)
        fully_shard(parts, mesh=mesh, mp_policy=policy)
    _send(model, device)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def _send(module, device):
    module.to(device)
    for p in module.parameters():
        if type(p) is nn.Parameter:     # else it is divided already
            torch.distributed.broadcast(p, 0)


def refuse_separate_folders(out_dir, ranks):
    """Raise RuntimeError unless all ranks see one and the same out_dir: each writes its shards there. Called while the first one has it."""
    noted = ranks.gather(run_folder.owner(out_dir) if ranks.is_master else None)[0]
    seen = ranks.gather((socket.gethostname(), run_folder.owner(out_dir) == noted))
    without = sorted({host for host, same in seen if not same})
    if without:
        raise RuntimeError(f"out_dir is {os.path.abspath(out_dir)}, and on {', '.join(without)} that is not the folder that the first rank "
                           f"({seen[0][0]}) has. With --shard every rank writes its part of a checkpoint there: name a folder on a file "
                           "system that all machines share")
