"""Sample one token per row of logits: temperature, top-k, top-p, min-p and the draw in one launch, the same token on every device.

The definition (csrc/sampler/definition.h is its C++ form, `sample_plain` below its PyTorch form; they agree bit for bit):

    temperature 0, or no value in the row above -inf: the largest value, at the lowest index among equals. Otherwise
    y = (x - max) / temperature     in fp32; NaN counts as -inf
    w = round(exp(y) * 2^40)        integers, so sums do not depend on their order
    top-k  keeps i when fewer than k values are strictly greater (ties with the k-th stay, as in nanoGPT)
    top-p  keeps i when the mass of the strictly greater values is less than p times the mass that top-k kept
    min-p  keeps i when y >= ln(min_p), applied last
    draw   a 64-bit Philox number from (seed, offset), scaled to the kept mass, falls into one token's interval (ascending index)

So a row's token depends only on its logits, parameters, seed and offset: not on the rest of the batch, the number of threads or
the instruction set. nanoGPT's five calls (divide, topk, mask, softmax, multinomial) do the same work in eight launches, and
`torch.multinomial` waits for the GPU.

Sources: nucleus sampling, Holtzman et al. 2020, section 3.1; min-p, Nguyen et al. 2024; Philox, Salmon et al. 2011.
"""
import functools
import math
import numbers

import torch
from torch import Tensor

from .. import backend as _backend
from ..kernels import fastest
from . import extension
from .common import Backend, resolved
from .extension import address
from .registration import register_fake

PerRow = float | int | list | Tensor | None    # one value, or one for each row
MAX_VOCAB = 262144
LOGIT_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---------------------------------------------------------------- public

def sample(logits: Tensor, *, temperature: PerRow = 1.0, top_k: PerRow = None, top_p: PerRow = None, min_p: PerRow = None,
           seed: int | Tensor | None = None, offset: int | Tensor | None = None, backend: Backend = None) -> Tensor:
    """Draw one token per row. logits (B, V), fp32, bf16 or fp16, V up to 262,144 -> (B,) int64.

    temperature: 0 is greedy.  top_k: at least 1, clamped to V.  top_p, min_p: 0 to 1.  None, or top_k of 0, turns a filter off. Each is a
    number, or a list or tensor (B,) with one value per row.
    seed: an int (row b draws with seed + b), or an int64 tensor (B,) on the logits' device; None draws seeds from torch's
    generator, so that `torch.manual_seed` controls them.
    offset: a row's position in the random stream of its seed: an int, or an int64 tensor (B,), which the call increments.

    Raises ValueError, naming the argument and the row; on a CPU also for a row of logits that has NaN or +inf, or nothing above -inf,
    where nanoGPT's torch.multinomial raises (10 us for a row of GPT-2's vocabulary). On a GPU looking at them would make the host wait, as
    it does where a parameter is a CUDA tensor; there such a row follows the definition, and `generate` checks when it reads the tokens.
    `sample_out` never waits. Backends: "cpp" (the extension, CPU and CUDA) or "reference" (`sample_plain`); both give the same tokens.
    """
    _check_logits(logits)
    B, device = logits.size(0), logits.device
    logits, = resolved(logits.detach() if logits.requires_grad else logits)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    parameters = _parameters(temperature, top_k, top_p, min_p, B, device)
    if seed is None:
        seed = torch.randint(-2**63, 2**63 - 1, (B,), device=device)
    elif not isinstance(seed, torch.Tensor):
        seed = torch.full((B,), _signed("seed", seed), device=device)
        if B > 1:
            seed += torch.arange(B, device=device)
    if not isinstance(offset, torch.Tensor):
        offset = torch.full((B,), _signed("offset", 0 if offset is None else offset), device=device)
    _check_rows("seed", seed, B, device)
    _check_rows("offset", offset, B, device)
    out = torch.empty(B, dtype=torch.int64, device=device)
    _call(logits, parameters, seed, offset, out, True, backend)
    return out


