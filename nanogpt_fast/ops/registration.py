"""How an op becomes visible to torch.compile: a raw operator `torch.ops.nanogpt_fast.<name>` with what it computes and a fake.

Defining and implementing it in a Library costs 2.4 us a call; `torch.library.custom_op` with `register_autograd` costs 16. Autograd
lives in the op's autograd.Function instead, which calls the raw operator only while compiling (`torch.compiler.is_compiling()`).
"""
import torch

_library = torch.library.Library("nanogpt_fast", "FRAGMENT")
raw = torch.ops.nanogpt_fast


def define(schema, implementation, fake):
    """Register `schema` ("name(Tensor x, ...) -> Tensor") with its implementation and the fake that makes its empty results."""
    name = schema.split("(")[0]
    _library.define(schema)
    # An exported graph calls the operator with tensors that require grad; what is inside knows no autograd.
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanogpt_fast::{name}", fake, lib=_library)
