"""The trainer: nanoGPT's train.py with its options, as `train(options)` and as `nanogpt-fast train`.

Read `_train` from top to bottom: data, model, optimizer, then one loop that evaluates, saves and steps. What a run shows and
logs is in progress.py, what it writes and reads back in checkpoint.py, devices and ranks in devices.py.

A run is a function of its options: evaluation and the printed samples draw from generators of their own, so a run that was
stopped and resumed takes the same steps, bit for bit on a CPU, as one that never stopped.
"""
import collections
import contextlib
import dataclasses
import io
import math
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from . import backend as ops_backend
from . import checkpoint as checkpoints
from . import captured, cpu, devices, options
from .config import GPTConfig
from .explanation import explain
from .half_weights import HalfWeights
from .interrupt import StopOnSignal
from .model import GPT
from .ops import linear_cpu
from .options import option
from .progress import Progress
from .text import prepare
from .text.batches import Batches


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


@dataclass
class TrainResult:
    """What a run came to. val_loss, train_loss: of the last evaluation, None without one; stopped: the signal that ended it."""

    model: GPT
    out_dir: Path
    iter_num: int
    best_val_loss: float
    train_loss: float | None
    val_loss: float | None
    stopped: signal.Signals | None


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the text says at which step and on which batch, and what to try."""


def run(argv):
    """`nanogpt-fast train`: exit status 0, or 128 + the signal's number after Ctrl-C (130) or SIGTERM (143)."""
    o = options.parse(TrainOptions, argv, "nanogpt-fast train")
    result = train(o)
    if result.stopped is None:
        if devices.is_master() and not o.eval_only:
            print(f"Done: best validation loss {result.best_val_loss:.4f}. Weights, metrics.jsonl and loss.png are in "
                  f"{result.out_dir}. Try: nanogpt-fast sample --out_dir={shlex.quote(str(result.out_dir))}")
        return 0
    if devices.is_master():
        words = [word for word in argv if not word.startswith(("--init_from=", "--init-from="))]
        print(f"Stopped at step {result.iter_num}; everything is in {result.out_dir / 'last.pt'}. To go on exactly there:\n"
              f"    nanogpt-fast train {shlex.join(words)} --init_from=resume")
    return 128 + result.stopped


def train(o):
    """Train as the TrainOptions `o` say -> TrainResult.

    Raises ValueError for options that can't be, FileNotFoundError for missing data, CheckpointError (a RuntimeError) where a
    checkpoint can't be read or written, NonFiniteLoss where the loss stops being a number.
    """
    options.check(o)
    group, ops = split_backend(o.backend)
    with devices.ranks(group, devices.choose_device(o.device)) as (ranks, device):
        with (contextlib.nullcontext() if ranks.is_master else contextlib.redirect_stdout(io.StringIO()),
              cpu.keep_freed_memory(device.type == "cpu" and o.malloc == "auto") as malloc):
            return _train(o, ranks, device, ops, malloc)


