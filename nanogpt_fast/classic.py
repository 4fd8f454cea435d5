"""Small GPTs in plain PyTorch, from a table of pairs to a transformer. Read it from top to bottom, as a lecture.

A language model reads T tokens and predicts, at each of them, how likely every token of the vocabulary is to come next. Each
model in this file does that better than the one before it, by one more idea:

    Bigram              the next token from the last one alone: a table
    AttentionOnly       positions, and attention: each token gathers from those before it. One head, then several
    ClassicGPT, 1 layer the block: after gathering, think (a feed-forward network); and add to the residual stream, never replace it
    ClassicGPT          the same block several times

All are called in the same way: `logits, loss = model(idx, targets)` with idx and targets (B, T) int64, and `model.generate`.
`LADDER` builds them by name, `train` trains any of them, `nanogpt-fast ladder` compares them.

ClassicGPT keeps query, key and value in three separate projections, the way attention is first taught. model.py has nanoGPT's form
of the same function, with the three packed into one matrix; checkpoints/convert.py converts between the two.

B batch, T sequence, C = n_embd width, H = n_head heads, D = C / H head size, V vocabulary.
"""
import dataclasses
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from .checkpoints import archive, schema
from .checkpoints.state import CheckpointError
from .devices import choose_device
from .files import refuse_special, replacing
from .text import tokenizers

# ---------------------------------------------------------------------------------------------------------------------------
# The numbers that define a model


@dataclasses.dataclass
class ClassicConfig:
    vocab_size: int = 65
    block_size: int = 64        # T: the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128           # C: width of the residual stream
    dropout: float = 0.0
    activation: str = "gelu"    # of the feed-forward network: "gelu", "gelu_tanh" or "relu"
    norm: str = "pre"           # LayerNorm before each branch ("pre", GPT-2) or after each addition ("post", the 2017 paper)
    init: str = "normal"        # "normal": N(0, 0.02), GPT-2; "xavier": by fan-in and fan-out
    tied: bool = False          # the output head shares the token embedding's matrix, and then has no bias

    def __post_init__(self):
        for name, allowed in (("activation", tuple(ACTIVATIONS)), ("norm", ("pre", "post")), ("init", ("normal", "xavier"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: heads share the width equally")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is {self.dropout}; it is a probability, between 0 and 1")


ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU}

# ---------------------------------------------------------------------------------------------------------------------------
# What all models share: a loss for training, and generation


class LanguageModel(nn.Module):
    """A model defines `logits(idx)`: (B, T) token ids -> (B, T, V) scores. Loss and generation follow from them."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> (logits (B, T, V) of all positions, mean cross-entropy against targets (B, T), or None)."""
        logits = self.logits(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Complete idx (B, T) -> (B, T + max_new_tokens): predict, draw one token, append it, repeat. temperature=0: greedy.

        The causal mask applies here as in training: a position never sees what comes after it.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])                    # no more context than there are positions
            probabilities = next_token_probabilities(logits[:, -1, :], temperature, top_k)          # (B, V)
            idx = torch.cat((idx, torch.multinomial(probabilities, num_samples=1)), dim=1)
        return idx


def next_token_probabilities(logits, temperature=1.0, top_k=None):
    """The distribution to draw from: logits (B, V) -> probabilities (B, V).

    temperature divides the logits, and with them every difference between two of them: below 1 the most likely token gains, above 1
    the distribution flattens, at 0 the most likely token gets all. top_k then keeps the k best and all that tie with the k-th.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature is {temperature} and top_k {top_k}; expected temperature >= 0 and top_k >= 1 or None")
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return F.softmax(logits, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------------
# 1. Bigram: a table


class Bigram(LanguageModel):
    """Row i of a V x V table holds the logits of what follows token i. The model knows only pairs, nothing of earlier tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def logits(self, idx):
        return self.table(idx)                                                    # (B, T, V)

    def forward(self, idx, targets=None):
        """As for the other models, but with targets the logits have cross-entropy's shape: one row per prediction, (B * T, V)."""
        logits, loss = super().forward(idx, targets)
        return (logits if targets is None else logits.flatten(0, 1)), loss


# ---------------------------------------------------------------------------------------------------------------------------
# 2. Attention: softmax(Q K^T / sqrt(d_k)) V


