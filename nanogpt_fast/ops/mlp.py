"""The GELU MLP as one op: two matmuls with bias, activation and dropout, their gradients, and what is saved for the backward.

    y = dropout(act(x w_fc^T + b_fc) w_proj^T + b_proj)

The op has three forms, which differ in where the activation is computed: "epilogue", inside the matmul that produces its input;
"pointwise", in a separate kernel after cuBLAS (kernels/mlp.py gives the memory traffic of both); "hopper", in the epilogue of a CUDA
kernel for Hopper's tensor cores (hopper/mlp.py). cuBLAS runs the other matmuls. Every form keeps, per token in half precision,
x (2C bytes), h before the activation (8C) and post after it (8C); with `recompute=True` the backward recomputes post instead.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend as _backend, reference
from ..kernels import fastest
from . import linear, registered
from .common import KERNEL_DTYPES, Backend, autocast_dtype, dropout_seed, no_autocast, no_second_derivative, resolved
from .cpu import linear as _cpu_linear
from .hopper import mlp as _hopper
from .registration import define, raw

# The rows "mlp forward" and "mlp backward" of kernels/fastest.json say which form runs, or those that `nanogpt-fast tune` measured; where
# there is none, the pointwise form. H100, C = 768, us forward and backward (docs/gpu.md has the sizes in between):
#    65,536 rows: hopper 544 and 567, pointwise 698 and 874, epilogue's backward 824
#     2,048 rows: hopper 25 and 31, pointwise 29 and 36, epilogue's backward 37
# Fewer rows were not timed.

FORMS = ("epilogue", "pointwise", "hopper")


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, *, activation: str = "gelu",
             dropout_p: float = 0.0, recompute: bool = False, form: str | None = None, backend: Backend = None,
             copies: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """dropout(act(x w_fc^T + b_fc) w_proj^T + b_proj) -> (..., C), in the autocast dtype if autocast is on, else in x's.

    x (..., C), w_fc (F, C), w_proj (C, F), floating point; b_fc (F,), b_proj (C,), or None. F is 4C in a GPT.
    activation: "gelu" (erf), "gelu_tanh", "relu". dropout_p: 0 when not training; the mask's seed comes from the generator of
    x's device. recompute: keep 10C instead of 18C bytes per token for the backward (half precision), which then recomputes post.
    form: "epilogue", "pointwise" or "hopper" forces where the kernels compute the activation; None picks the one measured faster.
    backend: as in ops/__init__.py. copies: both weights in the compute dtype, if the caller keeps
    them (training/half_weights.py): they are used instead of casting, and the kernels do not round the weights' gradients to that dtype.

    Raises ValueError (shapes, options), RuntimeError (backend "fused" and no kernel can run; a second derivative, which only
    the reference has). Source: kernels/mlp.py.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}, or None for the faster one")
    _check_shapes(x, w_fc, b_fc, w_proj, b_proj)
    if not is_compiling() and (x.is_neg() or w_fc.is_neg() or w_proj.is_neg() or b_fc is not None and b_fc.is_neg()
                               or b_proj is not None and b_proj.is_neg()):
        x, w_fc, b_fc, w_proj, b_proj = resolved(x, w_fc, b_fc, w_proj, b_proj)
    name = _backend.choose("mlp", CANDIDATES, backend, (x, w_fc, b_fc, w_proj, b_proj, copies), row_for)
    if name == "reference":
        if copies is not None:
            w_fc, w_proj = linear.cast(w_fc, copies[0]), linear.cast(w_proj, copies[1])
        return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, activation_name=activation, dropout_p=dropout_p)
    if name == "cpp":
        h = linear.linear(x, w_fc, b_fc, copy=copies[0], backend=backend)
        y = linear.linear(reference.activation(h, activation), w_proj, b_proj, copy=copies[1], backend=backend)
        return F.dropout(y, dropout_p) if dropout_p > 0 else y
    if name != "triton" and (kernel := registered.kernel("mlp", name)) is not None:
        return registered.mlp(kernel, x, w_fc, b_fc, w_proj, b_proj, activation, dropout_p)
    if form == "hopper" and (reason := _hopper_why_not(x, w_fc, activation)) is not None:
        raise RuntimeError(f"form is 'hopper', but {reason}")
    forms = (form, form) if form else _faster_forms(x, w_fc, b_fc, activation)
    return _GeluMLP.apply(x, w_fc, b_fc, w_proj, b_proj, (activation, dropout_p, recompute, forms, torch.is_grad_enabled(), copies))