def sample_out(logits: Tensor, *, out: Tensor, seed: Tensor, offset: Tensor, temperature: PerRow = 1.0, top_k: PerRow = None, top_p: PerRow = None,
               min_p: PerRow = None, backend: Backend = None) -> None:
    """`sample` for a captured CUDA graph: writes the tokens to `out`, increments `offset`, and returns nothing.

    logits (B, V) with a contiguous last dimension; out, seed, offset (B,) int64, contiguous, on the logits' device.
    temperature, top_p, min_p: a number, or a contiguous fp32 tensor (B,); top_k: an int, or a contiguous int64 tensor (B,). The kernel
    itself reads the tensors, so a replay sees their new values. With the extension this is one launch, without allocation or waiting
    for the GPU. Hence values inside tensors are not checked. An invalid parameter turns its filter off: temperature not above 0 is greedy;
    top_k below 1, top_p of 1 and min_p of 0 are off. NaN among the logits counts as -inf, on every device.

    Without the extension, a few dozen PyTorch launches, which can be captured as well, give the same tokens.
    """
    parameters = _check_out(logits, out, seed, offset, temperature, top_k, top_p, min_p)
    _call(logits.detach(), parameters, seed, offset, out, False, backend)


def prepare(logits, *, out, seed, offset, temperature=1.0, top_k=None, top_p=None, min_p=None, backend=None):
    """Check the arguments of `sample_out` once; returns a function without arguments that draws from the tensors' current values.

    For a loop over the same tensors on a CPU: sampling a row of GPT-2's vocabulary takes the extension 30 us, and querying the tensors'
    shapes, dtypes, devices and addresses takes as long again. Arguments and errors are those of `sample_out`.
    """
    parameters = _check_out(logits, out, seed, offset, temperature, top_k, top_p, min_p)
    if logits.is_cpu and implementation(logits, backend=backend) == "cpp":
        tensors = (logits, parameters, seed, offset, out)
        batch = extension._C.Batch(*_addresses(*tensors))
        return functools.partial(_draw_prepared, batch, tensors)                        # keeps the tensors alive
    return functools.partial(sample_out, logits, out=out, seed=seed, offset=offset, temperature=temperature, top_k=top_k, top_p=top_p,
                             min_p=min_p, backend=backend)


def sample_probs(logits: Tensor, *, temperature: PerRow = 1.0, top_k: PerRow = None, top_p: PerRow = None, min_p: PerRow = None) -> Tensor:
    """The distribution that `sample` draws from: (B, V) fp32, each row summing to 1. The same arguments. For checks, not for speed. A row
    with NaN or infinity follows the definition, and raises nothing.
    """
    _check_logits(logits)
    parameters = _parameters(temperature, top_k, top_p, min_p, logits.size(0), logits.device)
    _check_values(parameters)
    weight = _kept_weights(logits.detach(), parameters)
    return (weight.double() / weight.sum(-1, keepdim=True)).float()


# ---------------------------------------------------------------- arguments

_LARGEST = 3.4028234e38  # the largest fp32 number
# name: (lowest value, highest, the one that turns the filter off, what an error message says is expected)
_RULES = {
    "temperature": (0.0, _LARGEST, 1.0, "a finite number, at least 0 (0 is greedy)"),
    "top_k": (0, 2**63 - 1, 0, "an integer, at least 1 (0 or None turns top-k off)"),
    "top_p": (0.0, 1.0, 1.0, "a number from 0 to 1 (None turns top-p off)"),
    "min_p": (0.0, 1.0, 0.0, "a number from 0 to 1 (None turns min-p off)"),
}


def _rows_dtype(name):
    return torch.int64 if name == "top_k" else torch.float32


def _check_logits(logits):
    if not isinstance(logits, torch.Tensor) or logits.dtype not in LOGIT_TYPES:
        raise ValueError(f"logits is {getattr(logits, 'dtype', type(logits))}; expected a tensor of float32, bfloat16 or float16")
    if (name := _backend.wrapper(logits)) is not None:
        raise ValueError(f"logits is a {name}, which wraps other tensors; expected a plain one (of a DTensor, logits.full_tensor())")
    if logits.dim() != 2 or not 1 <= logits.size(1) <= MAX_VOCAB:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (B, V) with V from 1 to {MAX_VOCAB}")