def _train(o, ranks, device, ops, malloc):
    on_cpu = device.type == "cpu"
    if o.gradient_accumulation_steps % ranks.size:
        raise ValueError(f"gradient_accumulation_steps is {o.gradient_accumulation_steps}; {ranks.size} ranks share them, so it"
                         f" must be a multiple of {ranks.size}")
    accumulation = o.gradient_accumulation_steps // ranks.size
    torch.manual_seed(o.seed + ranks.rank)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    # data and model
    folder = _find_data(o, ranks)
    tokenizer = _tokenizer(folder)
    model, start = _initial_model(o, tokenizer, ops)  # start: the checkpoint it continues, or None
    model.to(device)
    dtype = devices.choose_dtype(o.dtype, device, model.config.n_embd)
    context = devices.autocast(device, dtype)
    T = min(o.block_size, model.config.block_size)
    if T < model.config.block_size:
        model.crop_block_size(T)
    recompute = o.recompute if o.recompute != "auto" else _memory_is_short(model, device, dtype, o.batch_size * T)
    for block in model.transformer.h:
        block.mlp.recompute = recompute

    def batches(split, generator=None):
        return Batches(folder, split, o.batch_size, T, device=device, generator=generator, vocab_size=model.config.vocab_size)

    train_batches = batches("train")  # drawn from torch's own generator, where nanoGPT draws: the same seed, the same batches

    # optimizer, and where a resumed run stands
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = model.configure_optimizers(o.weight_decay, o.learning_rate, (o.beta1, o.beta2), device.type)
    iter_num, best_val_loss, evaluated_at = 0, 1e9, None
    if start is not None:
        iter_num, best_val_loss = start["iter_num"], start["best_val_loss"]
        evaluated_at = _continue_exactly(start, optimizer, scaler, train_batches, ranks)
        start = None  # its weights are in the model now: free the memory

    not_captured = "cuda_graph=off" if o.cuda_graph == "off" else captured.why_not(
        model, optimizer, device, ranks=ranks.size, scaled=scaler.is_enabled())
    if o.cuda_graph == "on" and not_captured is not None:
        raise ValueError(f"cuda_graph is 'on', but the step cannot be captured: {not_captured}. cuda_graph=auto trains without")
    # A captured step of our kernels is as fast eager (H100, GPT-2 124M, 64 x 1024 tokens: 129.8 ms, compiled 130.1) and begins at once.
    # What PyTorch computes, compiling fuses.
    kernels = dtype != torch.float32 and not any(ops_backend.choice(op, model.backend) == "reference"
                                                 for op in ("attention", "layer_norm", "mlp", "cross_entropy"))
    compiled = o.compile if o.compile != "auto" else (
        device.type == "cuda" and not (kernels and not_captured is None) and ops_backend.triton_import_error() is None)
    network = model
    if compiled:
        print("compiling the model... (takes a ~minute)")
        network = torch.compile(model)
    evaluated_network = network
    if ranks.size > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    # A compiled graph is cut into DDP's buckets where its parameters are, so that gradients travel while others are computed;
    # copies are no parameters, and all gradients would leave at the end.
    weights = HalfWeights(model, dtype, "DDP cuts a compiled graph by its parameters" if compiled and ranks.size > 1 else None,
                          own_gradients=not compiled)

    # what is saved
    def checkpoint(**more):
        own = {} if tokenizer is None else {"tokenizer": tokenizer.to_state()}
        return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=checkpoints.model_args(model.config),
                    iter_num=iter_num, best_val_loss=best_val_loss, config=dataclasses.asdict(o), **own, **more)

    def save_last():
        of_each_rank = ranks.gather(dict(random=checkpoints.random_states(), batches=train_batches.state_dict()))
        if ranks.is_master:
            resume = dict(ranks=of_each_rank, scaler=scaler.state_dict(), evaluated_at=evaluated_at)
            checkpoints.save(checkpoint(resume=resume), Path(o.out_dir, "last.pt"))

    if ranks.is_master:
        Path(o.out_dir).mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(o.out_dir)
    tokens = o.gradient_accumulation_steps * o.batch_size * T
    _banner(o, model, device, dtype, compiled, weights, not_captured, malloc, ranks, folder, tokens)
    progress = Progress(o, start=iter_num, total=o.max_iters, tokens=tokens, evaluated_at=evaluated_at, active=ranks.is_master)
    losses = {"train": None, "val": None}
    stop = StopOnSignal(alone=ranks.size == 1)

    def evaluate(lr):
        """Measure both splits, show a sample, write checkpoints; False where a signal cut the measuring short."""
        nonlocal losses, best_val_loss, evaluated_at
        with weights.in_use():
            measured = estimate_loss(evaluated_network, batches, o, context, ranks, stop)
        if measured is None:
            return False
        if not math.isfinite(measured["val"]):
            raise NonFiniteLoss(_advice(o, iter_num, measured["val"], dtype, "those of the validation"))
        improved = measured["val"] < best_val_loss
        losses, best_val_loss, evaluated_at = measured, min(best_val_loss, measured["val"]), iter_num
        text = sample_text(model, tokenizer, o, device, context) if ranks.is_master else None
        progress.evaluated(iter_num, losses, lr, " (best)" if improved else "", text)
        if iter_num > 0 and not o.eval_only:
            if (improved or o.always_save_checkpoint) and ranks.is_master:
                checkpoints.save(checkpoint(), Path(o.out_dir, "ckpt.pt"))
            save_last()
        return True

    by_row = on_cpu and ranks.size == 1 and not compiled

    def forward_backward(x, y, meanwhile=None):
        """Add the gradients of one micro-batch; returns its share of the step's loss. `meanwhile` runs between the passes."""
        # By row here alone: `generate`, and whoever looks at the model between steps, finds the embedding untouched.
        with cpu.embedding_gradient_by_row(model, wanted=by_row), weights.in_use():
            with context:
                _, loss = network(x, y, return_logits=False)
                loss = loss / accumulation
            if meanwhile is not None:
                meanwhile()
            scaler.scale(loss).backward()
        return loss.detach()

    def update():
        """Clip, let the optimizer move the weights, and cast them anew."""
        if on_cpu and not scaler.is_enabled():
            cpu.update(optimizer, weights, o.grad_clip)
            return
        if o.grad_clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        weights.refresh()

    graphs = None if not_captured else captured.CapturedStep(forward_backward, update, optimizer, (o.batch_size, T), device)

    def step():
        """Forward, backward, update; returns the mean loss of the micro-batches and where in the text each of them lies."""
        total, windows = torch.zeros((), device=device), []
        for micro_step in range(accumulation):
            if ranks.size > 1:  # gradients are averaged over the ranks once, with the last micro-batch
                network.require_backward_grad_sync = micro_step == accumulation - 1
            windows.append(train_batches.drawn)
            x, y = train_batches.next()
            # The next batch is drawn behind the forward pass, as nanoGPT does, and gathered while the GPU or the backward runs.
            if graphs is None:
                total += forward_backward(x, y, meanwhile=train_batches.prefetch)
            else:
                graphs.micro_step(x, y, first=micro_step == 0)
                train_batches.prefetch()
        if graphs is not None:
            graphs.update()
            return graphs.loss, windows
        update()
        optimizer.zero_grad(set_to_none=True)
        return total, windows

    # The host reads a step's loss when the next step is queued already, so a GPU never waits for it; a CPU would gain nothing.
    unread, queued = collections.deque(), 1 if device.type == "cuda" else 0

    def read_reports(leave):
        """Look at the losses of finished steps, all but the last `leave`; True where some rank wants to stop."""
        stopping = False
        while len(unread) > leave:
            step, lr, windows, report = unread.popleft()
            loss, wants = report()
            if not math.isfinite(loss):
                batch = (f"seed {o.seed + ranks.rank}, the windows of {train_batches.path} that start at tokens "
                         + ", ".join(map(str, torch.cat(windows).tolist())))
                raise NonFiniteLoss(_advice(o, step, loss, dtype, batch))
            progress.step(step, loss, lr, lambda seconds: model.estimate_mfu(o.batch_size * accumulation, seconds))
            stopping |= wants > 0
        return stopping or ranks.size == 1 and stop.signal is not None

    # the loop
    stopping = False
    train_batches.prefetch()
    with contextlib.closing(progress), contextlib.closing(train_batches), stop:
        while True:
            lr = learning_rate(iter_num, o)
            for group in optimizer.param_groups:
                group["lr"] = lr

            due = (iter_num % o.eval_interval == 0 or iter_num == o.max_iters) and iter_num != evaluated_at
            if due or o.eval_only:
                stopping |= read_reports(leave=0)
                with progress.pause():
                    stopping = stopping or not evaluate(lr)
            if stopping or o.eval_only or iter_num >= o.max_iters:
                break

            loss, windows = step()
            # One message to all ranks: the mean loss, and whether anyone was told to stop.
            report = ranks.mean(torch.stack((loss, torch.full_like(loss, stop.signal is not None))))
            unread.append((iter_num, lr, windows, devices.start_reading(report)))
            iter_num += 1
            stopping = read_reports(leave=queued)

        read_reports(leave=0)
        if stopping and not o.eval_only:
            save_last()
    return TrainResult(model, Path(o.out_dir), iter_num, best_val_loss, losses["train"], losses["val"],
                       (stop.signal or signal.SIGTERM) if stopping else None)


