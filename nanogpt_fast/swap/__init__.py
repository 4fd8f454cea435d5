"""accelerate(model): put the ops into a model that already exists, in place; restore(model) takes them out again.

    report = nanogpt_fast.accelerate(model)             nanoGPT's classes, a classic GPT, transformers' GPT-2
    print(report)                                       what was swapped, what was not and why, what kept to its own path
    with nanogpt_fast.accelerate(model): ...            undone at the end

How. A module that is recognised is given another class: a subclass of its own class, made here, whose `forward` calls the ops.
Nothing else of the module is touched: parameters, buffers, hooks, submodules and their names are the same objects, so
optimizers, DDP, tied weights and state_dict see no change, and `restore` gives the old class back. The other way would be a
`forward` set on the instance. That one is lost or breaks where a class does not: pickle stores a bound method as "the attribute
forward of this module" and finds itself; everything that asks whether a forward was replaced (torch.nn.utils.parametrize and
FSDP2, which swap classes as well; our own `touched`) would have to tell our replacement from a user's. A class is copied by
deepcopy, traced by torch.compile like any other, and keeps isinstance, super() and the fork's other methods. Its name stays,
too: transformers writes it into config.json. A dynamic class has no address for pickle, so `__reduce_ex__` says how to make it
again; the reader needs nanogpt_fast, a state_dict does not.

What keeps it from changing results:

    recognised, then tried      attribute names only make a candidate. A copy of it is tried: its own forward and ours run on the
                                same random weights and inputs, with PyTorch's ops in ours. What they return, their gradients, their
                                random numbers, the operations that run and what else a forward does have to be the same. A fork that
                                computes something else (a window, a clip, a stored activation) is left alone, and the report
                                says why. The model itself is not called (trial.py, stage.py).
    no kernel, own forward      wherever a kernel cannot run or was not asked for, the module's own forward runs: on a CPU in
                                float32 an accelerated model is the model that it was, bit for bit.
    whatever is unusual         an attention mask, past keys, an argument that we do not know, more tokens than were tried, an attribute
                                that is not what it was in the trial and that the module's code mentions: its own forward, counted
                                in the report. (Not counted while torch.compile traces.)

What a trial does not meet: a rule in Python that asks for one number of tokens or rows that was not tried (1, 16 and the whole context
of 1 or 2 rows are), and a global variable that is changed later.

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size.

Here are the public functions and the report; swapped.py makes a module's new class, parts.py has the formulas (gpt2.py those for
transformers' GPT-2, with a table of its releases), recognise.py says what is a candidate, trial.py runs a copy of it, made by stage.py.
"""
import collections
from typing import NamedTuple

import torch.nn as nn

from .. import backend as _backend, model as nano
from . import parts, recognise, trial
from .swapped import State, Swapped, unswap


class Row(NamedTuple):
    path: str      # the module's name in the model; "" is the model itself
    part: str      # "attention", "mlp", "layer_norm", "block", "model"
    cls: str       # its class
    swapped: bool
    reason: str    # why not; empty where it was