def attention_weights(q, k, mask):
    """softmax(q k^T / sqrt(D)) where mask is 1, and 0 elsewhere. q, k (..., T, D); mask (T, T) -> (..., T, T), rows sum to 1.

    Row t holds how much position t takes from each position. "Attention Is All You Need", 2017, section 3.2.1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                      # how well each query matches each key
    scores = scores.masked_fill(mask == 0, float("-inf"))                         # exp(-inf) = 0: the future gets no weight
    return F.softmax(scores, dim=-1)


class SelfAttention(nn.Module):
    """Each position asks (query) and offers (key), and receives a weighted mean of the values.

    The heads do this in parallel, each on its own D = C / H channels with its own weights, so that one may look for a
    vowel while another looks for the start of the line. `proj` mixes what they found.
    """

    def __init__(self, config):
        super().__init__()
        C, T = config.n_embd, config.block_size
        self.n_head = config.n_head
        self.key = nn.Linear(C, C)
        self.query = nn.Linear(C, C)
        self.value = nn.Linear(C, C)
        self.proj = nn.Linear(C, C)
        self.attn_drop = nn.Dropout(config.dropout)
        self.resid_drop = nn.Dropout(config.dropout)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))                # row t: ones up to t, the past and itself

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                # (B, H, T, D)
                   for part in (self.query, self.key, self.value))
        weights = attention_weights(q, k, self.tril[:T, :T])                      # (B, H, T, T)
        y = self.attn_drop(weights) @ v                                           # (B, H, T, D)
        return self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))     # heads side by side again


class AttentionOnly(LanguageModel):
    """Embed tokens and positions, attend once, project to logits: with one head, then with several."""

    def __init__(self, config):
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.sa = SelfAttention(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx):
        return self.head(self.sa(embed(idx, self.tok_emb, self.pos_emb)))


def embed(idx, tok_emb, pos_emb):
    """What the token is plus where it is: (B, T) -> (B, T, C). Attention sums over a set; only pos_emb knows the order."""
    T, block_size = idx.size(1), pos_emb.size(1)
    if T > block_size:
        raise ValueError(f"Cannot forward sequence of length {T}, block size is only {block_size}")
    return tok_emb(idx) + pos_emb[:, :T]


# ---------------------------------------------------------------------------------------------------------------------------
# 3. The block: gather, then think, and add both to the residual stream


class Block(nn.Module):
    """x + sa(x) lets tokens talk to each other, x + ff(x) lets each one think. LayerNorm keeps their inputs at one scale."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.pre_norm = config.norm == "pre"
        self.sa = SelfAttention(config)
        self.ln1 = nn.LayerNorm(C)
        self.ff = nn.Sequential(nn.Linear(C, 4 * C), ACTIVATIONS[config.activation](),
                                nn.Linear(4 * C, C), nn.Dropout(config.dropout))
        self.ln2 = nn.LayerNorm(C)

    def forward(self, x):
        if self.pre_norm:                       # x itself is only ever added to: the gradient of the loss reaches every layer
            x = x + self.sa(self.ln1(x))
            return x + self.ff(self.ln2(x))
        x = self.ln1(x + self.sa(x))            # the original order: the gradient passes through every LayerNorm
        return self.ln2(x + self.ff(x))


# ---------------------------------------------------------------------------------------------------------------------------
# 4. GPT: the block, several times


class ClassicGPT(LanguageModel):
    """Token and position embeddings, n_layer blocks, a last LayerNorm, a linear head with bias."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, C))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(C) if config.norm == "pre" else nn.Identity()    # post-norm: the last block ends with one
        self.head = nn.Linear(C, config.vocab_size, bias=not config.tied)
        initialise(self)
        if config.tied:                         # reading a token and predicting it are similar tasks: share one matrix
            self.head.weight = self.tok_emb.weight

    def logits(self, idx):
        x = self.drop(embed(idx, self.tok_emb, self.pos_emb))                     # (B, T, C)
        return self.head(self.ln_f(self.blocks(x)))                               # (B, T, V)


@torch.no_grad()
def initialise(model):
    """Set the weights of a ClassicGPT by config.init; biases and positions start at zero, LayerNorms as the identity.

    "normal": N(0, 0.02) everywhere (GPT-2). The 2 n_layer projections that end a branch are smaller by sqrt(2 n_layer): the
    branches are summed, and the sum of that many independent terms then has the variance of one term.
    "xavier": uniform with variance 2 / (fan_in + fan_out), which keeps the scale of activations and of gradients through a
    linear layer (Glorot and Bengio, 2010); embeddings N(0, 0.02).
    """
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            if config.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                ends_a_branch = name.endswith((".sa.proj", ".ff.2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * config.n_layer) if ends_a_branch else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# The ladder: each model by its name, built from one config.
LADDER = {
    "bigram": Bigram,
    "one head": lambda config: AttentionOnly(dataclasses.replace(config, n_head=1)),
    "many heads": AttentionOnly,
    "block": lambda config: ClassicGPT(dataclasses.replace(config, n_layer=1)),
    "GPT": ClassicGPT,
}

# ---------------------------------------------------------------------------------------------------------------------------
# Learning: from a text to batches, from batches to gradients


def split(data, fraction=0.9):
    """The first nine tenths for training, the rest to see whether the model learned more than to memorise the text."""
    n = int(fraction * len(data))
    return data[:n], data[n:]


def get_batch(data, batch_size, block_size, generator=None):
    """Random windows of data (N,) int64 -> x, y (batch_size, block_size): y is x shifted by one, the next tokens."""
    if len(data) <= block_size:
        raise ValueError(f"{len(data)} tokens are too few for block_size {block_size} plus targets; use more text or a smaller block_size")
    starts = torch.randint(len(data) - block_size, (batch_size,), generator=generator)
    x = torch.stack([data[i:i + block_size] for i in starts])
    y = torch.stack([data[i + 1:i + 1 + block_size] for i in starts])
    return x, y


def examples(x, y):
    """One row of a batch is T examples at once: yields (context, target) for each position of x, y (B, T)."""
    for row, targets in zip(x.tolist(), y.tolist()):
        for t, target in enumerate(targets):
            yield row[:t + 1], target


@torch.no_grad()
def evaluate(model, data, batch_size, batches=20):
    """Mean loss over `batches` batches of data, always the same ones, without dropout."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(batches):
        x, y = get_batch(data, batch_size, model.config.block_size, generator)
        losses.append(model(x.to(device), y.to(device))[1])
    model.train(training)
    return torch.stack(losses).mean().item()


