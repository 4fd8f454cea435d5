"""Shared by all checkpoint formats: the error class, plain weight names, untying the head, the states of the random generators."""
import random

import numpy as np
import torch
import torch.nn as nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says why and what to do."""


def plain_names(state_dict, source="this state dict"):
    """A state dict under nanoGPT's names: without the prefixes of torch.compile and DDP, without the old mask buffers.

    Raises CheckpointError, which names the source, if two weights would get the same name.
    """
    plain = {}
    for name, tensor in state_dict.items():
        name = name.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # a causal mask; the biases are .attn.c_attn.bias, ...
            if name in plain:
                raise CheckpointError(f"{source} has two weights of the name {name[:100]}, apart from prefixes")
            plain[name] = tensor
    return plain


def untie_head(gpt):
    """Replace a GPT's tied vocabulary head by one with its own matrix (a copy) and a bias (zeros). In place; returns gpt.

    An untied head always has a bias. Without one, any reader that ties the two would silently load the head's weight over the token
    embedding; the unknown name of the bias makes such a reader fail.
    """
    shared = gpt.lm_head.weight
    head = nn.utils.skip_init(nn.Linear, shared.size(1), shared.size(0), device=shared.device, dtype=shared.dtype)
    with torch.no_grad():
        head.weight.copy_(shared)
        head.bias.zero_()
    gpt.lm_head = head
    return gpt


def random_states():
    """The states of every generator from which a training step may draw, as tensors and plain Python types."""
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(),
              "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    if accelerator is not None:
        states[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return states


def set_random_states(states):
    """Restore what `random_states` returned. A device that no longer exists is skipped. Raises CheckpointError where a device refuses its."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in states:
        try:
            torch.get_device_module(accelerator).set_rng_state(states[accelerator.type])
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint's random state is not one of {accelerator.type} ({error}). Take an earlier checkpoint; or "
                                  "ckpt.pt, which has none, by moving last.pt away") from None
