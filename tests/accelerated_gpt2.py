"""A plugin for pytest (-p accelerated_gpt2): every GPT-2 of transformers that a test makes is accelerated as soon as it exists.

The formulas run on PyTorch's ops where no kernel runs, or else a CPU would test the models' own forwards.
"""
import functools

import torch
from transformers.models.gpt2 import modeling_gpt2

import nanogpt_fast
from nanogpt_fast.swap import parts

_depth, swapped, counters = 0, 0, []


def _accelerated(function, made):
    """`function`, which makes a model or fills one (`made` says which of its arguments and its result that is), and accelerates it."""
    @functools.wraps(function)
    def wrapper(*args, **keywords):
        global _depth, swapped
        _depth += 1
        try:
            result = function(*args, **keywords)
        finally:
            _depth -= 1
        model = made(args, result)
        if _depth == 0 and isinstance(model, torch.nn.Module):      # the outermost: a GPT2LMHeadModel makes a GPT2Model
            report = nanogpt_fast.accelerate(model)
            swapped += len(report.swapped)
            counters.append(report._state.calls)
        return result
    return wrapper


def pytest_configure(config):
    if not torch.cuda.is_available():
        parts._kernel_why_not = lambda *args: None
    for cls in vars(modeling_gpt2).values():
        if isinstance(cls, type) and issubclass(cls, modeling_gpt2.GPT2PreTrainedModel):
            if "__init__" in vars(cls):
                cls.__init__ = _accelerated(cls.__init__, lambda args, result: args[0])
    base = modeling_gpt2.GPT2PreTrainedModel
    load = base.from_pretrained.__func__
    base.from_pretrained = classmethod(_accelerated(load, lambda args, result: result[0] if isinstance(result, tuple) else result))


def pytest_terminal_summary(terminalreporter):
    calls = [item for counter in counters for item in counter.items()]
    fast = sum(n for (_, where), n in calls if where == "kernels")
    terminalreporter.write_line(f"accelerated_gpt2: {swapped} modules, {fast} calls of {sum(n for _, n in calls)}")