def _check_rows(name, tensor, B, device):
    """Raise ValueError unless this is an int64 tensor (B,) that the extension can read and write by address."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.int64 or tensor.shape != (B,):
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {found}; expected an int64 tensor of shape ({B},), one per row")
    _refuse_negative(name, tensor)
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} is on {tensor.device} with strides {tuple(tensor.stride())}; "
                         f"expected it contiguous on the logits' device, {device}")


def _refuse_negative(name, tensor):
    """Raise ValueError for a tensor that is negative lazily: its memory, which is read by address and never copied, has other numbers."""
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name} is a view that is negative lazily (is_neg() is True); expected {name}.resolve_neg()")


def _signed(name, value):
    """A 64-bit integer, signed or unsigned, as the int64 of the same bits."""
    value = _plain_number(value)
    if not isinstance(value, int) or not -2**63 <= value < 2**64:
        raise ValueError(f"{name} is {value!r}; expected None, a 64-bit integer or an int64 tensor (B,)")
    return value - 2**64 if value >= 2**63 else value


def _plain_number(value):
    """NumPy's numbers as Python's, anything else as it is."""
    if isinstance(value, (int, float, torch.Tensor)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _check_out(logits, out, seed, offset, temperature, top_k, top_p, min_p):
    """Check the arguments of `sample_out`, which never copies a tensor; returns its parameters."""
    _check_logits(logits)
    if logits.stride(1) != 1:
        raise ValueError(f"logits has strides {tuple(logits.stride())}; the last dimension must be contiguous")
    _refuse_negative("logits", logits)
    B, device = logits.size(0), logits.device
    parameters = _parameters(temperature, top_k, top_p, min_p, B, device, no_copy=True)
    for name, tensor in (("seed", seed), ("offset", offset), ("out", out)):
        _check_rows(name, tensor, B, device)
    return parameters


def _parameters(temperature, top_k, top_p, min_p, B, device, no_copy=False):
    """((rows, number) of temperature, of top_k, of top_p, of min_p); see `_parameter`."""
    # Fast path (1 us): nearly every call passes plain numbers or None. `_parameter` handles everything else.
    if type(temperature) is float and 0.0 <= temperature <= _LARGEST and (top_k is None or type(top_k) is int and 1 <= top_k < 2**63) \
            and (top_p is None or type(top_p) is float and 0.0 <= top_p <= 1.0) \
            and (min_p is None or type(min_p) is float and 0.0 <= min_p <= 1.0):
        return (None, temperature), (None, top_k or 0), (None, 1.0 if top_p is None else top_p), (None, min_p or 0.0)
    return tuple(_parameter(name, value, B, device, no_copy) for name, value in
                 (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)))


def _parameter(name, value, B, device, no_copy=False):
    """(rows, number): a tensor (B,) with a value per row and the neutral number, or None and one number for all rows.

    no_copy: a tensor must already have the dtype and layout that the launch reads, since a copy would not see new values.
    """
    low, high, off, expected = _RULES[name]
    if value is None and name != "temperature":
        return None, off
    value = _plain_number(value)
    kinds = int if name == "top_k" else (int, float)
    if isinstance(value, kinds) and low <= value <= high and value is not True:
        return None, value if name == "top_k" else float(value)
    if isinstance(value, (list, tuple)) and not no_copy:
        try:
            value = torch.tensor(value, dtype=_rows_dtype(name), device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is {value!r}; each row's must be {expected}") from error
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    if value.shape != (B,) or value.device != device:
        raise ValueError(f"{name} has shape {tuple(value.shape)} on {value.device}; expected ({B},) on {device}, the logits' device")
    if value.is_floating_point() == (name == "top_k") or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} is a tensor of {value.dtype}; each row's must be {expected}")
    if no_copy and (value.dtype != _rows_dtype(name) or not value.is_contiguous()):
        raise ValueError(f"{name} is {value.dtype} with strides {tuple(value.stride())}; expected a contiguous tensor of {_rows_dtype(name)}")
    if no_copy:
        _refuse_negative(name, value)
    return resolved(value.to(_rows_dtype(name)).contiguous())[0], off


def _check_values(parameters):
    """Raise ValueError for the first row whose parameter is out of range. Reads the tensors."""
    for (name, (low, high, _, expected)), (rows, _) in zip(_RULES.items(), parameters):
        if rows is None:
            continue
        wrong = ~((rows >= low) & (rows <= high))                                       # true for NaN, too
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"{name} of row {row} is {rows[row].item()}; expected {expected}")


def _check_finite(logits):
    """Raise ValueError for the first row on a CPU from which no token can be drawn. A row's largest value is NaN if one of them is."""
    if not logits.is_cpu:
        return
    largest = logits.amax(-1)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0])
        found = {True: "NaN", False: "+inf" if largest[row] > 0 else "nothing above -inf"}[bool(largest[row].isnan())]
        raise ValueError(f"logits of row {row} hold {found}; expected finite numbers, or -inf for tokens that must not be drawn. The model's "
                         "weights hold NaN or infinity, or the dtype is too small for its numbers (float16: try bfloat16 or float32)")


