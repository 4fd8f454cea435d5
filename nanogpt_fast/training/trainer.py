"""The trainer: nanoGPT's train.py with its options, as `train(options)` and as `nanogpt-fast train`.

Read `_train` from top to bottom: data, model, optimizer and step, then one loop that evaluates, saves and steps.

    options.py      what can be set                    step.py         one step: forward, backward, clip, AdamW
    start.py        data, model, resuming              evaluation.py   the loss of both splits, a sample
    presets.py      the command line                   resumed.py      a resumed run's settings
    progress.py     what a run shows and records       losses.py       the losses of steps, read late
    sharding.py     --shard: FSDP2                     profiling.py    --profile: where a step's time goes
    muon.py         --optimizer=muon                   captured.py     the step as CUDA graphs
    half_weights.py the weights' copies                embedding.py    its gradient, by row
    banner.py       what is printed first              interrupt.py    Ctrl-C and signals
    cpu.py          only on a CPU: malloc, one pass    finetune.py     freeze and unfreeze, for programs
    ../checkpoints/folder.py: its folder, and resuming;  ../checkpoints/nanogpt.py: its files;  ../devices.py: devices and ranks

A run is a function of its options: evaluation and the printed samples draw from generators of their own, so a run that was
stopped and resumed takes the same steps, bit for bit on a CPU, as one that never stopped.
"""
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

from .. import backend as ops_backend, devices, options
from ..checkpoints import folder as run_folder, nanogpt as checkpoints, sharded
from ..checkpoints.state import random_states
from ..model import GPT
from ..text.batches import Batches
from ..text.tokens import TokenCheck, checksum, open_tokens
from . import captured, cpu, muon, presets, profiling, resumed, sharding, start
from .banner import banner
from .evaluation import estimate_loss, sample_text
from .interrupt import StopOnSignal
from .losses import Losses, NonFiniteLoss, advice
from .options import TrainOptions as TrainOptions, split_backend
from .progress import Progress
from .step import TrainingStep


@dataclass
class TrainResult:
    """The result of a run. val_loss, train_loss: of the last evaluation, None without one; stopped: the signal that ended it, or None.

    With --shard the model's parameters are DTensors, of which each rank has its part.
    """

    model: GPT
    out_dir: Path
    iter_num: int
    best_val_loss: float
    train_loss: float | None
    val_loss: float | None
    stopped: signal.Signals | None


def run(argv):
    """`nanogpt-fast train`: exit status 0, or 128 + the number of the signal that stopped it: Ctrl-C (130), SIGTERM (143), ..."""
    o = presets.parse(argv, "nanogpt-fast train")
    result = train(o)
    if result.stopped is None:
        if devices.is_master() and not o.eval_only and result.iter_num == 0:
            print(f"Done: max_iters is {o.max_iters}, so no step was taken and no weights are written. metrics.jsonl is in {result.out_dir}")
        elif devices.is_master() and not o.eval_only and result.val_loss is None:    # any step would have ended in an evaluation
            print(f"No step was taken: {result.out_dir} is at step {result.iter_num:,} already, and max_iters is not more. --max_iters=N "
                  "trains on until step N")
        elif devices.is_master() and not o.eval_only:
            print(f"Done: best validation loss {result.best_val_loss:.4f}. Weights, metrics.jsonl and loss.png are in "
                  f"{result.out_dir}. Try: nanogpt-fast sample --out_dir={shlex.quote(str(result.out_dir))}")
        return 0
    if devices.is_master():
        where = f"{result.out_dir / 'last.pt'}{' and the shards beside it' * o.shard}"
        print(f"Stopped at step {result.iter_num}; the full state is in {where}. To continue exactly there:\n"
              f"    nanogpt-fast train --out_dir={shlex.quote(str(result.out_dir))} --init_from=resume")
    return 128 + result.stopped


def train(o):
    """Train with the TrainOptions `o` -> TrainResult.

    Raises ValueError for invalid options, FileNotFoundError for missing data, CheckpointError (a RuntimeError) if a
    checkpoint can't be read or written, RuntimeError if another process trains in out_dir or another rank is lost, NonFiniteLoss if the
    loss becomes nan or infinite.
    """
    options.check(o)
    master, resuming = devices.is_master(), o.init_from == "resume"
    if not resuming:
        devices.choose_device(o.device)     # one that is not here is refused before there is a folder
    with (contextlib.nullcontext() if master else contextlib.redirect_stdout(io.StringIO()),
          run_folder.owned(o.out_dir, create=not resuming) if master else contextlib.nullcontext()):
        if resuming:
            o = resumed.with_the_runs_settings(o)
        group, ops = split_backend(o.backend)
        with (devices.ranks(group, devices.choose_device(o.device), group_of_one=o.shard) as (ranks, device),
              cpu.keep_freed_memory(device.type == "cpu" and o.malloc == "auto") as malloc):
            return _train(o, ranks, device, ops, malloc)


