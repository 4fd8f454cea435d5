"""Try a forward without leaving a trace: a copy of a module that shares no mutable state with it, and a record of what a call did.

Copying calls none of the user's code: no __init__, __deepcopy__, __setattr__, train(), no hook. Parameters of the copy are random, on
the CPU. What cannot be copied (a lock, a generator, a closure over a module) raises CannotCopy, and the module is left alone.

`call` records what a forward did besides returning: which PyTorch operations ran, what it wrote (attributes, buffers, its input, globals
of its module, attributes of its class), whether it printed, and whether it drew from Python's or NumPy's random numbers. It restores
what the forward changed outside of the copy.
"""
import collections
import contextlib
import enum
import functools
import io
import numbers
import pickle
import random
import sys
import types
import warnings
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.modules import module as _nn_module
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SHARED = (numbers.Number, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType, enum.Enum, range, slice, torch.dtype,
           torch.device, torch.Size)
_CONTAINERS = (list, tuple, set, frozenset, dict, collections.OrderedDict, collections.deque)
_LARGE = 10_000     # elements: a longer list in a user's module is not compared before and after


class CannotCopy(Exception):
    pass


# --------------------------------------------------------------------------------------------------------------------- copies


def copy_of(module, replaced=()):
    """A copy of a module. replaced: {id of an object in it: what the copy holds in its place}."""
    return _copy(module, dict(replaced), type(module).__name__)


def _copy(value, memo, name):
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, nn.Module):
        new = memo[id(value)] = object.__new__(kind)
        for key, item in value.__dict__.items():
            new.__dict__[key] = type(item)() if "hooks" in key and isinstance(item, dict) else _copy(item, memo, f"{name}.{key}")
        return new
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise CannotCopy(f"{name} is not a dense tensor")
        if isinstance(value, nn.Parameter):             # trial.py fills it with random numbers
            new = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cpu"))
        else:
            new = value.detach().to("cpu", copy=True)
        memo[id(value)] = new
        return new
    if kind in _CONTAINERS:
        if issubclass(kind, dict):
            new = memo[id(value)] = kind()
            new.update((_copy(k, memo, name), _copy(v, memo, f"{name}[{k!r}]")) for k, v in value.items())
            return new
        return kind(_copy(item, memo, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is types.FunctionType:
        for cell in value.__closure__ or ():
            if not isinstance(cell.cell_contents, (*_SHARED, types.FunctionType)):
                raise CannotCopy(f"{name} is a closure over a {type(cell.cell_contents).__name__}")
        return value
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _copy(value.__self__, memo, name))
    if kind is functools.partial:
        return functools.partial(*(_copy(item, memo, name) for item in (value.func, *value.args)), **_copy(value.keywords, memo, name))
    if "numpy" in sys.modules and kind is sys.modules["numpy"].ndarray:
        return value.copy()
    if kind.__new__ is object.__new__ and isinstance(getattr(value, "__dict__", None), dict) and kind.__reduce_ex__ is object.__reduce_ex__:
        new = memo[id(value)] = object.__new__(kind)         # such as a config or a namespace
        new.__dict__.update({key: _copy(item, memo, f"{name}.{key}") for key, item in value.__dict__.items()})
        return new
    raise CannotCopy(f"{name} is a {kind.__name__}")


# -------------------------------------------------------------------------------------------------------- what a call does


class Seen(NamedTuple):
    result: object      # what was returned
    operations: set     # names of PyTorch operations, such as "mm"
    effects: list       # its side effects, as text


def call(module, function, args, keywords):
    """Call function(module, *args, **keywords) on a copy, with torch seeded by 0 each time, and return what it did."""
    outside = _Outside(module)
    operations, printed = _Operations(), io.StringIO()
    before = _states(module, args)
    try:
        with _no_global_hooks(), contextlib.redirect_stdout(printed), warnings.catch_warnings(), operations:
            warnings.simplefilter("ignore")
            torch.random.default_generator.manual_seed(0)
            result = function(module, *args, **keywords)
        after = _states(module, args)
        names = sorted({name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))})
        effects = [f"sets {name}" for name in names if not any(name.startswith(f"{other}[") for other in names)][:3]
    finally:
        effects_outside = outside.put_back()
    return Seen(result, operations.names, effects + effects_outside + ["prints"] * bool(printed.getvalue()))


class _Operations(TorchDispatchMode):

    @classmethod
    def _should_skip_dynamo(cls):       # the default, True, imports the compiler, which takes 2 s
        return False

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if function._schema.overload_name.endswith("_mode"):                        # distinguish a division that rounds,
            name += f".{function._schema.overload_name}"
        result = function(*args, **(kwargs or {}))
        if name == "_to_copy" and args[0].is_floating_point() and not result.is_floating_point():
            name += f" to {result.dtype}"                                           # and a cast that rounds
        self.names.add(name)
        return result


@contextlib.contextmanager
def _no_global_hooks():
    """Hooks for all modules (a profiler's, say) are the user's code, too: do not run them."""
    hooks = [value for name, value in vars(_nn_module).items() if name.startswith("_global_") and isinstance(value, dict)]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, items in zip(hooks, kept):
            each.update(items)


def _states(module, args):
    return _state(module, "self") | _state(args, "its arguments")


def _state(value, where, found=None, seen=None):
    """{where: (what is there, a tensor's version)} for everything in a module or an argument that a call could write to."""
    found, seen = ({}, set()) if found is None else (found, seen)
    found[where] = value, value._version if isinstance(value, torch.Tensor) else None
    if isinstance(value, (*_SHARED, torch.Tensor)) or id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, dict):
        items = {f"{where}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, _CONTAINERS):
        items = {f"{where}[{i}]": item for i, item in enumerate(value)}
    else:
        items = {f"{where}.{key}": item for key, item in getattr(value, "__dict__", {}).items() if key[:6] != "_swap_"}
    for name, item in items.items():
        if isinstance(value, nn.Module) and isinstance(item, dict) and name.endswith(("._parameters", "._buffers", "._modules")):
            for key, member in item.items():
                _state(member, f"{where}.{key}", found, seen)
        else:
            _state(item, name, found, seen)
    return found


def _same(a, b):
    """Whether two entries of `_state` are equal; None stands for a missing one."""
    if a is None or b is None or a[1] != b[1]:
        return False
    return a[0] is b[0] or type(a[0]) is type(b[0]) and isinstance(a[0], PLAIN) and a[0] == b[0]


class _Outside:
    """What a forward can reach besides its module and its arguments: its classes, the globals of their modules, random numbers."""

    def __init__(self, module):
        classes = {cls for m in module.modules() for cls in type(m).__mro__ if _is_users(cls)}
        spaces = [(cls.__name__, cls, vars(cls)) for cls in classes]
        spaces += [(name, None, vars(sys.modules[name])) for name in {cls.__module__ for cls in classes} if name in sys.modules]
        self.spaces = [(name, cls, space, {key: (value, _contents(value)) for key, value in space.items() if _can_change(value)})
                       for name, cls, space in spaces]
        self.generators = [(name, get, put, get()) for name, get, put in _generators()]

    def put_back(self):
        """Undo the changes and return them, as text."""
        effects = []
        for name, get, put, state in self.generators:
            if pickle.dumps(get()) != pickle.dumps(state):
                effects.append(f"draws from {name}")
                put(state)
        for name, cls, space, before in self.spaces:
            for key in [key for key, value in space.items() if _can_change(value) and key not in before]:
                effects.append(f"sets {name}.{key}")
                delattr(cls, key) if cls else space.pop(key)
            for key, (value, contents) in before.items():
                now = space.get(key)
                if now is not value or _contents(now) != contents:
                    effects.append(f"sets {name}.{key}")
                    if isinstance(value, list):
                        value[:] = contents
                    elif contents is not None:
                        value.clear(), value.update(contents)
                    type.__setattr__(cls, key, value) if cls else space.__setitem__(key, value)
        return effects


def _is_users(cls):
    return cls.__module__.partition(".")[0] not in ("torch", "transformers", "nanogpt_fast", "builtins")


def _can_change(value):
    return isinstance(value, PLAIN) or type(value) in (list, dict, set) and len(value) <= _LARGE


def _contents(value):
    """A copy of a container of plain values; None for all else, which is compared by identity: == of two tensors is not one bool."""
    return type(value)(value) if type(value) in (list, dict, set) and len(value) <= _LARGE and is_plain(value) else None


def is_plain(container):
    return all(isinstance(item, PLAIN) for item in (container.values() if isinstance(container, dict) else container))


def _generators():
    yield "Python's random numbers", random.getstate, random.setstate
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        yield "NumPy's random numbers", lambda: numpy.random.get_state(legacy=False), numpy.random.set_state