def learning_rate(it, o):
    """Of step `it`: linear warm-up, cosine down to min_lr at lr_decay_iters, min_lr from there on (C30)."""
    if not o.decay_lr:
        return o.learning_rate
    if it < o.warmup_iters:
        return o.learning_rate * (it + 1) / (o.warmup_iters + 1)
    if it >= o.lr_decay_iters:
        return o.min_lr
    decayed = (it - o.warmup_iters) / (o.lr_decay_iters - o.warmup_iters)  # 0 .. 1
    return o.min_lr + 0.5 * (1.0 + math.cos(math.pi * decayed)) * (o.learning_rate - o.min_lr)


@torch.no_grad()
def estimate_loss(network, batches, o, context, ranks, stop):
    """{"train", "val"}: the mean loss of eval_iters batches of each split, or None if a signal came in between.

    The batches are the same at every evaluation, so that what changes from one to the next is the model. The ranks share them.
    """
    network.eval()
    losses = {}
    count = math.ceil(o.eval_iters / ranks.size)
    for split in ("train", "val"):
        total = 0.0
        seed = o.seed + 1_000_003 * (1 + ranks.rank)  # far from every rank's training seed
        with contextlib.closing(batches(split, torch.Generator().manual_seed(seed))) as source:
            for _ in range(count):
                if stop.signal is not None and ranks.size == 1:  # with more, all must take part in `mean`
                    network.train()
                    return None
                x, y = source.next()
                source.prefetch()
                with context:
                    total = total + network(x, y, return_logits=False)[1].float()
        losses[split] = ranks.mean(total / count).item()
    network.train()
    return losses