# ---------------------------------------------------------------- dispatch

def why_not(logits):
    """None if the extension can sample from these logits, else the reason."""
    if extension._C is None:
        return extension.missing()
    if logits.is_cpu:
        return None
    if logits.device.type != "cuda":
        return f"the extension samples on CPU and CUDA, these logits are on {logits.device.type}"
    return extension.cuda_why_not(torch.cuda.current_device() if logits.device.index is None else logits.device.index)


def row_for(logits):
    """The Row of the table (kernels/fastest.py) for these arguments, or None."""
    return fastest.find("sample", fastest.device_number(logits), size=logits.size(1), tokens=logits.size(0))


CANDIDATES = (("cpp", why_not),)


def implementation(logits, *, backend=None):
    """The name of the implementation that `sample` uses for these logits ("cpp", "reference")."""
    return _backend.choose("sample", CANDIDATES, backend, (logits,), row_for)


def _call(logits, parameters, seed, offset, out, check, backend):
    """Call the launcher directly, or the registered op while torch.compile traces. The op chooses when it runs: tracing cannot call _C."""
    if torch.compiler.is_compiling():
        flat = [part for pair in parameters for part in pair]
        torch.ops.nanogpt_fast.sample(logits, *flat, seed, offset, out, check, _backend.choice("sample", backend))
    else:
        _launch(logits, parameters, seed, offset, out, check, backend)


def _launch(logits, parameters, seed, offset, out, check, backend):
    if check:
        _check_finite(logits)
        _check_values(parameters)
    if _backend.choose("sample", CANDIDATES, backend, (logits,), row_for) == "reference":
        out.copy_(sample_plain(logits, parameters, seed, offset))
        offset.add_(1)
        return
    arguments = _addresses(logits, parameters, seed, offset, out)
    if logits.is_cuda:
        extension._C.sample_cuda(*arguments, logits.device.index, torch.cuda.current_stream(logits.device).cuda_stream)
    else:
        extension._C.sample_cpu(*arguments, torch.get_num_threads(), "")


def _run(logits, temperature_rows, temperature, top_k_rows, top_k, top_p_rows, top_p, min_p_rows, min_p, seed, offset, out, check, choice):
    parameters = ((temperature_rows, temperature), (top_k_rows, top_k), (top_p_rows, top_p), (min_p_rows, min_p))
    _launch(logits, parameters, seed, offset, out, check, {"sample": choice})


def _addresses(logits, parameters, seed, offset, out):
    """The arguments that describe the batch to the extension."""
    (temperatures, temperature), (top_ks, top_k), (top_ps, top_p), (min_ps, min_p) = parameters
    return (logits.data_ptr(), LOGIT_TYPES[logits.dtype], *logits.shape, logits.stride(0), address(temperatures), temperature,
            address(top_ks), top_k, address(top_ps), top_p, address(min_ps), min_p, seed.data_ptr(), offset.data_ptr(), out.data_ptr())


def _draw_prepared(batch, tensors):
    batch.sample_cpu(torch.get_num_threads())


_library = torch.library.Library("nanogpt_fast", "FRAGMENT")
_library.define("sample(Tensor logits, Tensor? temperature_rows, float temperature, Tensor? top_k_rows, int top_k, Tensor? top_p_rows, "
                "float top_p, Tensor? min_p_rows, float min_p, Tensor seed, Tensor(a!) offset, Tensor(b!) out, bool check, str choice) -> ()")
_library.impl("sample", _run, "CPU")
_library.impl("sample", _run, "CUDA")
register_fake("sample", lambda *arguments: None)


# ---------------------------------------------------------------- the definition in PyTorch
#
# Runs eagerly even inside a compiled graph, since the op above hides it: a compiler that turned `p * r + c` into a fused
# multiply-add would change weights, and with them tokens.

def sample_plain(logits, parameters, seed, offset):
    """`sample` without the extension: the same tokens, from PyTorch's operators, without waiting for a GPU. Does not change `offset`."""
    cumulative = _kept_weights(logits, parameters).cumsum(-1)                           # (B, V) int64
    r = _high_product(_philox(seed, offset), cumulative[:, -1])                         # (B,)
    return (cumulative <= r[:, None]).sum(-1)                                           # the number of intervals that end at or before r


