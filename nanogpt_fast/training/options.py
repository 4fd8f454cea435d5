"""The options of `nanogpt-fast train`: nanoGPT's names and defaults, and a few more."""
from dataclasses import dataclass

from .. import backend as ops_backend, devices
from ..options import option
from ..text import prepare
from . import profiling


@dataclass
class TrainOptions:
    """Train a GPT on text. nanoGPT's config files, names and defaults work unchanged.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal save and exit; --out_dir=FOLDER --init_from=resume continues exactly there, with the
    settings of that run where no others are given.
    Several GPUs: torchrun --standalone --nproc_per_node=8 -m nanogpt_fast train config.py; --shard if the model is too large for one
    (docs/machines.md).
    """

    out_dir: str = option("out", "folder for ckpt.pt, last.pt, metrics.jsonl, loss.png, run.json; one run at a time",
                          section="Files and evaluation")
    eval_interval: int = option(2000, "steps between evaluations; each prints, saves and draws", minimum=1)
    log_interval: int = option(1, "steps between rows of metrics.jsonl and, not on a terminal, printed lines", minimum=1)
    eval_iters: int = option(200, "batches of each split that an evaluation averages", minimum=1)
    eval_only: bool = option(False, "evaluate once and exit")
    always_save_checkpoint: bool = option(True, "write ckpt.pt at every evaluation, not only at the best validation loss")
    init_from: str = option("scratch", "scratch | resume (from out_dir) | gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder "
                            "of GPT-2 weights")
    sample_tokens: int = option(100, "tokens of text that an evaluation prints; 0 for none", minimum=0)
    wandb_log: bool = option(False, "log to Weights & Biases (pip install wandb)")
    wandb_project: str = option("owt", "its project")
    wandb_run_name: str = option("gpt2", "its name for the run")
    verbose: bool = option(True, "before the first step, print which implementation each op takes, and why")
    tensorboard: bool = option(False, "log to TensorBoard, in out_dir/tensorboard (pip install tensorboard)")
    profile: int = option(0, "after a warm-up profile so many steps: prints where their time goes, by op and by GPU kernel, and writes "
                          "out_dir/trace.json.gz for chrome://tracing; 0: off", minimum=0)

    dataset: str = option("openwebtext", "folder below data_dir, `embedded`, `shakespeare_char`, `shakespeare`, or a text: a file, "
                          "a folder, several with commas, a pattern", alias="data", section="Data")
    data_dir: str = option("data", "folder of the data sets")
    tokenizer: str = option("", "of a text: char, word, gpt2, or bpe, which learns byte pairs from it (empty: as it was prepared before, "
                            "else char)", choices=prepare.KINDS)
    vocab_size: int | None = option(None, "with --tokenizer=bpe or word: the most tokens (None: 8192 for bpe)", minimum=2)
    field: str = option("", "of .jsonl and .parquet texts: the field that holds the text (empty: as before, else `text`)")
    gradient_accumulation_steps: int = option(40, "micro-batches per step, divided among the ranks", minimum=1)
    batch_size: int = option(12, "sequences per micro-batch", minimum=1)
    block_size: int = option(1024, "context: tokens per sequence", minimum=1)

    n_layer: int = option(12, "blocks", minimum=1, section="Model")
    n_head: int = option(12, "attention heads; must divide n_embd", minimum=1)
    n_embd: int = option(768, "width of the residual stream", minimum=1)
    dropout: float = option(0.0, "dropout probability; 0 for pretraining, 0.1 or more for fine-tuning", minimum=0, below=1)
    bias: bool = option(False, "biases in LayerNorms and Linears")
    activation: str = option("auto", "of the MLP: GELU's erf form, or the tanh form with which OpenAI trained GPT-2 (auto: a folder's "
                             "config.json says it; else erf, as in nanoGPT)", choices=("auto", "gelu", "gelu_tanh"))

    optimizer: str = option("adamw", "adamw; or muon for the matrices of the blocks and AdamW for embeddings, head and vectors: fewer steps "
                            "to the same loss, each of them slower (docs/measured.md)", choices=("adamw", "muon"), section="Optimizer")
    learning_rate: float = option(6e-4, "AdamW's highest learning rate", minimum=0, alias="lr")
    max_iters: int = option(600_000, "steps", minimum=0)
    weight_decay: float = option(1e-1, "for matrices and embeddings; biases and LayerNorms have none", minimum=0)
    beta1: float = option(0.9, "decay of the gradient's running mean", minimum=0, below=1)
    beta2: float = option(0.95, "decay of the running mean of its square", minimum=0, below=1)
    grad_clip: float = option(1.0, "the gradient's norm is clipped to this; 0 for no clipping", minimum=0)
    muon_lr: float = option(0.025, "Muon's highest learning rate; warm-up and decay are AdamW's", minimum=0)
    muon_weight_decay: float = option(0.05, "of the matrices that Muon trains; weight_decay is of the others", minimum=0)

    decay_lr: bool = option(True, "warm-up and cosine decay; False for a constant learning rate", section="Learning rate")
    warmup_iters: int | float = option(2000, "steps of linear warm-up", minimum=0)
    lr_decay_iters: int | float = option(600_000, "step at which min_lr is reached; about max_iters", minimum=0)
    min_lr: float = option(6e-5, "the lowest learning rate; about learning_rate / 10", minimum=0)

    backend: str = option("auto", "the implementation of the ops (auto, fused, reference, or per op as in "
                          "auto,attention=reference), torchrun's communication backend (nccl, gloo; nanoGPT's meaning), "
                          "or both: gloo,reference", section="Machine")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "of the forward pass (auto on GPUs: bfloat16, float16 on old ones; on CPUs with AMX or AVX-512 "
                        "bf16: bfloat16 from 128 channels on; else float32)",
                        choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool | str = option("auto", "torch.compile the model (auto: on CUDA, unless the step runs on our kernels and is captured, see "
                                 "cuda_graph)",
                                 choices=("auto", True, False))
    cuda_graph: str = option("auto", "replay the step as CUDA graphs, which small models need (auto: if possible; on: fail "
                             "with the reason if not)", choices=("auto", "on", "off"))
    malloc: str = option("auto", "on a CPU keep freed memory in the process (glibc), so that a step need not map it again (auto, off)",
                         choices=("auto", "off"))
    recompute: bool | str = option("auto", "the fused MLP recomputes its GELU in the backward, so that a block keeps a fifth less for "
                                   "it (auto: if memory is short)", choices=("auto", True, False))
    shard: bool = option(False, "divide weights, gradients and moments among torchrun's ranks (FSDP2), where DDP keeps all of them on "
                         "each; last.pt is then written in shards, and ckpt.pt at the end")
    seed: int = option(1337, "of weights, batches and dropout; rank r uses seed + r", minimum=0)

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, not divisible by n_head, {self.n_head}; every head gets n_embd / n_head"
                             " channels")
        if self.profile and self.eval_only:
            raise ValueError(f"profile is {self.profile}, but with eval_only no step is taken; expected 0")
        if self.profile:
            profiling.first_step(self.profile, 0, self.max_iters, self.eval_interval)
        if self.optimizer == "muon" and self.learning_rate == 0:
            raise ValueError("learning_rate is 0 with optimizer='muon', whose rate is a multiple of it (muon_lr / learning_rate); give a "
                             "learning_rate above 0")
        split_backend(self.backend)


def split_backend(spec):
    """"gloo", "reference", "gloo,attention=reference" -> (torch.distributed's backend or None, the ops' choice or None)."""
    parts = [part.strip() for part in spec.split(",")]
    groups = [part for part in parts if part in devices.GROUPS]
    ops = ",".join(part for part in parts if part not in devices.GROUPS and part != "auto")
    if len(groups) > 1:
        raise ValueError(f"backend is {spec!r}; it names {len(groups)} of {', '.join(devices.GROUPS)}, but only one can connect the ranks")
    try:
        ops_backend.parse(ops or None)
    except ValueError as error:
        raise ValueError(f"{error}. Also accepted, to connect torchrun's ranks: {', '.join(devices.GROUPS)}") from None
    return (groups[0] if groups else None), (ops or None)