def sample_text(model, tokenizer, o, device, context):
    """What the model writes after a line break, as text; None where there is no tokenizer or none is wanted.

    Always from the same seed; every random state is put back, so looking at a run does not change it.
    """
    if tokenizer is None or o.sample_tokens == 0:
        return None
    try:
        prompt = tokenizer.encode("\n")
    except ValueError:  # a vocabulary without line breaks
        prompt = [0]
    states = checkpoints.random_states()
    model.eval()
    try:
        torch.manual_seed(o.seed)
        with context:
            ids = model.generate(torch.tensor([prompt], device=device), o.sample_tokens, temperature=0.8, top_k=200)
    finally:
        model.train()
        checkpoints.set_random_states(states)
    drawn = ids[0, len(prompt):].tolist()
    return tokenizer.decode([i for i in drawn if i < tokenizer.vocab_size])  # the ids that pad a vocabulary mean nothing


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


def _find_data(o, ranks):
    """The folder with the token files. The first rank of each machine prepares what is missing, the others wait for it."""
    folder = prepare.find(o.dataset, o.data_dir) if ranks.local_rank == 0 else None
    ranks.gather(None)
    return folder or prepare.find(o.dataset, o.data_dir)


def _tokenizer(folder):
    """The data's tokenizer, or None where it can't be had: training needs only the ids."""
    try:
        return prepare.load_tokenizer(folder)
    except RuntimeError as error:
        print(f"no text samples: {error}")
        return None


def _initial_model(o, tokenizer, ops):
    """(model, checkpoint): fresh, GPT-2's, or of the checkpoint in out_dir, which is returned with it."""
    if o.init_from == "scratch":
        # nanoGPT's rule: the vocabulary of meta.pkl, and GPT-2's padded to a multiple of 64 without one.
        vocab_size = 50304 if tokenizer is None or tokenizer.to_state()["kind"] == "gpt2" else tokenizer.vocab_size
        config = GPTConfig(block_size=o.block_size, vocab_size=vocab_size, n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd,
                           dropout=o.dropout, bias=o.bias, activation=o.activation)
        return GPT(config, backend=ops), None
    if o.init_from != "resume":
        return GPT.from_pretrained(o.init_from, dict(dropout=o.dropout), activation=o.activation, backend=ops), None

    path = checkpoints.latest(o.out_dir)
    checkpoint = checkpoints.read(path)
    print(f"resuming from {path}, step {checkpoint['iter_num']}")
    known = checkpoint.get("tokenizer")
    if known is not None and tokenizer is not None and known != tokenizer.to_state():
        raise checkpoints.CheckpointError(
            f"{path} was trained with another vocabulary than the data set {o.dataset!r} has: the same ids mean other text. "
            "Resume on the data it was trained on.")
    model = checkpoints.build_model(checkpoint, path, dropout=o.dropout, backend=ops)
    return model, {**checkpoint, "path": path}


