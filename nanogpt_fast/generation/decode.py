"""Decode one token per row through a whole GPT: what `generate` does between two draws.

Every weight is read once, for one multiply-add per row, so memory bandwidth is the limit. On a GPU, up to 16 rows take five Triton
kernels per layer: those of kernels/decode.py or kernels/decode_rows.py. On a CPU it is one call of the extension
(csrc/decode/decode.h). The session holds weights and cache; this file passes them on, or gives the reason why it can't.
"""
import torch

from .. import backend as _backend
from ..kernels import fastest
from ..ops import extension
from ..ops.common import KERNEL_DTYPES
from ..ops.extension import address

MAX_ROWS = 16  # csrc/decode/decode.h; with more rows PyTorch's matmuls are as fast
# Time of a step in us: GPT-2 124M in bf16 at position 640 on an H100 80GB HBM3, PyTorch 2.11, Triton 3.6, a captured graph
# (python -m benchmarks.gpu.decode_forms). In decode_rows.py, 3 to 16 rows share a tile of 8 or 16 rows.
#
#   rows                                            1      4      8     16     32     64
#   kernels/decode.py, reads weights per row      241    480    847
#   kernels/decode_rows.py, on tensor cores              364    406    533    900  1,388
#   the step made of ops                          559    587    592    730    879  1,178
#
# 2 and 3 rows lie in between: about 320 and 400 us with decode.py, 350 and 360 with decode_rows.py. Tensor cores need half precision.
# So say the rows "decode form" of kernels/fastest.json, and those that `nanogpt-fast tune` measured.
MAX_ROWS_MATVEC = 4                 # of decode.py, if tensor cores cannot be used
MAX_ROWS_TENSOR_CORES = 16          # of decode_rows.py
LARGEST_C_TENSOR_CORES = 2048
LARGEST_K = 8192  # inputs of a matrix (kernels/decode.py)
LARGEST_HEAD = 256
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MISSING = extension.lacks("Decoder")


def decoder(session):
    """The native decoder of a generation.Session, or None to build the step from ops. It holds addresses: keep the session alive."""
    device = session.device.type
    if device not in ("cpu", "cuda") or device == "cuda" and form(session) == "ops":
        return None  # nothing to warn about: with many rows the ops, which are kernels too, are faster
    name = _backend.choose("decode", CANDIDATES, session.choices, (session,), row_for)
    if name == "reference":
        return None
    if name == "triton":
        from ..kernels import decode as kernels, decode_rows
        layers = [kernels.Layer(layer.ln_1, layer.c_attn, layer.c_proj, layer.ln_2, layer.c_fc, layer.mlp_proj,
                                *session.cache[i], layer.activation) for i, layer in enumerate(session.layers)]
        kind = decode_rows.RowsDecoder if form(session) == "tensor cores" else kernels.Decoder
        return kind(session.wte, session.wpe, session.ln_f, session.head, layers)
    layers = []
    for i, layer in enumerate(session.layers):
        tensors = (*layer.ln_1, *layer.ln_2, *layer.c_attn, *layer.c_proj, *layer.c_fc, *layer.mlp_proj, *session.cache[i])
        layers.append([address(tensor) for tensor in tensors])
    return extension._C.Decoder(rows=session.rows, width=session.wte.size(1), heads=session.n_head, context=session.block_size,
                             vocab=session.wte.size(0), type=_TYPES[session.dtype], activation=session.activation,
                             wte=session.wte.data_ptr(), wpe=session.wpe.data_ptr(), ln_f=[address(t) for t in session.ln_f],
                             head=[address(t) for t in session.head], layers=layers)


def step(native, token, position, vocab, isa="", out=None):
    """Process token (rows,) int64 at position (rows,) int64 -> logits (rows, vocab) fp32.

    On a CPU: isa, the instruction set ("" is the best); out, where to write the logits.
    """
    if MISSING is not None or not isinstance(native, extension._C.Decoder):
        return native(token, position)
    logits = token.new_empty((token.size(0), vocab), dtype=torch.float32) if out is None else out
    native.step(token.data_ptr(), position.data_ptr(), logits.data_ptr(), torch.get_num_threads(), isa)
    return logits


def form(session):
    """Who decodes on a GPU: "matvec" (kernels/decode.py), "tensor cores" (kernels/decode_rows.py) or "ops"."""
    without = () if tensor_cores_serve(session) else ("tensor cores",)
    row = fastest.find("decode form", session.wte.get_device(), fastest.column(session.dtype), size=session.wte.size(1), tokens=session.rows,
                       without=without)
    return "ops" if row is None or session.rows > max_rows_triton(session) else row.use