def _train(o, ranks, device, ops, malloc):
    if o.gradient_accumulation_steps % ranks.size:
        raise ValueError(f"gradient_accumulation_steps is {o.gradient_accumulation_steps}; {ranks.size} ranks divide them, so it"
                         f" must be a multiple of {ranks.size}")
    accumulation = o.gradient_accumulation_steps // ranks.size
    torch.manual_seed(o.seed + ranks.rank)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    # data and model
    o, launch = start.after_restart(o, ranks)
    if o.shard:
        sharding.refuse_separate_folders(o.out_dir, ranks)
    folder = start.find_data(o, ranks)
    vocab_size, tokenizer = start.load_vocabulary(folder)
    model, checkpoint = start.initial_model(o, vocab_size, tokenizer, ops)  # the checkpoint to resume from, or None
    dtype = devices.choose_dtype(o.dtype, device, model.config.n_embd)
    if o.shard:
        sharding.refuse(o, device, dtype)
    else:
        model.to(device)
    T = min(o.block_size, model.config.block_size)
    if T < model.config.block_size:
        model.crop_block_size(T)
    o = start.what_runs(o, model, checkpoint)
    token_check = TokenCheck(folder, model.config.vocab_size, T, active=ranks.local_rank == 0)
    token_check.wait(1)     # seconds, the rest is read while the run goes on: see text/tokens.py
    recompute = o.recompute if o.recompute != "auto" else start.memory_is_short(
        model, device, dtype, o.batch_size * T, parts=ranks.size if o.shard else 1)
    for block in model.transformer.h:
        block.mlp.recompute = recompute
    if o.shard:
        sharding.shard(model, device, dtype, ranks)

    def batches(split, generator=None):
        return Batches(folder, split, o.batch_size, T, device=device, generator=generator, vocab_size=model.config.vocab_size)

    train_batches = batches("train")  # from torch's global generator, as in nanoGPT: the same seed gives the same batches

    # optimizer and step
    if o.optimizer == "muon":
        optimizer = muon.muon_and_adamw(model, o, device.type)
    else:
        optimizer = model.configure_optimizers(o.weight_decay, o.learning_rate, (o.beta1, o.beta2), device.type)
    not_captured = "cuda_graph=off" if o.cuda_graph == "off" else sharding.NO_GRAPHS if o.shard else captured.why_not(
        model, optimizer, device, ranks=ranks.size, scaled=dtype == torch.float16)
    if o.cuda_graph == "on" and not_captured is not None:
        raise ValueError(f"cuda_graph is 'on', but the step cannot be captured: {not_captured}. cuda_graph=auto trains without graphs")
    compiled = _compiled(o, model, device, dtype, not_captured)
    if compiled:
        print("compiling the model... (takes a ~minute)")
    alone = torch.compile(model) if compiled else model
    network = alone
    if ranks.size > 1 and not o.shard:
        network = DistributedDataParallel(alone, device_ids=[device] if device.type == "cuda" else None)
    step = TrainingStep(model, optimizer, network, dtype=dtype, batch_shape=(o.batch_size, T), not_captured=not_captured, compiled=compiled,
                        accumulation=accumulation, grad_clip=o.grad_clip, ranks=ranks.size, sharded=o.shard)

    # the state of a resumed run
    iter_num, best_val_loss, evaluated_at, run = 0, start.NONE_YET, None, run_folder.new_run()
    of_val = checksum(open_tokens(Path(folder, "val.bin")))
    if checkpoint is not None:
        evaluated_at = start.continue_exactly(checkpoint, o, model, optimizer, step.scaler, train_batches, ranks, of_val)
        iter_num, best_val_loss, run = checkpoint["iter_num"], checkpoint["best_val_loss"], checkpoint.get("run", run)
    profiled_from = profiling.first_step(o.profile, iter_num, o.max_iters, o.eval_interval) if o.profile else None
    if ranks.is_master and not o.eval_only:
        if checkpoint is not None:
            run_folder.finish(o.out_dir, checkpoint)
            if not o.shard:
                run_folder.export(o.out_dir)    # before a save of whole weights replaces the shards
        else:
            run_folder.begin(o.out_dir, run, launch)
    checkpoint = None  # its weights are in the model now: free the memory

    def save(best=False):
        """Write last.pt, and if `best` ckpt.pt too. Every rank's state is here before the first file is opened."""
        of_each_rank = ranks.gather(dict(random=random_states(), batches=train_batches.state_dict()))
        shards = sharded.write(o.out_dir, model, optimizer, iter_num, ranks) if o.shard else None
        if ranks.is_master:
            contents = checkpoints.contents(model, optimizer, iter_num=iter_num, best_val_loss=best_val_loss,
                                            config=dataclasses.asdict(o), tokenizer=tokenizer, run=run, shards=shards)
            write = run_folder.save_sharded if o.shard else run_folder.save
            resume = dict(ranks=of_each_rank, scaler=step.scaler.state_dict(), evaluated_at=evaluated_at, val=of_val)
            write(o.out_dir, contents, resume, best=best)

    tokens = o.gradient_accumulation_steps * o.batch_size * T
    banner(o, step, dtype, compiled, not_captured, malloc, ranks, folder, tokens)
    stop = StopOnSignal(alone=ranks.size == 1)
    progress = Progress(o, start=iter_num, total=o.max_iters, tokens=tokens, stop=stop, evaluated_at=evaluated_at, active=ranks.is_master,
                        forecast=accumulation if device.type == "cpu" and not o.eval_only and iter_num < o.max_iters else None)
    losses = Losses(o, ranks, train_batches, dtype, device)
    run_profile = profiling.RunProfile(o.profile if ranks.is_master else 0, profiled_from, device,
                                       Path(o.out_dir, "trace.json.gz"), progress)

    def report(at, loss, lr):
        progress.step(at, loss, lr, lambda seconds: model.estimate_hardware_mfu(o.batch_size * accumulation, seconds))

    def told_to_stop():
        return ranks.size == 1 and stop.signal is not None      # with more ranks, all must learn of it first (Losses)

    # the loop
    stopping, measured = False, None
    train_batches.prefetch()
    with (contextlib.closing(progress), contextlib.closing(train_batches), contextlib.closing(token_check),
          contextlib.closing(run_profile), stop):
        while True:
            token_check.wait(0)
            lr = learning_rate(iter_num, o)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_share", 1)

            # measure both splits, write checkpoints, show a sample
            due = (iter_num % o.eval_interval == 0 or iter_num == o.max_iters) and iter_num != evaluated_at
            if due or o.eval_only:
                stopping |= losses.read(report) or told_to_stop()
                with progress.pause():
                    with step.weights.in_use():
                        found = None if stopping else estimate_loss(alone, batches, o, step.context, ranks, stop, progress.evaluating)
                    if found is None:       # a signal came
                        stopping = True
                    else:
                        if not math.isfinite(found["val"]):
                            raise NonFiniteLoss(advice(o, iter_num, found["val"], dtype, "a validation batch"))
                        improved = found["val"] < best_val_loss
                        measured, best_val_loss, evaluated_at = found, min(best_val_loss, found["val"]), iter_num
                        progress.evaluated(iter_num, found, lr)
                        if iter_num > 0 and not o.eval_only:
                            save(best=improved or o.always_save_checkpoint)
                        text = sample_text(model, tokenizer, o, device, step.context, ranks) if ranks.is_master or o.shard else None
                        progress.tell(iter_num, found, " (best)" if improved else "", text)
            if stopping or o.eval_only or iter_num >= o.max_iters:
                break

            windows = []        # where in the text the step's batches start

            def next_batch():
                windows.append(train_batches.drawn)
                return train_batches.next()
            # The next batch is drawn after the forward pass, as in nanoGPT, and gathered while the GPU or the backward runs.
            with run_profile.step(iter_num):
                loss = step(next_batch, meanwhile=train_batches.prefetch)
            losses.put(iter_num, lr, windows, loss, stop.signal is not None)
            iter_num += 1
            stopping = losses.read(report, late=losses.late) or told_to_stop()

        losses.read(report)
        if stopping and not o.eval_only:
            save()
        if o.shard:
            sharded.reshard(model)
            if ranks.is_master and not o.eval_only:
                run_folder.export(o.out_dir)
    train_loss, val_loss = (None, None) if measured is None else (measured["train"], measured["val"])
    return TrainResult(model, Path(o.out_dir), iter_num, best_val_loss, train_loss, val_loss,
                       (stop.signal or signal.SIGTERM) if stopping else None)


