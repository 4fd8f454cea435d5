"""accelerate(model): put the ops into an existing model, in place; restore(model) takes them out again.

    report = nanogpt_fast.accelerate(model)             nanoGPT's classes, a classic GPT, transformers' GPT-2
    print(report)                                       what was swapped, what was not and why, which calls took their own path
    with nanogpt_fast.accelerate(model): ...            undone at the end

How it works. A recognised module is assigned another class: a subclass of its own class, created here, whose `forward` calls the
ops. Nothing else of the module changes: parameters, buffers, hooks, submodules and their names are the same objects, so
optimizers, DDP, tied weights and state_dict see no difference, and `restore` assigns the old class back. The alternative is to set
`forward` on the instance, which breaks in two places where a class does not. Pickle stores a bound method as "attribute `forward`
of this module", a reference to itself. And code that checks for a replaced forward (torch.nn.utils.parametrize and FSDP2, which
swap classes as well; our own `touched`) would have to tell our replacement from a user's. A class is copied by deepcopy, traced by
torch.compile like any other, and keeps isinstance, super() and the fork's other methods working. It also keeps its name, which
transformers writes into config.json. Pickle cannot import a dynamic class, so `__reduce_ex__` says how to create it again;
unpickling needs nanogpt_fast, loading a state_dict does not.

Why it does not change results:

    recognised, then tried      Attribute names only make a candidate. A copy of it is tried: its own forward and ours run on the
                                same random weights and inputs, ours on PyTorch's ops. Return values, gradients, random numbers,
                                the operations that run and all side effects have to agree. A fork that computes something else
                                (a window, a clip, a stored activation) is left alone, and the report says why. The model itself
                                is not called (trial.py, stage.py).
    no kernel, own forward      Where a kernel cannot run or was not asked for, the module's own forward runs: on a CPU in float32
                                an accelerated model computes what it did before, bit for bit.
    unusual calls               An attention mask, past keys, an unknown argument, more tokens than were tried, or an attribute that
                                the module's code mentions and that has changed since the trial: the module's own forward runs, and
                                the report counts the call (not while torch.compile traces).

What a trial misses: a Python rule for a length or a batch size that it did not try (it tries lengths of 1, 16 and the whole context, and
1 and 2 rows), and a global variable that changes later.

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size.

This file has the public functions and the report. swapped.py creates a module's new class; parts.py has the formulas (gpt2.py those for
transformers' GPT-2, with a table of its releases); recognise.py finds candidates; trial.py tries a copy of each, which stage.py makes.
"""
import collections
from typing import NamedTuple

import torch.nn as nn

from .. import backend as _backend, model as nano, tables
from . import parts, recognise, trial
from .swapped import State, Swapped, unswap


class Row(NamedTuple):
    path: str      # the module's name in the model; "" is the model itself
    part: str      # "attention", "mlp", "layer_norm", "block", "model"
    cls: str       # name of its class
    swapped: bool
    reason: str    # why it was not swapped; empty if it was


class Report:
    """What `accelerate` did, and where calls have gone since. Printable; as a context manager it restores the model at the end."""

    def __init__(self, model, rows, state):
        self.model, self.rows, self._state = model, rows, state

    @property
    def swapped(self):
        return [row for row in self.rows if row.swapped]

    @property
    def left(self):
        """The candidates that were not swapped, each with its reason."""
        return [row for row in self.rows if not row.swapped]

    @property
    def calls(self):
        """{(part, where): number of calls}; where is "kernels" or "own path: <reason>". One `accelerate` counts in one place."""
        return dict(self._state.calls)

    @property
    def unfused(self):
        """[(path, reason)] of swapped blocks and MLPs that do not run fused now: one has a hook, a block has another MLP ..."""
        return [(path, why_not) for path, module in self.model.named_modules()
                if isinstance(module, (parts.Block, parts.Mlp)) and (why_not := module.why_not_fused()) is not None]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        restore(self.model)

    def _on_kernels(self, part):
        """How many calls of a part ran on kernels; "swapped" alone does not tell."""
        total = sum(n for (name, _), n in self.calls.items() if name == part)
        if not total and any(self.calls.get((outer, "kernels")) for outer in ("block", "model")):
            return "run by its block or model"
        return f"{self.calls.get((part, 'kernels'), 0)} of {total} calls on kernels" if total else "not called yet"

    def __str__(self):
        counts = collections.Counter((row.part, row.cls) for row in self.swapped)
        rows = [("swapped", f"{n} x {part} ({cls}), {self._on_kernels(part)}") for (part, cls), n in counts.items()]
        rows = rows or [("swapped", "nothing" if self.left else "nothing: its classes are nanogpt_fast's already")]
        rows += [("not swapped", f"{row.path or 'the model'} ({row.cls}): {row.reason}") for row in self.left]
        rows += [("steps aside", f"{path}: {reason}") for path, reason in self.unfused]
        rows += [("calls", f"{n} x {part}, {where}") for (part, where), n in sorted(self.calls.items())]
        return tables.table(None, rows, align="l")


def accelerate(model, backend=None):
    """Put the fused ops into `model`, in place, and return a Report; a second call starts over. `restore(model)` undoes it.

    model: nanoGPT's GPT or a fork that keeps its attribute names, a ClassicGPT, transformers' GPT2Model or a model built on it; or
    any module that holds one (DDP, torch.compile's result, a PEFT model). backend: "auto", "fused", "reference", or op by op, as in
    `backend.parse`. Nothing but classes changes in the model; the trial runs copies of its parts on the CPU (GPT-2 124M: 6 s of one
    core).

    Raises TypeError if the model holds none of these. A known part that cannot be swapped raises nothing: it keeps its own forward,
    and the report says why.
    """
    choices = _backend.parse(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module; this is a {type(model).__name__}")
    restore(model)
    state, rows, seen, tried = State(choices, trial.context_length(model)), [], set(), {}
    # Inner parts first: whether a block is a candidate depends on whether its attention, MLP and LayerNorms were swapped.
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
                        "(and forks that keep their attribute names), those of nanogpt_fast.classic, and transformers' GPT-2")
    return Report(model, rows, state)


def restore(model):
    """Undo `accelerate`: every module gets its own class back. Returns the number of modules that were swapped.

    Raises RuntimeError if parametrize or FSDP2 has since derived a class from ours: undo that first.
    """
    swapped = [(path, module) for path, module in model.named_modules() if isinstance(module, Swapped)]
    for path, module in swapped:
        if "_own" not in vars(type(module)):
            raise RuntimeError(f"{path or 'the model'} became a {type(module).__name__} after it was accelerated "
                               "(parametrize? FSDP?); undo that first, then restore")
    for _, module in swapped:
        unswap(module)
    return len(swapped)
