"""Linear cross-entropy: the vocabulary head and its loss. (Kernels slot in here; until then every call takes the reference.)"""
from .. import backend as _backend
from .. import reference


def linear_cross_entropy(x, weight, targets, *, ignore_index=-1, reduction="mean", return_logits=True, backend=None):
    _backend.choose("cross_entropy", (), backend)
    loss, logits = reference.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, reduction=reduction)
    return loss, logits if return_logits else None