def implementation(x, w_fc, b_fc, w_proj, b_proj, *, backend=None):
    """The name of the implementation that gelu_mlp uses for these arguments ("triton", "cpp", "reference")."""
    return _backend.choose("mlp", CANDIDATES, backend, (x, w_fc, b_fc, w_proj, b_proj), row_for)


def _triton_why_not(x, w_fc, b_fc, w_proj, b_proj, copies=None):
    if (reason := _backend.triton_why_not(x, w_fc, b_fc, w_proj, b_proj)) is not None:
        return reason
    device, dtype = x.device, x.dtype
    if dtype not in KERNEL_DTYPES:
        return f"x is {dtype}; the kernels take float32, float16 and bfloat16"
    for name, t in (("w_fc", w_fc), ("b_fc", b_fc), ("w_proj", w_proj), ("b_proj", b_proj)):
        if t is None or t.dtype == dtype and t.device == device:
            continue
        if t.device != device:
            return f"x is on {device}, {name} on {t.device}"
        if t.dtype not in KERNEL_DTYPES:
            return f"{name} is {t.dtype}; the kernels take float32, float16 and bfloat16"
        if not torch.is_autocast_enabled(device.type):
            return f"x is {dtype}, {name} {t.dtype} and autocast is off"        # the reference raises PyTorch's own error
    return None


def _cpp_why_not(x, w_fc, b_fc, w_proj, b_proj, copies=None):
    """None if the extension's GEMMs can run both matmuls, with PyTorch's activation in between; else the reason."""
    fc, proj = (None, None) if copies is None else copies
    reason = _cpu_linear.why_not(w_fc, fc)
    return _cpu_linear.why_not(w_proj, proj) if reason is None else reason


CANDIDATES = (("triton", _triton_why_not), ("cpp", _cpp_why_not))


def _check_shapes(x, w_fc, b_fc, w_proj, b_proj):
    shape = w_fc.shape
    if len(shape) != 2 or x.shape[-1:] != shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and w_fc {tuple(w_fc.shape)}: expected (..., C) and (F, C)")
    inner, C = shape
    if w_proj.shape != (C, inner):
        raise ValueError(f"w_proj {tuple(w_proj.shape)} and w_fc {tuple(w_fc.shape)}: expected (C, F) and (F, C)")
    if b_fc is not None and b_fc.shape != (inner,):
        raise ValueError(f"b_fc {tuple(b_fc.shape)}: expected ({inner},)")
    if b_proj is not None and b_proj.shape != (C,):
        raise ValueError(f"b_proj {tuple(b_proj.shape)}: expected ({C},)")


