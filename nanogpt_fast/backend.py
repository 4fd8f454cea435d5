"""Which implementation of an op runs, and why.

Every op has a reference implementation (plain PyTorch, `reference.py`) and may have faster ones: "triton", "cpp", and for
attention "cudnn" (cuDNN's forward with the kernels' backward).
A choice is one of

    auto       per op, the fastest implementation that is available and correct for these arguments
    fused      a kernel, or a RuntimeError that says why none can run
    reference  exactly the PyTorch calls that nanoGPT makes

for all ops ("reference") or per op ("auto,attention=reference"); per op also an implementation's name ("attention=cudnn"), or that of a
kernel of one's own (ops/registered.py): it runs, or a RuntimeError says why it can't. It can be set in four places, the first of which wins: the context
manager `use(...)`, the model (`GPT(config, backend=...)`), the environment variable NANOGPT_FAST_BACKEND (read at import), auto.

`use` stores its choice in a `threading.local`, not a ContextVar, because torch.compile(fullgraph=True) can trace only the former.
"""
import contextlib
import functools
import os
import threading
import warnings

import torch

from .touched import replaced

OPS = ("attention", "layer_norm", "linear", "mlp", "cross_entropy", "sample", "decode")
LIBRARY_OPS = ("linear",)      # their reference is one call of a vendor library, which satisfies "fused" too
CHOICES = ("auto", "fused", "reference")
IMPLEMENTATIONS = {"attention": ("triton", "cudnn", "cpp"), "layer_norm": ("triton", "cpp"), "linear": ("cublas", "cpp"), "mlp": ("triton", "cpp"),
                   "cross_entropy": ("triton", "cpp"), "sample": ("cpp",), "decode": ("triton", "cpp")}
# The functions of torch.nn.functional that the reference of an op calls. Where a program has replaced one, `auto` takes the reference, too.
_CALLED = {"attention": ("scaled_dot_product_attention",), "layer_norm": ("layer_norm", "dropout"), "linear": ("linear",),
           "mlp": ("linear", "gelu", "relu", "dropout"), "cross_entropy": ("linear", "cross_entropy"), "sample": (), "decode": ()}
own = {op: {} for op in OPS}   # {op: {name: why_not}} of kernels that ops/registered.py added


def parse(spec, later=False):
    """Turn "fused", "auto,attention=reference" or a dict {op: choice} into a dict with a choice for every op.

    None (no preference) stays None. later: take names that no kernel has yet, if NANOGPT_FAST_KERNELS names files that may register them.
    Raises ValueError naming the part that is invalid.
    """
    if spec is None:
        return None
    if isinstance(spec, dict):
        parts = [(key, value) for key, value in spec.items()]
    elif isinstance(spec, str):
        parts = [tuple(part.split("=", 1)) if "=" in part else (None, part) for part in (p.strip() for p in spec.split(","))]
    else:
        raise TypeError(f"backend is {spec!r}; expected a string such as 'auto', 'fused', 'reference' or 'auto,attention=reference'")
    default, by_op = "auto", {}
    for op, choice in parts:
        if op is not None and op not in OPS:
            raise ValueError(f"backend {spec!r}: no op is called {op!r}; the ops are {', '.join(OPS)}")
        if op is not None and choice not in names(op) and os.environ.get("NANOGPT_FAST_KERNELS") and not later:
            load_local()
        known = CHOICES if op is None else names(op)
        if choice not in known and not (later and op is not None and os.environ.get("NANOGPT_FAST_KERNELS")):
            raise ValueError(f"backend {spec!r}: {choice!r} is not one of {', '.join(known)}")
        if op is None:
            default = choice
        else:
            by_op[op] = choice
    return {op: by_op.get(op, default) for op in OPS}


def names(op):
    """The choices that there are for an op."""
    return *CHOICES, *IMPLEMENTATIONS[op], *own[op]


try:
    _environment = parse(os.environ.get("NANOGPT_FAST_BACKEND") or "auto", later=True)
except ValueError as error:
    raise ValueError(f"NANOGPT_FAST_BACKEND: {error}") from None


class _Local(threading.local):
    choices = None  # dict set by `use`, or None
    record = None   # list filled by `recording`, or None


_local = _Local()


@contextlib.contextmanager
def use(spec):
    """Choose implementations inside the block, for every model and op of this thread: `with use("reference"): ...`"""
    before, _local.choices = _local.choices, parse(spec)
    try:
        yield
    finally:
        _local.choices = before


