"""Causal attention: the public functions. (Kernels slot in here; until then every call takes the reference.)"""
from .. import backend as _backend
from .. import reference


def causal_attention(q, k, v, *, dropout_p=0.0, scale=None, backend=None):
    _backend.choose("attention", (), backend)
    return reference.causal_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def causal_attention_qkvpacked(qkv, n_head, *, dropout_p=0.0, scale=None, backend=None):
    _backend.choose("attention", (), backend)
    return reference.causal_attention_qkvpacked(qkv, n_head, dropout_p=dropout_p, scale=scale)