def _continue_exactly(start, optimizer, scaler, batches, ranks):
    """Put back optimizer, scaler, random states and data position; returns the step whose evaluation is done already.

    nanoGPT's ckpt.pt has only the optimizer: the run goes on from there with fresh random numbers, as nanoGPT's does.
    """
    if "optimizer" in start:
        checkpoints.load_optimizer(optimizer, start["optimizer"], start["path"])
    resume = start.get("resume")
    if resume is None:
        return None
    if scaler.is_enabled() and resume["scaler"]:
        scaler.load_state_dict(resume["scaler"])
    if len(resume["ranks"]) == ranks.size:
        mine = resume["ranks"][ranks.rank]
        checkpoints.set_random_states(mine["random"])
        try:
            batches.load_state_dict(mine["batches"])
        except ValueError as error:  # another batch size or text may be what is wanted; that it is another run is said
            print(f"not an exact continuation: {error}")
    else:
        print(f"saved by {len(resume['ranks'])} ranks, resumed by {ranks.size}: batches and dropout start from fresh seeds")
    return resume["evaluated_at"]


def _banner(o, model, device, dtype, compiled, weights, not_captured, malloc, ranks, folder, tokens):
    c = model.config
    where = devices.describe(device) + (f" and {ranks.size - 1} more ranks" if ranks.size > 1 else "")
    how = "compiled" if compiled else "not compiled" + (" (auto)" if o.compile == "auto" else "")
    why = f" (auto: {cpu.why_dtype(c.n_embd)})" if device.type == "cpu" and o.dtype == "auto" else ""
    print(f"device  {where}, {str(dtype).removeprefix('torch.')}{why}, {how}")
    if device.type == "cpu":
        print("memory  " + (f"as malloc has it: {malloc}" if malloc else
                            "what is freed stays in this process; --malloc=off gives it back"))
    elif device.type == "cuda":
        again = any(block.mlp.recompute for block in model.transformer.h)
        print(f"memory  GELU's results are {'computed again in' if again else 'kept for'} the backward"
              + (" (auto: by the GPU's free memory)" if o.recompute == "auto" else ""))
    print(f"model   {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary {c.vocab_size}: "
          f"{model.get_num_params():,} parameters")
    print(f"step    {o.gradient_accumulation_steps} x {o.batch_size} x {c.block_size} = {tokens:,} tokens; {o.max_iters:,}"
          f" steps on {folder}")
    print("graphs  " + (f"none: {not_captured}" if not_captured else
                        f"the step is captured in CUDA graphs after {captured.WARM_UP_STEPS} ordinary ones"))
    if dtype != torch.float32:
        print(f"casts   {len(weights.copies)} matrices to {str(dtype).removeprefix('torch.')} once a step"
              + (f"; at every use: {'; '.join(weights.left)}" if weights.left else ""))
    elif any(weights.own):
        loss = " and the loss" if min(model.lm_head.weight.shape) >= linear_cpu.SHORTEST_FP32 else ""
        print(f"linear  {sum(weights.own)} matrices{loss} on AMX tiles, a float32 as three bfloat16, no less exact; "
              "--backend=reference for PyTorch's products")
    for i, line in enumerate(str(explain(model, dtype=dtype, return_logits=False)).splitlines()):
        print(f"{'ops' if i == 0 else '':<7} {line}")
    print(f"writes  {o.out_dir}", flush=True)


def _memory_is_short(model, device, dtype, tokens):
    """Whether a step of so many tokens would take more than nine tenths of the GPU's free memory, if GELU's results were kept."""
    if device.type != "cuda":
        return False
    c = model.config
    parameters = 14 * sum(p.numel() for p in model.parameters())        # gradients, two moments, copies in half precision
    # Of a token in half precision: 36C a block, a quarter of the logits.
    activations = tokens * (36 * c.n_embd * c.n_layer + 16 * c.n_embd + c.vocab_size // 2) * dtype.itemsize // 2
    return parameters + activations > 0.9 * torch.cuda.mem_get_info(device)[0]


def _advice(o, step, loss, dtype, batch):
    """The text of NonFiniteLoss."""
    tries = [f"a lower --learning_rate (it is {o.learning_rate:g})", f"a longer --warmup_iters ({o.warmup_iters})"]
    tries += ["--grad_clip=1.0"] if o.grad_clip == 0 else []
    tries += {torch.float16: ["--dtype=bfloat16 or float32"], torch.bfloat16: ["--dtype=float32"]}.get(dtype, [])
    tries += ["--backend=reference, to tell whether a kernel is at fault"]
    return (f"step {step}: the loss is {loss}. Its batch: {batch}. No checkpoint was written after it, so "
            f"{Path(o.out_dir, 'last.pt')} is of an earlier step, if there was one. Try " + ", ".join(tries) + ".")