def _compiled(o, model, device, dtype, not_captured):
    """Whether the model is compiled."""
    if o.compile != "auto":
        return o.compile
    # If all ops run on our kernels, a captured step is as fast without compiling (H100, GPT-2 124M, 64 x 1024 tokens: 129.8 ms, compiled
    # 130.1) and starts at once. Ops that run on PyTorch gain from compiling.
    kernels = dtype != torch.float32 and not any(ops_backend.choice(op, model.backend) == "reference"
                                                 for op in ("attention", "layer_norm", "mlp", "cross_entropy"))
    return (device.type == "cuda" and not o.shard and not (kernels and not_captured is None)
            and ops_backend.triton_import_error() is None)


def learning_rate(it, o):
    """The learning rate of step `it`: linear warm-up, cosine down to min_lr at lr_decay_iters, then min_lr, as in nanoGPT."""
    if not o.decay_lr:
        return o.learning_rate
    if it < o.warmup_iters:
        return o.learning_rate * (it + 1) / (o.warmup_iters + 1)
    if it >= o.lr_decay_iters:
        return o.min_lr
    decayed = (it - o.warmup_iters) / (o.lr_decay_iters - o.warmup_iters)  # 0 .. 1
    return o.min_lr + 0.5 * (1.0 + math.cos(math.pi * decayed)) * (o.learning_rate - o.min_lr)
