"""The GELU-MLP. (Kernels slot in here; until then every call takes the reference.)"""
from .. import backend as _backend
from .. import reference


def gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, *, activation="gelu", dropout_p=0.0, recompute=False, backend=None):
    _backend.choose("mlp", (), backend)
    return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, activation_name=activation, dropout_p=dropout_p)