def _faster_forms(x, w_fc, b_fc, activation):
    """(form of the forward, form of the backward), from the table."""
    if not x.is_cuda:
        return "pointwise", "pointwise"
    C = x.size(-1)
    without = () if _hopper_why_not(x, w_fc, activation) is None else ("hopper",)
    return listed_forms(x.get_device(), fastest.column(autocast_dtype(x)), C, x.numel() // max(1, C), b_fc is not None, without)


def listed_forms(device, dtype, C, rows, bias, without):
    """`_faster_forms` for rows (rows, C) on a device number, in a column of the table. without: forms that cannot run."""
    row = fastest.find("mlp forward", device, dtype, size=C, tokens=rows, without=without)
    forward = "pointwise" if row is None else row.use
    if forward == "pointwise" and bias:
        without = ("hopper",)       # its backward needs h with its bias
    row = fastest.find("mlp backward", device, dtype, size=C, tokens=rows, without=without)
    return forward, "pointwise" if row is None else row.use


def row_for(x, w_fc, b_fc, w_proj, b_proj, copies=None):
    """The Row of the table (kernels/fastest.py) for these arguments, or None."""
    if fastest.nothing_for(x):
        return None
    C = x.size(-1)
    return fastest.find("mlp", fastest.device_number(x), fastest.column(autocast_dtype(x)), size=C, tokens=x.numel() // max(1, C))


def _hopper_why_not(x, w_fc, activation):
    return _hopper.why_not(x.device, autocast_dtype(x), x.size(-1), w_fc.size(0), activation)


def _operands(x, w_fc, w_proj, dropout_p, copies):
    """(rows of x, w_fc, w_proj, seed): in the compute dtype and the layout that the kernels need; the seed is None without dropout.

    Biases are not cast: the kernels add them in fp32. The checks avoid a `.to` that does nothing, which takes 0.7 us.
    """
    dtype = autocast_dtype(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
    if rows.dtype != dtype or rows.stride(1) != 1:
        rows = rows.to(dtype).contiguous()
    seed = dropout_seed(x, dropout_p) if dropout_p > 0 else None
    if copies is not None and copies[0].dtype == dtype:
        return rows, *copies, seed
    if w_fc.dtype != dtype or not w_fc.is_contiguous():
        w_fc = w_fc.to(dtype).contiguous()
    if w_proj.dtype != dtype or not w_proj.is_contiguous():
        w_proj = w_proj.to(dtype).contiguous()
    return rows, w_fc, w_proj, seed


class _GeluMLP(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, w_fc, b_fc, w_proj, b_proj, options):   # options is a tuple, since each argument of a Function costs 0.2 us
        activation, dropout_p, recompute, forms, grad_enabled, copies = options
        # Save only what the required gradients need. Under no_grad, needs_input_grad still reports what would require them.
        needs = ctx.needs_input_grad[:5] if grad_enabled else (False,) * 5
        rows, fc, proj, seed = _operands(x, w_fc, w_proj, dropout_p, copies)
        need_x, need_w_fc, need_b_fc, need_w_proj, _ = needs
        need_dh = need_x or need_w_fc or need_b_fc
        keep_h, keep_post = need_dh or need_w_proj and recompute, need_w_proj and not recompute
        run = raw.mlp_forward if is_compiling() else _forward
        y, h, post = run(rows, fc, b_fc, proj, b_proj, seed, activation, dropout_p, forms[0], keep_h, keep_post)
        ctx.save_for_backward(rows if need_w_fc else None, fc if need_x else None, b_fc, proj if need_dh else None,
                              h if keep_h else None, post if keep_post else None, seed)
        dtypes = (x.dtype, w_fc.dtype, None if b_fc is None else b_fc.dtype,
                  w_proj.dtype, None if b_proj is None else b_proj.dtype)
        weights = () if copies is None or is_compiling() else tuple(linear.in_place(w, copy) for w, copy in zip((w_fc, w_proj), copies))
        ctx.call = x.shape, dtypes, (activation, dropout_p, *forms), needs, weights
        return y if x.dim() == 2 else y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        no_second_derivative("gelu_mlp")
        rows, fc, b_fc, proj, h, post, seed = ctx.saved_tensors
        shape, dtypes, options, needs, weights = ctx.call
        dy, = resolved(dy)
        dy = dy.reshape(-1, dy.size(-1)).contiguous()       # the kernels need contiguous rows, but dy may be expanded or transposed
        run = raw.mlp_backward if is_compiling() else _backward
        with no_autocast(dy.device.type):
            gradients = run(dy, rows, fc, b_fc, proj, h, post, seed, *options, *needs, *weights)
            dx, *others = (gradient.to(dtype) if need and gradient is not None else None
                           for gradient, dtype, need in zip(gradients, dtypes, needs, strict=True))
        return dx if dx is None else dx.view(shape), *others, None


# --------------------------------------------------------------------------------------- matmuls and kernels, without autograd


def _kernels():
    from ..kernels import mlp  # imported lazily: Triton takes 0.2 s to import, and not every user runs a kernel
    return mlp


def _forward(x, w_fc, b_fc, w_proj, b_proj, seed, activation, dropout_p, form, keep_h, keep_post):
    """(y (M, C), h (M, F), post (M, F)); h and post are empty (0,) unless kept. h includes its bias if `_h_has_bias`."""
    kernels = _kernels()
    if activation == "relu" and b_fc is not None:
        b_fc = b_fc.to(x.dtype)                                     # PyTorch adds it in x's dtype
    if form == "hopper":
        post, h = _hopper.linear_act(x, w_fc, b_fc, activation=activation, keep_h=keep_h)
    elif form == "epilogue":
        post, h = kernels.linear_act(x, w_fc, b_fc, activation=activation, keep_h=keep_h)
    elif _h_has_bias(form, activation):
        h = F.linear(x, w_fc, b_fc)
        post = kernels.act(h, activation=activation)
    else:
        h = x @ w_fc.t()
        post = kernels.act(h, b_fc, activation=activation)
    if dropout_p == 0:
        y = F.linear(post, w_proj, None if b_proj is None else b_proj.to(post.dtype))       # cuBLAS adds a bias at no cost
    elif form == "epilogue":
        y, _ = kernels.linear_act(post, w_proj, b_proj, activation="none", keep_h=False, dropout_p=dropout_p, seed=seed)
    else:
        y = kernels.act(post @ w_proj.t(), b_proj, activation="none", dropout_p=dropout_p, seed=seed)
    return y, h if keep_h else x.new_empty(0), post if keep_post else x.new_empty(0)


def _h_has_bias(form, activation):
    """Whether the forward saves h with its bias added.

    The pointwise kernel adds the bias to a rounded h in fp32. The sum is more accurate than PyTorch's rounded one but may differ from
    it in sign, and ReLU would then pass other units than PyTorch's. For ReLU, PyTorch therefore computes h with its bias.
    """
    return form != "pointwise" or activation == "relu"


def _backward(dy, x, w_fc, b_fc, w_proj, h, post, seed, activation, dropout_p, forward_form, backward_form,
              need_x, need_w_fc, need_b_fc, need_w_proj, need_b_proj, sum_fc=None, sum_proj=None):
    """Gradients of x (M, C) and of the parameters, the latter in fp32. Empty (0,) where not needed.

    x is needed for w_fc's gradient, post or h for w_proj's, the rest for those of x, w_fc and b_fc; otherwise they may be None.
    sum_fc, sum_proj: as `linear.weight_gradient`'s weight; None for a gradient that was added in place.
    """
    kernels = _kernels()
    dx, dw_fc, db_fc, dw_proj, db_proj = (dy.new_empty(0) for _ in range(5))
    if dropout_p > 0:
        dy, _, sums = kernels.dact(dy, activation="none", dropout_p=dropout_p, seed=seed, want_db=need_b_proj)
    elif need_b_proj:
        _, _, sums = kernels.dact(dy, activation="none", want_dh=False)
    if need_b_proj:
        db_proj = sums
    bias = None if _h_has_bias(forward_form, activation) else b_fc
    need_post = need_w_proj and post is None
    if need_x or need_w_fc or need_b_fc:
        if backward_form == "hopper":       # the forward had the same form, so h has its bias
            dh, sums = _hopper.linear_dact(dy, w_proj, h, activation=activation, want_db=need_b_fc)
            again = kernels.act(h, activation=activation) if need_post else None
        elif backward_form == "epilogue":
            dh, again, sums = kernels.linear_dact(dy, w_proj, h, bias, activation=activation,
                                                  want_post=need_post, want_db=need_b_fc)
        else:
            dh, again, sums = kernels.dact(dy @ w_proj, h, bias, activation=activation, want_post=need_post, want_db=need_b_fc)
        post = again if need_post else post
        db_fc = sums if need_b_fc else db_fc
        if need_x:
            dx = dh @ w_fc
        if need_w_fc:
            dw_fc = linear.weight_gradient(dh, x, sum_fc)
    elif need_post:
        post = kernels.act(h, bias, activation=activation)
    if need_w_proj:
        dw_proj = linear.weight_gradient(dy, post, sum_proj)
    return dx, dw_fc, db_fc, dw_proj, db_proj


# -------------------------------------------------------------------------------------------------- what torch.compile sees

def _fake_forward(x, w_fc, b_fc, w_proj, b_proj, seed, activation, dropout_p, form, keep_h, keep_post):
    inner = (x.size(0), w_fc.size(0))
    return x.new_empty(x.shape), x.new_empty(inner if keep_h else 0), x.new_empty(inner if keep_post else 0)


def _fake_backward(dy, x, w_fc, b_fc, w_proj, h, post, seed, activation, dropout_p, forward_form, backward_form,
                   need_x, need_w_fc, need_b_fc, need_w_proj, need_b_proj):
    def gradient(needed, *shape, dtype=torch.float32):
        return dy.new_empty(shape, dtype=dtype) if needed else dy.new_empty(0)
    inner = next((t.size(1) for t in (h, post) if t is not None), 0)
    C = dy.size(1)
    return (gradient(need_x, *dy.shape, dtype=dy.dtype), gradient(need_w_fc, inner, C), gradient(need_b_fc, inner),
            gradient(need_w_proj, C, inner), gradient(need_b_proj, C))


define("mlp_forward(Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? b_proj, Tensor? seed, str activation, "
       "float dropout_p, str form, bool keep_h, bool keep_post) -> (Tensor, Tensor, Tensor)",
       lambda *args: _forward(*args), _fake_forward)
define("mlp_backward(Tensor dy, Tensor? x, Tensor? w_fc, Tensor? b_fc, Tensor? w_proj, Tensor? h, Tensor? post, Tensor? seed, "
       "str activation, float dropout_p, str forward_form, str backward_form, bool need_x, bool need_w_fc, bool need_b_fc, "
       "bool need_w_proj, bool need_b_proj) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
       lambda *args: _backward(*args), _fake_backward)
