"""What `nanogpt-fast train` can be told: nanoGPT's names and defaults, and a few more."""
from dataclasses import dataclass

from .. import backend as ops_backend, devices
from ..options import option


@dataclass
class TrainOptions:
    """Train a GPT on text. nanoGPT's config files, names and defaults work unchanged.

    Ctrl-C saves and leaves; the same command with --init_from=resume goes on exactly there. Several GPUs:
    torchrun --standalone --nproc_per_node=8 -m nanogpt_fast train config.py
    """

    out_dir: str = option("out", "folder for ckpt.pt, last.pt, metrics.jsonl, loss.png", section="Files and evaluation")
    eval_interval: int = option(2000, "steps between evaluations; each prints, saves and draws", minimum=1)
    log_interval: int = option(1, "steps between rows of metrics.jsonl and, not on a terminal, printed lines", minimum=1)
    eval_iters: int = option(200, "batches of each split that an evaluation averages", minimum=1)
    eval_only: bool = option(False, "evaluate once and leave")
    always_save_checkpoint: bool = option(True, "write ckpt.pt at every evaluation, not only at the best validation loss")
    init_from: str = option("scratch", "scratch | resume (from out_dir) | gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder "
                            "of such weights")
    sample_tokens: int = option(100, "tokens of text that an evaluation prints; 0 for none", minimum=0)
    wandb_log: bool = option(False, "log to Weights & Biases (pip install wandb)")
    wandb_project: str = option("owt", "its project")
    wandb_run_name: str = option("gpt2", "its name for the run")
    tensorboard: bool = option(False, "log to TensorBoard, in out_dir/tensorboard (pip install tensorboard)")

    dataset: str = option("openwebtext", "folder below data_dir, `embedded`, `shakespeare_char`, `shakespeare`, or a text file "
                          "or folder", alias="data", section="Data")
    data_dir: str = option("data", "where data sets live")
    gradient_accumulation_steps: int = option(40, "micro-batches of a step, shared among the ranks", minimum=1)
    batch_size: int = option(12, "sequences of a micro-batch", minimum=1)
    block_size: int = option(1024, "context: tokens of a sequence", minimum=1)

    n_layer: int = option(12, "blocks", minimum=1, section="Model")
    n_head: int = option(12, "attention heads; they divide n_embd", minimum=1)
    n_embd: int = option(768, "width of the residual stream", minimum=1)
    dropout: float = option(0.0, "probability of dropping; 0 for pretraining, 0.1 and more to fine-tune", minimum=0, below=1)
    bias: bool = option(False, "biases in LayerNorms and Linears")
    activation: str = option("gelu", "of the MLP: the erf form, or the tanh form that OpenAI's GPT-2 was trained with",
                             choices=("gelu", "gelu_tanh"))

    learning_rate: float = option(6e-4, "the highest", minimum=0, section="AdamW")
    max_iters: int = option(600_000, "steps", minimum=0)
    weight_decay: float = option(1e-1, "of matrices and embeddings; biases and LayerNorms have none", minimum=0)
    beta1: float = option(0.9, "decay of the mean of the gradient", minimum=0, below=1)
    beta2: float = option(0.95, "decay of the mean of its square", minimum=0, below=1)
    grad_clip: float = option(1.0, "the gradient's norm is clipped to this; 0 for no clipping", minimum=0)

    decay_lr: bool = option(True, "warm-up and cosine decay; False for a constant learning rate", section="Learning rate")
    warmup_iters: int = option(2000, "steps of linear warm-up", minimum=0)
    lr_decay_iters: int = option(600_000, "step at which min_lr is reached; about max_iters", minimum=0)
    min_lr: float = option(6e-5, "the lowest; about learning_rate / 10", minimum=0)

    backend: str = option("auto", "either the implementation of the ops (auto, fused, reference, or one by one as in "
                          "auto,attention=reference), or what connects the ranks of torchrun (nccl, gloo; nanoGPT's meaning), "
                          "or both: gloo,reference", section="Machine")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "of the forward pass (auto on GPUs: bfloat16, float16 on old ones; on CPUs with AMX or AVX-512 "
                        "bf16: bfloat16 from 128 channels on; else float32)",
                        choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool | str = option("auto", "torch.compile the model (auto: on CUDA, but where a step of our kernels is captured, see "
                                 "cuda_graph)",
                                 choices=("auto", True, False))
    cuda_graph: str = option("auto", "replay the step as CUDA graphs, which small models need (auto: where it can be; on: or "
                             "say why not and leave)", choices=("auto", "on", "off"))
    malloc: str = option("auto", "on a CPU keep freed memory in the process (glibc): a step need not map it anew (auto, off)",
                         choices=("auto", "off"))
    recompute: bool | str = option("auto", "the fused MLP computes its GELU again in the backward and a block keeps a fifth less for "
                                   "it, which it writes again (auto: where memory is short)", choices=("auto", True, False))
    seed: int = option(1337, "of weights, batches and dropout; rank r takes seed + r", minimum=0)

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, not divisible by n_head, {self.n_head}; every head gets n_embd / n_head"
                             " channels")
        split_backend(self.backend)


def split_backend(spec):
    """"gloo", "reference", "gloo,attention=reference" -> (torch.distributed's backend or None, the ops' choice or None)."""
    parts = [part.strip() for part in spec.split(",")]
    groups = [part for part in parts if part in devices.GROUPS]
    ops = ",".join(part for part in parts if part not in devices.GROUPS and part != "auto")
    if len(groups) > 1:
        raise ValueError(f"backend is {spec!r}; one of {', '.join(devices.GROUPS)} connects the ranks, not {len(groups)}")
    try:
        ops_backend.parse(ops or None)
    except ValueError as error:
        raise ValueError(f"{error}. Or what connects the ranks of torchrun: {', '.join(devices.GROUPS)}") from None
    return (groups[0] if groups else None), (ops or None)