def _kept_weights(logits, parameters):
    """(B, V) int64: each token's weight after the filters; 0 if it was dropped."""
    B, V = logits.shape
    temperature, k, p, m = (torch.full((B, 1), number, dtype=_rows_dtype(name), device=logits.device) if rows is None else rows[:, None]
                            for name, (rows, number) in zip(_RULES, parameters))
    x = logits.float()
    key = _ordered_key(x)                                                               # (B, V) int32
    top = key.amax(-1, keepdim=True)
    largest = torch.where(x.isnan(), -math.inf, x).amax(-1, keepdim=True)               # (B, 1)
    y = torch.where(x == largest, 0.0, (x - largest) / torch.where(temperature > 0, temperature, 1.0))
    weight = _weight(y)

    rank = torch.where((k > 0) & (k < V), k, V)
    descending, order = key.sort(-1, descending=True)
    kept = key >= descending.gather(-1, rank - 1)

    # In sorted order the nucleus is a prefix: tokens whose preceding mass is less than p times the kept mass. Ties with the last one stay.
    weight_descending = torch.where(kept, weight, 0).gather(-1, order)
    before = weight_descending.cumsum(-1) - weight_descending
    nucleus = _nucleus_mass(p.clamp(0, 1), weight_descending.sum(-1, keepdim=True))
    size = (before < nucleus).sum(-1, keepdim=True)
    kept &= (key >= descending.gather(-1, size - 1)) | ~(p < 1)

    kept &= (y >= m.double().log().float().clamp(max=0)) | ~(m > 0)
    weight = torch.where(kept, weight, 0)

    single = ~(temperature > 0) | (largest == -math.inf)                                # (B, 1): the largest key at its lowest index
    first = torch.arange(V, device=key.device) == (key == top).int().argmax(-1, keepdim=True)
    return torch.where(single, first.long(), weight)


def _ordered_key(x):
    """int32 keys in the order of the fp32 values; -0 equals 0, NaN is below -inf."""
    bits = x.view(torch.int32)
    key = torch.where(bits < 0, bits ^ 0x7fffffff, bits)
    return torch.where(x.isnan(), -2**31, torch.where(x == 0, 0, key)).int()


def _weight(y):
    """round(exp(y) * 2^40) for y <= 0: weight_of in definition.h, operation by operation."""
    y = torch.where(y > -29, y, -29.0)
    n = (y * 1.44269504 + 12582912.0) - 12582912.0                                      # the integer nearest to y / ln 2
    r = (y + n * -0.693359375) + n * 2.12194440e-4
    p = torch.full_like(r, 0.00138145988)
    for coefficient in (0.00836871658, 0.0416683890, 0.166665211, 0.499999940, 1.0, 1.0):
        p = p * r + coefficient
    scale = ((n.int() + (127 + 40)) << 23).view(torch.float32)                          # 2^(n + 40)
    return (p * scale).double().round().long()


_LOW = 0xffffffff


def _nucleus_mass(p, total):
    """ceil(p * total) with p in units of 2^-32, at least 1. Exact in int64: p is split into halves, since low * p may exceed 2^63."""
    p = (p.double() * 2**32).long()
    low = total & _LOW
    upper, lower = low * (p >> 16), low * (p & 0xffff)                                  # each below 2^48
    rounded = (upper >> 16) + ((((upper & 0xffff) << 16) + lower + _LOW) >> 32)         # ceil(low * p / 2^32)
    return (p * (total >> 32) + rounded).clamp(min=1)


def _high(x):
    """The upper 32 of 64 bits, read as unsigned."""
    return (x >> 32) & _LOW


def _high_product(a, b):
    """The upper 64 of the 128 bits of a * b, both read as unsigned."""
    a_low, a_high, b_low, b_high = a & _LOW, _high(a), b & _LOW, _high(b)
    middle = a_high * b_low + _high(a_low * b_low)
    return a_high * b_high + _high(middle) + _high(a_low * b_high + (middle & _LOW))


def _philox(seed, offset):
    """The first two words of Philox-4x32-10 with key `seed` and counter `offset`, as one int64 with all bits random."""
    c0, c1, c2, c3 = offset & _LOW, _high(offset), torch.zeros_like(offset), torch.zeros_like(offset)
    k0, k1 = seed & _LOW, _high(seed)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & _LOW, _high(a) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return (c1 << 32) | c0