def train(model, train_data, val_data, *, steps, batch_size=32, learning_rate=1e-3, eval_interval=100, log=None):
    """Train with AdamW at a constant rate. Returns [{step, tokens, seconds, train_loss, val_loss}, ...], one per evaluation.

    seconds counts only the training steps. log(step, record) is called after each step; record is None without an evaluation.
    Raises RuntimeError if the loss is no longer finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    history, seconds = [], 0.0
    for step in range(steps + 1):
        record = None
        if step % eval_interval == 0 or step == steps:
            record = {"step": step, "tokens": step * batch_size * model.config.block_size, "seconds": seconds,
                      "train_loss": evaluate(model, train_data, batch_size), "val_loss": evaluate(model, val_data, batch_size)}
            if not math.isfinite(record["train_loss"]):
                raise RuntimeError(f"the loss is {record['train_loss']} at step {step}; "
                                   f"try a learning rate below {learning_rate:g}")
            history.append(record)
        if log is not None:
            log(step, record)
        if step == steps:
            return history

        start = time.perf_counter()
        x, y = get_batch(train_data, batch_size, model.config.block_size)
        _, loss = model(x.to(device), y.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------------
# Saving a model, and using it

CLASSES = {cls.__name__: cls for cls in (Bigram, AttentionOnly, ClassicGPT)}


def contents(model, tokenizer=None):
    """What a checkpoint of one of this file's models holds: its class, config and weights, and the tokenizer."""
    return {"classic": type(model).__name__, "config": dataclasses.asdict(model.config), "model": model.state_dict(),
            "tokenizer": None if tokenizer is None else tokenizer.to_state()}


def save_checkpoint(path, model, tokenizer=None):
    """Write one of this file's models, with its config and tokenizer, to `path` (a temporary name first, then renamed)."""
    with replacing(path) as f:
        torch.save(contents(model, tokenizer), f)


def is_checkpoint(path):
    """True if `path` is a readable torch file that holds a model of this file."""
    refuse_special(path)
    try:
        checkpoint = archive.load(path, mmap=True)
    except CheckpointError:  # not a checkpoint of ours
        return False
    return isinstance(checkpoint, dict) and "classic" in checkpoint


def load_checkpoint(path, device="auto"):
    """(model in eval mode, tokenizer or None) from a file of `save_checkpoint`. Loading never executes code from the file.

    Raises FileNotFoundError, and ValueError if the file is damaged or holds something else.
    """
    device = choose_device(device)
    refuse_special(path)
    try:
        checkpoint = archive.load(path)
        build, fields, weights = CLASSES[checkpoint["classic"]], checkpoint["config"], checkpoint["model"]
        if not all(type(value) in (int, float, bool, str) for value in fields.values()):
            raise ValueError("its config holds something else than numbers and strings")
        config = ClassicConfig(**fields)
        schema.check_layers(weights, config.n_layer if build is ClassicGPT else 0, path)
        with torch.device("meta"):  # its shapes, before memory is taken for them
            expected = build(config).state_dict()
        schema.check_weights(weights, {name: tensor.shape for name, tensor in expected.items()}, path, "the config requires")
        model = build(config)
        model.load_state_dict(weights)
        tokenizer = None if checkpoint["tokenizer"] is None else tokenizers.from_state(checkpoint["tokenizer"])
    except (FileNotFoundError, PermissionError, IsADirectoryError):  # torch reads a truncated file as an OSError, too
        raise
    except Exception as error:  # a damaged file fails in whichever part reads it first
        raise ValueError(f"{path} is not a checkpoint of a classic model, or is damaged "
                         f"({type(error).__name__}: {str(error)[:300]})") from None
    return model.to(device).eval(), tokenizer


def complete(source, prompt, max_new_tokens=200, *, temperature=1.0, top_k=None, device="auto"):
    """Load, encode, generate, decode: the prompt with its continuation, as text.

    source: the path of a checkpoint from `save_checkpoint`, or (model, tokenizer), with any model that has nanoGPT's `generate`.
    Raises ValueError for an empty prompt or one with characters that the tokenizer does not know.
    """
    model, tokenizer = source if isinstance(source, tuple) else load_checkpoint(source, device)
    if tokenizer is None:
        raise ValueError(f"{source} contains no tokenizer: load it with load_checkpoint and pass (model, tokenizer)")
    idx = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    out = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k)
    model.train(was_training)
    return tokenizer.decode(out[0])
