"""--optimizer=muon: torch.optim.Muon for the matrices of the blocks, AdamW for the embeddings, the head and the vectors, as one optimizer.

AdamW divides each number of a gradient by its own running size. Muon takes a matrix as a whole: five Newton-Schulz iterations in bfloat16
bring all singular values of its mean gradient near 1, so that rare directions are learnt as fast as common ones. K. Jordan et al., "Muon:
An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/.

The defaults of muon_lr (0.025) and muon_weight_decay (0.05) are those published for a GPT of GPT-2 124M's size: modded-nanogpt,
records/track_3_optimization, result 36, 3,250 steps to a validation loss of 3.28. They belong to the scale sqrt(max(1, rows / columns)) of
that code, torch's adjust_lr_fn="original", under which a learning rate keeps its meaning as a model gets wider. Momentum 0.95 with
Nesterov's step is torch's default and theirs; their Newton-Schulz takes 12 iterations and ends nearer 1. Their rates of AdamW belong to a
model with an untied head and RMSNorm, so AdamW keeps nanoGPT's.

Both follow one schedule: Muon's learning rate is always the same multiple of AdamW's. With DDP every rank orthogonalises the same mean
gradients. The step cannot be captured in CUDA graphs, because torch's Muon reads the learning rate on the host, and on a CPU PyTorch ends
it in several passes over memory (cpu.py). nanoGPT samples from the ckpt.pt of such a run, but cannot resume it: its AdamW has other groups.
"""
import torch

from .. import devices


def muon_and_adamw(model, o, device_type):
    """The optimizer of this GPT by the TrainOptions `o`. What is left to AdamW is in the groups of `configure_optimizers`."""
    adamw = model.configure_optimizers(o.weight_decay, o.learning_rate, (o.beta1, o.beta2), device_type)
    blocks = model.transformer.h
    packed = [block.attn.c_attn.weight for block in blocks]
    single = [linear.weight for block in blocks for linear in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    taken = {*packed, *single}
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if p not in taken]
    share = o.muon_lr / o.learning_rate
    muon = Muon([dict(params=packed, parts=3, lr_share=share), dict(params=single, parts=1, lr_share=share)],
                lr=o.muon_lr, weight_decay=o.muon_weight_decay, adjust_lr_fn="original")
    print(f"of these Muon takes {len(taken)} matrices of the blocks, with {sum(p.numel() for p in taken):,} parameters")
    # 384 x 384 on one core of a Xeon with AMX: 2.3 ms; oneDNN held to AVX-512 without bf16: 280 ms; to AVX2: 3.3 s.
    if device_type == "cpu" and devices.fast_bfloat16() is None:
        print("WARNING: torch's Muon computes in bfloat16, and this CPU has no fast bf16 matmul: a step may take a hundred times AdamW's")
    return MuonAndAdamW(adamw, muon)


class Muon(torch.optim.Muon):
    """torch's Muon, which steps each parameter of a group as `parts` matrices, one below the other.

    c_attn (3C, C) holds three maps, q's, k's and v's. Orthogonalised as one, its columns would be, across the three, and the largest
    gradient of them would decide how far the others move. modded-nanogpt steps the three apart, too. (At 1,000 steps of --preset=laptop,
    one seed, it hardly matters: a validation loss of 1.731, and 1.740 as one.) The momentum is kept whole, so a checkpoint has one tensor
    for each parameter.
    """

    def _init_group(self, group, params, grads, buffers):
        whole = [], [], []
        has_complex = super()._init_group(group, *whole)
        for tensors, found in zip((params, grads, buffers), whole):
            tensors += [part for tensor in found for part in tensor.chunk(group["parts"])]
        return has_complex


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers with one state_dict: AdamW's groups, then Muon's, which have a "momentum" and, as `lr_share`, their multiple of
    AdamW's learning rate."""

    def __init__(self, adamw, muon):
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self.adamw, self.muon = adamw, muon
        self._divide()

    def _divide(self):
        """Give each of the two its groups; the state of all parameters is one dict."""
        for optimizer, mine in ((self.adamw, False), (self.muon, True)):
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if ("momentum" in group) == mine]

    def step(self):
        self.adamw.step()
        self.muon.step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._divide()
