"""How a run begins: its data, its model, and, if it resumes from a checkpoint, the saved state."""
import copy
import dataclasses

import torch

from .. import devices
from ..checkpoints import folder as run_folder, huggingface_tokenizer, nanogpt as checkpoints, schema, sharded
from ..checkpoints.state import CheckpointError, set_random_states
from ..config import GPTConfig
from ..model import GPT
from ..options import is_given
from ..text import prepare


def find_data(o, ranks):
    """The folder with the token files. The first rank of each machine prepares what is missing, the others wait for it."""
    def find():
        return prepare.find(o.dataset, o.data_dir, tokenizer=o.tokenizer, vocab_size=o.vocab_size, field=o.field)
    folder = find() if ranks.local_rank == 0 else None
    ranks.gather(None)
    return folder or find()


def after_restart(o, ranks):
    """(the options, the names of this launch of torchrun). If torchrun has restarted the ranks (--max-restarts), the run goes on from
    its own last checkpoint, whatever init_from is; before its first checkpoint it begins as it did."""
    names, known = (set().union(*of_each) for of_each in zip(*ranks.gather(devices.launch())))
    if o.init_from != "resume" and ranks.gather(ranks.is_master and run_folder.restarted(o.out_dir, known))[0]:
        print("torchrun has restarted the ranks: the run goes on from its own last checkpoint")
        o = copy.copy(o)
        o.init_from = "resume"
    return o, sorted(names)


def load_vocabulary(folder):
    """(vocabulary size or None for GPT-2's, tokenizer or None) of the data. Training needs only the ids, and the samples a tokenizer."""
    try:
        size, tokenizer, why_not = prepare.load_vocabulary(folder)
    except RuntimeError as error:  # a tokenizer.json names GPT-2's tokenizer, which is not installed
        size, tokenizer, why_not = None, None, error
    if tokenizer is None:
        print(f"no text samples: {why_not}")
    return size, tokenizer


def initial_model(o, vocab_size, tokenizer, ops):
    """(model, checkpoint or None): a new model, GPT-2, or the one in out_dir's checkpoint, which is returned with it."""
    if o.init_from == "scratch":
        # nanoGPT's rule: the vocabulary of meta.pkl; without that file, GPT-2's padded to a multiple of 64.
        config = GPTConfig(block_size=o.block_size, vocab_size=vocab_size or 50304, n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd,
                           dropout=o.dropout, bias=o.bias, activation="gelu" if o.activation == "auto" else o.activation)
        return GPT(config, backend=ops), None
    if o.init_from != "resume":
        activation = None if o.activation == "auto" else o.activation
        model = GPT.from_pretrained(o.init_from, dict(dropout=o.dropout), activation=activation, backend=ops)
        # A vocabulary may be padded, to a multiple of 128 at most (checkpoints/nanogpt.py).
        if vocab_size is not None and not 0 <= model.config.vocab_size - vocab_size < 128:
            raise ValueError(f"the data set {o.dataset!r} has a vocabulary of {vocab_size} tokens and {o.init_from} one of "
                             f"{model.config.vocab_size}: the same ids mean other text. "
                             + ("Prepare the data with GPT-2's tokenizer (nanogpt-fast prepare TEXT --tokenizer=gpt2)"
                                if model.config.vocab_size in (50257, 50304) else "Use the data that the model was trained on")
                             + ", or train from scratch")
        if tokenizer is not None and (known := huggingface_tokenizer.read(o.init_from)) not in (None, tokenizer):
            raise ValueError(f"the data set {o.dataset!r} has another vocabulary ({tokenizer}) than {o.init_from} ({known}): the same ids mean "
                             "other text. Use the data that the model was trained on, or train from scratch")
        return model, None

    path = run_folder.latest(o.out_dir)
    checkpoint = run_folder.read(path, weights=not o.shard)
    print(f"resuming from {path}: run {checkpoint.get('run', 'without a name')}, step {checkpoint['iter_num']}")
    known = checkpoint.get("tokenizer")
    if known is not None and tokenizer is not None and known != tokenizer.to_state():
        raise CheckpointError(
            f"{path} was trained with another vocabulary than that of the data set {o.dataset!r}: the same ids mean other text. "
            "Resume on the data that it was trained on.")
    schema.check_run(checkpoint, path)
    model = checkpoints.build_model(checkpoint, path, dropout=o.dropout, backend=ops)
    return model, {**checkpoint, "path": path}


NONE_YET = 1e9          # nanoGPT's best_val_loss before the first evaluation
SIZES = ("block_size", "n_layer", "n_head", "n_embd", "bias", "activation")