def tensor_cores_serve(session):
    """True if kernels/decode_rows.py supports the session's width and dtype."""
    return session.dtype in (torch.float16, torch.bfloat16) and session.wte.size(1) <= LARGEST_C_TENSOR_CORES


def max_rows_triton(session):
    """The most rows that the Triton kernels take, from the table above."""
    return MAX_ROWS_TENSOR_CORES if tensor_cores_serve(session) else MAX_ROWS_MATVEC


def why_not_triton(session):
    """None if the Triton kernels can decode this session, else the reason."""
    if (reason := _backend.triton_why_not(session.wte)) is not None:
        return reason
    if session.dtype not in KERNEL_DTYPES:
        return f"weights are {session.dtype}; the kernels take float32, float16 and bfloat16"
    if not 1 <= session.rows <= (most := max_rows_triton(session)):
        return f"{session.rows} rows; the kernels take up to {most} of this width and dtype, with more rows library matmuls are faster"
    if not session.layers:
        return "the model has no layers"
    C, H = session.wte.size(1), session.n_head
    if len(widths := {layer.c_fc[0].size(0) for layer in session.layers}) > 1:
        return f"the MLPs have widths of {', '.join(map(str, sorted(widths)))}; the kernels take one for all blocks"
    if not all(_fits(layer, C, *widths) for layer in session.layers):
        return "the weights of a block do not fit each other"
    if not 1 <= (D := C // H) <= LARGEST_HEAD:
        return f"the head size is {D}; the kernels take 1 to {LARGEST_HEAD}"
    padded = H * max(16, 1 << (D - 1).bit_length())
    if (widest := max([C, padded] + [layer.c_fc[0].size(0) for layer in session.layers])) > LARGEST_K:
        return f"a matrix has {widest} inputs, each head padded to a power of two; the kernels take up to {LARGEST_K}"
    norms = [tensor for layer in session.layers for tensor in (*layer.ln_1, *layer.ln_2)]
    for tensor in (t for t in (session.wte, session.wpe, *session.ln_f, *norms, *session.weights()) if t is not None):
        if tensor.dtype not in KERNEL_DTYPES:
            return f"a parameter is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
        if not tensor.is_contiguous():
            return "a weight is not contiguous"
    return None


def _fits(layer, C, F):
    """Whether a block's tensors have the shapes that the decoders read: they get addresses."""
    rows = ((layer.ln_1, (C,)), (layer.ln_2, (C,)), (layer.c_attn, (3 * C, C)), (layer.c_proj, (C, C)), (layer.c_fc, (F, C)),
            (layer.mlp_proj, (C, F)))
    return all(weight.shape == shape and (bias is None or bias.shape == shape[:1]) for (weight, bias), shape in rows)


def why_not(session):
    """None if the extension can decode this session, else the reason."""
    if session.device.type != "cpu":
        return f"the extension decodes on a CPU, the model is on {session.device.type}"
    if MISSING is not None:
        return MISSING
    if session.dtype not in _TYPES:
        return f"weights are {session.dtype}; the extension takes float32 and bfloat16"
    if not 1 <= session.rows <= MAX_ROWS:
        return f"{session.rows} rows; the extension takes up to {MAX_ROWS}, with more rows PyTorch's matmuls are as fast"
    fp32, C = [session.wte, session.wpe, *session.ln_f], session.wte.size(1)
    for layer in session.layers:
        if (width := layer.c_fc[0].size(0)) != 4 * C:
            return f"an MLP has a width of {width}; the extension takes 4 times {C}"
        if not _fits(layer, C, width):
            return "the weights of a block do not fit each other"
        fp32 += [*layer.ln_1, *layer.ln_2]
        if layer.activation != session.activation:
            return "blocks have different activations"
    if any(t is not None and t.dtype != torch.float32 for t in fp32):
        return "embeddings or norms are not float32"
    if not all(p.is_contiguous() for p in (*fp32, *session.weights()) if p is not None):
        return "a weight is not contiguous"
    return None


def row_for(session):
    """The Row of the table (kernels/fastest.py) for this session, or None."""
    return fastest.find("decode", fastest.device_number(session.wte), fastest.column(session.dtype), size=session.wte.size(1), tokens=session.rows)


CANDIDATES = (("triton", why_not_triton), ("cpp", why_not))