def current():
    """The choice of the innermost enclosing `use` ({op: choice}), or None."""
    return _local.choices


def choice(op, model_choices=None):
    """"auto", "fused", "reference" or an implementation's name for `op`; `model_choices` is the model's choice, a text or parsed, or None."""
    return _of(op, _local.choices or model_choices or _environment)


_texts = {}


def _of(op, choices):
    """The choice for `op` in a text, or in a dict: one that names every op, as `parse` makes it, or some."""
    if type(choices) is not dict:
        if choices not in _texts:       # parsed once
            _texts[choices] = parse(choices)
        return _texts[choices][op]
    return choices[op] if op in choices else parse(choices)[op]


def choose(op, candidates, model_choices=None, args=(), fastest=None, by_name=True):
    """The name of the implementation that `op` uses for these arguments.

    candidates: ((name, why_not), ...), fastest first; `why_not(*args)` returns None if the implementation can and should run, else the
    reason as text; "" if nobody would expect it to run. "reference" is implied at the end. fastest(*args): the Row of the table
    (kernels/fastest.py) whose implementation `auto` tries first, or None. by_name=False: a name counts as "auto", for a call that few of the
    op's implementations know. Raises RuntimeError under "fused" if none can run, and where the named one can't.
    """
    load_local()        # not behind `if not _tuned`: Dynamo may trace twice, and has to find the same calls again
    choices = _local.choices or model_choices or _environment
    wanted = _of(op, choices)
    if not by_name and wanted not in CHOICES:
        wanted = "auto"
    reasons, row, say = [], None, notice_unfused
    if wanted != "reference" and _transforms_active() and inside_torch_func():
        if wanted == "auto":
            notice("inside torch.func's transforms (grad, vmap, jvp, ...) the ops run on plain PyTorch: " + TORCH_FUNC)
        candidates = (("kernels", lambda *_: TORCH_FUNC),)
    elif wanted == "auto" and (reason := replaced(*_CALLED[op])) is not None:
        candidates, reasons, say = (), [reason], notice
    elif wanted == "auto" and fastest is not None and (row := fastest(*args)) is not None:
        if row.use == "reference":
            candidates, reasons = (), [row.note]
        elif row.use != candidates[0][0]:
            for first in (*candidates, *own[op].items()):      # a loop: this is on the way of every call
                if first[0] == row.use:
                    candidates = (first, *candidates)
                    break
            else:
                notice(f"for {op}, {row.use} was measured to be fastest here, but no kernel of this name is registered in this process")
    elif wanted not in CHOICES:
        candidates = tuple(c for c in (*candidates, *own[op].items()) if c[0] == wanted)
    for name, why_not in candidates if wanted != "reference" else ():
        reason = why_not(*args)
        if reason is None and wanted == "auto" and name == "triton" and _interpreted:
            reason = "Triton's interpreter is for checking kernels and is slow; backend='fused' runs it"
        if reason is None:
            break
        if reason and f"{name}: {reason}" not in reasons:
            reasons.append(f"{name}: {reason}")
    else:
        name = "reference"
    if _local.record is not None:
        remark = [row.note] if row is not None and name == row.use != "reference" and row.note else []
        _local.record.append((op, wanted, name, ["asked for"] if wanted == "reference" else remark or reasons))
        return "reference"  # nothing is launched while recording
    if name != "reference" or wanted == "reference" or op in LIBRARY_OPS and wanted in CHOICES:
        return name
    if wanted == "fused":
        raise RuntimeError(f"backend='fused', but no kernel can run {op}: {'; '.join(reasons) or 'there is none'}. "
                           "Use backend='auto' to fall back, or `nanogpt-fast doctor` to see what is missing.")
    if wanted not in CHOICES:
        why = "it is not for this device or these arguments" if wanted in names(op) else "no kernel of this name is registered in this process"
        raise RuntimeError(f"backend='{op}={wanted}', but that cannot run: {'; '.join(reasons) or why}. Use backend='auto' to fall back.")
    if row is None or row.use != "reference" or not row.card:      # a row of this very card was measured to be the fastest: nothing is missed
        say(f"{op} runs on plain PyTorch ({'; '.join(reasons) or 'no kernel'})")
    return name


before_first_choice = []    # functions: ops/registered.py's, which runs files that register kernels
_tuned = False      # whether `load_local` ran to its end
_loading = False
_lock = threading.RLock()