class Report:
    """What `accelerate` did, and since then where calls went. Printable; as a context manager it restores at the end."""

    def __init__(self, model, rows, state):
        self.model, self.rows, self._state = model, rows, state

    @property
    def swapped(self):
        return [row for row in self.rows if row.swapped]

    @property
    def left(self):
        """What was a candidate and was not swapped, each with its reason."""
        return [row for row in self.rows if not row.swapped]

    @property
    def calls(self):
        """{(part, where): number of calls}; where is "kernels" or "own path: <reason>". Shared by this call's modules."""
        return dict(self._state.calls)

    @property
    def unfused(self):
        """[(path, reason)] of swapped blocks whose residual adds stay out of the LayerNorms now: a hook, another MLP ..."""
        found = []
        for path, module in self.model.named_modules():
            if isinstance(module, parts.Block) and (reason := module.why_not_fused()) is not None:
                found.append((path, reason))
            elif isinstance(module, parts.Mlp) and (reason := module.why_not_fused()) is not None:
                found.append((path, reason))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        restore(self.model)

    def _on_kernels(self, part):
        """How many calls of a part ran on kernels: "swapped" alone says nothing of that."""
        total = sum(n for (name, _), n in self.calls.items() if name == part)
        if not total and any(self.calls.get((outer, "kernels")) for outer in ("block", "model")):
            return "run by its block or model"
        return f"{self.calls.get((part, 'kernels'), 0)} of {total} calls on kernels" if total else "not called yet"

    def __str__(self):
        counts = collections.Counter((row.part, row.cls) for row in self.swapped)
        lines = [f"swapped      {n:>3} x {part} ({cls}), {self._on_kernels(part)}" for (part, cls), n in counts.items()]
        lines = lines or ["swapped      nothing"]
        lines += [f"not swapped  {row.path or 'the model'} ({row.cls}): {row.reason}" for row in self.left]
        lines += [f"steps aside  {path}: {reason}" for path, reason in self.unfused]
        lines += [f"calls        {n:>6} x {part}, {where}" for (part, where), n in sorted(self.calls.items())]
        return "\n".join(lines)


def accelerate(model, backend=None):
    """Put the fused ops into `model`, in place, and return a Report; a second call starts anew. Undone by `restore(model)`.

    model: nanoGPT's GPT or a fork that keeps its attribute names, a ClassicGPT, transformers' GPT2Model or a model on it; any
    module that holds one (DDP, torch.compile's, a PEFT model). backend: "auto", "fused", "reference", or op by op, as in
    `backend.parse`. Nothing else of the model is touched; a few passes of copies of its parts are made on the CPU (GPT-2 124M: 6 s
    of one core).

    Raises TypeError where the model holds nothing of the kind. A part that is of the kind and cannot be swapped raises nothing:
    it keeps its own forward, and the report says why.
    """
    choices = _backend.parse(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module; this is a {type(model).__name__}")
    restore(model)
    state, rows, seen, tried = State(choices, trial.context_length(model)), [], set(), {}
    # Inner parts first: a block is recognised by what its attention and its MLP have become.
    for path, module in sorted(model.named_modules(), key=lambda entry: -entry[0].count(".") if entry[0] else 1):
        candidate = None if id(module) in seen else recognise.candidate(module)
        seen.add(id(module))
        if candidate is None:
            continue
        part, mixins, why_not = candidate
        cls = type(module).__name__
        if why_not is None:
            why_not = trial.swap(module, mixins, state, tried)
        rows.append(Row(path, part, cls, why_not is None, why_not or ""))
    rows.sort(key=lambda row: [int(piece) if piece.isdigit() else -1 for piece in row.path.split(".")] if row.path else [])
    if not any(row.part in ("attention", "mlp", "block") for row in rows) and not any(
            isinstance(module, (nano.GPT, nano.Block)) for module in model.modules()):
        restore(model)      # its LayerNorms may have been swapped
        raise TypeError(f"{type(model).__name__} holds no part of a GPT that is known here; known are nanoGPT's classes "
                        "(and forks that keep their attribute names), nanogpt_fast.classic's, and transformers' GPT-2")
    return Report(model, rows, state)


def restore(model):
    """Undo `accelerate`: every module gets its own class back. Returns the number of modules that had been swapped.

    Raises RuntimeError where a class was built on ours since then (parametrize, FSDP2): that has to be undone first.
    """
    swapped = [(path, module) for path, module in model.named_modules() if isinstance(module, Swapped)]
    for path, module in swapped:
        if "_own" not in vars(type(module)):
            raise RuntimeError(f"{path or 'the model'} became a {type(module).__name__} after it was accelerated "
                               "(parametrize? FSDP?); undo that first, then restore")
    for _, module in swapped:
        unswap(module)
    return len(swapped)
