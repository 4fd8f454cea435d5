"""How a run begins: its data, its model, and, if it resumes from a checkpoint, the saved state."""
import torch

from ..checkpoints import folder as run_folder, nanogpt as checkpoints
from ..checkpoints.state import CheckpointError, set_random_states
from ..config import GPTConfig
from ..model import GPT
from ..text import prepare


def find_data(o, ranks):
    """The folder with the token files. The first rank of each machine prepares what is missing, the others wait for it."""
    folder = prepare.find(o.dataset, o.data_dir) if ranks.local_rank == 0 else None
    ranks.gather(None)
    return folder or prepare.find(o.dataset, o.data_dir)


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
                           dropout=o.dropout, bias=o.bias, activation=o.activation)
        return GPT(config, backend=ops), None
    if o.init_from != "resume":
        return GPT.from_pretrained(o.init_from, dict(dropout=o.dropout), activation=o.activation, backend=ops), None

    path = run_folder.latest(o.out_dir)
    checkpoint = checkpoints.read(path)
    print(f"resuming from {path}: run {checkpoint.get('run', 'without a name')}, step {checkpoint['iter_num']}")
    known = checkpoint.get("tokenizer")
    if known is not None and tokenizer is not None and known != tokenizer.to_state():
        raise CheckpointError(
            f"{path} was trained with another vocabulary than that of the data set {o.dataset!r}: the same ids mean other text. "
            "Resume on the data that it was trained on.")
    model = checkpoints.build_model(checkpoint, path, dropout=o.dropout, backend=ops)
    return model, {**checkpoint, "path": path}


def continue_exactly(start, optimizer, scaler, batches, ranks):
    """Restore optimizer, scaler, random states and data position; returns the step whose evaluation is already done.

    A ckpt.pt has only the optimizer: the run then continues with fresh random numbers, as nanoGPT does, and says so.
    """
    if "optimizer" in start:
        checkpoints.load_optimizer(optimizer, start["optimizer"], start["path"])
    resume = start.get("resume")
    if resume is None:
        print(f"WARNING: not an exact continuation: {start['path']} has the weights{' and the optimizer' * ('optimizer' in start)}, but "
              "no random state and no position in the data. Batches and dropout start from fresh seeds")
        return None
    if scaler.is_enabled() and resume["scaler"]:
        scaler.load_state_dict(resume["scaler"])
    if len(resume["ranks"]) == ranks.size:
        mine = resume["ranks"][ranks.rank]
        set_random_states(mine["random"])
        try:
            batches.load_state_dict(mine["batches"])
        except ValueError as error:  # another batch size or text may be intended, so only say it
            print(f"WARNING: not an exact continuation: {error}")
    else:
        print(f"WARNING: not an exact continuation: saved by {len(resume['ranks'])} ranks, resumed by {ranks.size}: batches and dropout start from fresh seeds")
    return resume["evaluated_at"]


def memory_is_short(model, device, dtype, tokens):
    """Whether a step of `tokens` tokens that keeps GELU's results would take more than nine tenths of the GPU's free memory."""
    if device.type != "cuda":
        return False
    c = model.config
    parameters = 14 * sum(p.numel() for p in model.parameters())        # gradients, two moments, copies in half precision
    # Per token in half precision: 36C bytes per block, a quarter of the logits.
    activations = tokens * (36 * c.n_embd * c.n_layer + 16 * c.n_embd + c.vocab_size // 2) * dtype.itemsize // 2
    return parameters + activations > 0.9 * torch.cuda.mem_get_info(device)[0]