def load_local():
    """Register the kernels of one's own that are named, and put what was measured on this machine into force: once per process, before the
    first choice. An error of such a file is raised again at the next choice; other threads wait."""
    global _tuned, _loading
    if _tuned:
        return
    with _lock:
        if _tuned or _loading:      # such a file may call ops itself
            return
        _loading = True
        try:
            from .tuning import saved
            for function in before_first_choice:
                function()
            for message in saved.load():
                notice(message)
            _tuned = True
        finally:
            _loading = False


load_local._dynamo_marked_constant = True       # see triton_import_error below


_transforms_active = torch._C._are_functorch_transforms_active      # in C: no Python on the way of a call without transforms
TORCH_FUNC = "the kernels have no rules for its transforms"


def inside_torch_func():
    """Whether a transform of torch.func is computing, whose tensors have no memory that a kernel could read."""
    return _transforms_active() and not torch.compiler.is_compiling()


@contextlib.contextmanager
def recording():
    """Inside the block ops record what they would choose, (op, wanted, name, reasons), and all run the reference."""
    before, _local.record = _local.record, []
    try:
        yield _local.record
    finally:
        _local.record = before


_noticed = set()


def notice(message):
    """Warn, once per process and message, that something runs slower than it could.

    Silent while torch.compile traces, since a warning would break the graph.
    """
    if torch.compiler.is_compiling() or message in _noticed:
        return
    _noticed.add(message)
    warnings.warn(f"nanogpt_fast: {message}", RuntimeWarning, stacklevel=3)


def notice_unfused(message):
    """`notice`, but only if a kernel could have run. Without a GPU nobody expects one; `explain` and `doctor` still report it."""
    if torch.cuda.is_available() or _interpreted:
        notice(message)


_import_error = "not tried"


def triton_import_error():
    """None if Triton can be imported, else the reason. Called only when a kernel could run: the import takes 0.2 s.

    Triton's interpreter computes on the raw bits of bf16 numbers; this call patches that before a kernel runs there.
    """
    global _import_error
    if _import_error == "not tried":
        try:
            import triton  # noqa: F401
            _import_error = None
            if _interpreted:
                from .kernels import interpreter
                _import_error = interpreter.interpreter_problem()
                if _import_error is None:
                    interpreter.install_interpreter_patches()
        except Exception as error:  # a broken installation fails in many ways; the reason is kept and shown
            _import_error = f"Triton cannot be imported ({type(error).__name__}: {error}); pip install triton"
    return _import_error


# torch.compile then evaluates it once and treats the result as a constant, instead of tracing the import and warning about the cache.
# torch.compiler.assume_constant_result sets only this mark, but also imports the compiler (1 s) into every program.
triton_import_error._dynamo_marked_constant = True


# Triton reads TRITON_INTERPRET when a kernel is decorated, so it cannot change within a process.
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")     # as triton.knobs reads it


def interpreted():
    """True if Triton kernels run in Triton's interpreter (on the CPU, for checking)."""
    return _interpreted


def wrapper(tensor):
    """The name of a tensor's class if it wraps other tensors, as a DTensor or a quantized weight does, and has no memory of its own; else None."""
    kind = type(tensor)
    return kind.__name__ if hasattr(kind, "__tensor_flatten__") else None


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))     # the usual ones: asking for these takes a tenth of the time


def triton_why_not(tensor, *others):
    """None if a Triton kernel can run on this tensor's device and read it and the others, each a tensor or None; else the reason."""
    for given in (tensor, *others):
        if type(given) not in _PLAIN and (name := wrapper(given)) is not None:
            return f"a tensor is a {name}, which wraps other tensors; a kernel reads memory, and it has none of its own"
    if tensor.is_cuda:
        if (capability := compute_capability(tensor.get_device())) < 80:
            return f"the GPU has compute capability {capability / 10}; the kernels need at least 8.0"
    elif not _interpreted:
        return f"Triton kernels need a CUDA tensor, this one is on {tensor.device.type}"
    return triton_import_error()


def compute_capability(device_index):
    """10 * major + minor of a CUDA device: 90 for 9.0."""
    return _compute_capability(device_index)


compute_capability._dynamo_marked_constant = True  # as above; Dynamo would not see the mark on the cached function


@functools.cache
def _compute_capability(device_index):
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor
