"""One token a row through a whole GPT on the CPU, in one call of the extension: what `generate` does between two draws.

Every weight is read once and used twice, so the memory's bandwidth is the limit; csrc/decode.h says how it is reached. The session
(`generation.Session`) holds weights and cache; this file hands their addresses over, and says where it can't.
"""
import torch

from .. import backend as _backend
from . import sample

MAX_ROWS = 16  # csrc/decode.h; with more rows PyTorch's matrix products do as well
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def decoder(session):
    """The extension's Decoder for a generation.Session, or None where PyTorch decodes. It holds addresses: keep the session alive."""
    if session.device.type != "cpu" or _backend.choose("decode", CANDIDATES, session.choices, (session,)) == "reference":
        return None
    address = lambda tensor: 0 if tensor is None else tensor.data_ptr()
    layers = []
    for i, layer in enumerate(session.layers):
        tensors = (*layer.ln_1, *layer.ln_2, *layer.c_attn, *layer.c_proj, *layer.c_fc, *layer.mlp_proj, *session.cache[i])
        layers.append([address(tensor) for tensor in tensors])
    return sample._C.Decoder(rows=session.rows, width=session.wte.size(1), heads=session.n_head, context=session.block_size,
                             vocab=session.wte.size(0), type=_TYPES[session.dtype], activation=session.activation,
                             wte=session.wte.data_ptr(), wpe=session.wpe.data_ptr(), ln_f=[address(t) for t in session.ln_f],
                             head=[address(t) for t in session.head], layers=layers)


def step(native, token, position, vocab, isa=""):
    """Process token (rows,) int64 at position (rows,) int64 -> logits (rows, vocab) fp32."""
    logits = torch.empty(token.size(0), vocab)
    native.step(token.data_ptr(), position.data_ptr(), logits.data_ptr(), torch.get_num_threads(), isa)
    return logits


def why_not(session):
    """None where the extension can decode this session, else the reason."""
    if sample._C is None or not hasattr(sample._C, "Decoder"):
        return f"the extension is not there ({sample._missing()})"
    if session.dtype not in _TYPES:
        return f"weights are {session.dtype}; the extension takes float32 and bfloat16"
    if not 1 <= session.rows <= MAX_ROWS:
        return f"{session.rows} rows; the extension takes up to {MAX_ROWS}, with more PyTorch's matrix products do as well"
    fp32 = [session.wte, session.wpe, *session.ln_f]
    for layer in session.layers:
        fp32 += [*layer.ln_1, *layer.ln_2]
        if layer.activation != session.activation:
            return "blocks have different activations"
    if any(t is not None and t.dtype != torch.float32 for t in fp32):
        return "embeddings or norms are not float32"
    if not all(p.is_contiguous() for p in (*fp32, *session.weights()) if p is not None):
        return "a weight is not contiguous"
    return None


CANDIDATES = (("cpp", why_not),)