def what_runs(o, model, checkpoint):
    """The options as they take effect, for the record. What was given and has no effect, or changes a resumed run, is said.

    A checkpoint or GPT-2 decides the model's sizes, as in nanoGPT. nanoGPT's resume also takes weight_decay and the betas from the
    checkpoint, whatever the options are; here it does so only where they are not given.
    """
    runs = {name: getattr(model.config, name) for name in SIZES}
    for name, value in runs.items():
        if value != getattr(o, name) and is_given(o, name) and o.init_from != "scratch":
            print(f"{name} is {value}, as in the weights of {o.init_from if checkpoint is None else checkpoint['path']}; "
                  f"{getattr(o, name)} has no effect")
    for name in ("muon_lr", "muon_weight_decay"):
        if o.optimizer != "muon" and is_given(o, name):
            print(f"{name} has no effect: the optimizer is {o.optimizer}")
    if checkpoint is not None:
        group = checkpoint.get("optimizer", {}).get("param_groups", [{}])[0]
        betas = group.get("betas", (None, None))
        for name, saved in (("weight_decay", group.get("weight_decay")), ("beta1", betas[0]), ("beta2", betas[1])):
            if saved not in (None, getattr(o, name)):
                if is_given(o, name):
                    print(f"{name} is {getattr(o, name)} from here on; it was {saved}")
                else:
                    runs[name] = saved
                    print(f"{name} is the checkpoint's, {saved}")
        saved = (checkpoint.get("config") or {}).get("seed")
        if "resume" in checkpoint and saved not in (None, o.seed) and is_given(o, "seed"):
            print(f"seed {o.seed} chooses the batches of evaluations; training continues with the checkpoint's random numbers, "
                  f"of seed {saved}")
    return dataclasses.replace(o, **runs)


def continue_exactly(start, o, model, optimizer, scaler, batches, ranks, of_val):
    """Restore optimizer, scaler, random states and data position; returns the step whose evaluation is already done.

    of_val: the checksum of the tokens to validate on. If the run was saved with others, its best loss counts no more:
    start["best_val_loss"] becomes NONE_YET, and None is returned, on every rank if it is so on one.
    Weights that are in shards are loaded here, too. A ckpt.pt has only the optimizer: the run then continues with fresh random numbers, as
    nanoGPT does, and says so.
    """
    if "shards" in start:
        sharded.load(start, model, optimizer, ranks)
    elif "optimizer" in start:
        checkpoints.load_optimizer(optimizer, start["optimizer"], start["path"])
    if "optimizer" in start:
        for group, decay in zip(optimizer.param_groups, (o.weight_decay, 0.0)):
            group.update(weight_decay=decay, betas=(o.beta1, o.beta2))
    resume = start.get("resume")
    if resume is None:
        print(f"WARNING: not an exact continuation: {start['path']} has the weights{' and the optimizer' * ('optimizer' in start)}, but "
              "no random state and no position in the data. Batches and dropout start from fresh seeds")
        return None
    if scaler.is_enabled() and resume["scaler"]:
        scaler.load_state_dict(resume["scaler"])
    problem = None
    if len(resume["ranks"]) == ranks.size:
        mine = resume["ranks"][ranks.rank]
        set_random_states(mine["random"])
        try:
            batches.load_state_dict(mine["batches"])
        except ValueError as error:  # another batch size or text may be intended, so only say it
            problem = str(error)
    else:
        problem = f"saved by {len(resume['ranks'])} ranks, resumed by {ranks.size}: batches and dropout start from fresh seeds"
    if problem := next(filter(None, ranks.gather(problem)), None):
        print(f"WARNING: not an exact continuation: {problem}")
    if not any(ranks.gather(resume.get("val", of_val) != of_val)):
        return resume["evaluated_at"]
    best, start["best_val_loss"] = start["best_val_loss"], NONE_YET
    print(f"WARNING: the validation data has changed{f', so that the best loss so far, {best:.4f}, counts no more' * (best < NONE_YET)}")
    return None


def memory_is_short(model, device, dtype, tokens, parts=1):
    """Whether a step of `tokens` tokens that keeps GELU's results would take more than nine tenths of the GPU's free memory.

    parts: among how many ranks the weights, gradients and moments are divided."""
    if device.type != "cuda":
        return False
    c = model.config
    parameters = 14 * sum(p.numel() for p in model.parameters()) // parts        # gradients, two moments, copies in half precision
    # Per token in half precision: 36C bytes per block, a quarter of the logits.
    activations = tokens * (36 * c.n_embd * c.n_layer + 16 * c.n_embd + c.vocab_size // 2) * dtype.itemsize // 2
    return parameters + activations > 0.9 * torch.cuda.mem_get_info(device)[0]
