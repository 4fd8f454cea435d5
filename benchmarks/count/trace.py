"""What a training step does: a Trace lists its operations, each with the bytes it reads and writes and its FLOPs.

PyTorch's operations are seen by a dispatch mode. Our kernels are replaced by stubs that list themselves: a Triton kernel with the
tensors it is called with, a CUDA kernel with those whose addresses it is given. Each tensor counts once as read or written, those
that a kernel reads and overwrites twice; what a kernel reads again comes from a cache, and is not counted.
"""
import contextlib
import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import torch.nn.utils.clip_grad
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from nanogpt_fast import touched
from nanogpt_fast.ops import extension

DATA_PTR, BACKWARD = torch.Tensor.data_ptr, torch.Tensor.backward

# Operations that launch nothing: they make a view, allocate, or ask.
FREE = set("""_record_function_enter_new _record_function_exit _reshape_alias _unsafe_view alias as_strided detach device empty
    empty_like empty_strided expand is_same_size lift_fresh new_empty new_empty_strided permute promote_types record_stream reshape resize_
    select set_ slice split split_with_sizes squeeze t transpose unbind unsqueeze view _local_scalar_dense""".split())
OVERWRITING = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}     # they write an argument that they don't read
# {kernel: the option with which it overwrites its first tensor}
IN_PLACE = {"cross_entropy._loss_kernel": "GRADIENT", "embedding._add_runs_kernel": "PIECE", "embedding._add_long_runs_kernel": "PIECE"}
# {operation: the place of a tensor with a row for each word, and of one that says how many words or rows it is about}
BY_WORD = {"embedding": (0, 1), "embedding._embed_kernel": (2, 1), "embedding._add_runs_kernel": (0, 1), "embedding._add_long_runs_kernel": (0, 2)}
# PyTorch's multi_tensor_apply: chunks per launch, elements per chunk, and tensors per launch by how many lists there are.
BLOCKS, CHUNK, TENSORS = 320, 65536, (0, 110, 64, 48, 36, 30)
EXTENSION = ("linear_act_sm90", "attention_backward_heads_sm90")        # the CUDA kernels of a training step
KERNEL_MODULES = ("attention_forward", "attention_backward", "cross_entropy", "embedding", "layer_norm", "mlp")


@dataclass
class Operation:
    """kind: "matmul", "attention" or "memory". phase: what `Trace.phase` was. bytes: read and written. launches: kernels, or calls of
    a library that are one kernel as far as this program sees."""
    phase: str
    name: str
    kind: str
    shapes: tuple
    bytes: int
    flops: int = 0
    launches: int = 1


class Trace(TorchDispatchMode):
    """Inside `trace.stubs()` our kernels do nothing; `with trace: step()` fills trace.operations. Before `Tensor.backward` the phase is
    "forward", inside it "backward", then "update". head: channels of a head of attention, for its FLOPs.
    """

    def __init__(self, head):
        super().__init__()
        self.head, self.operations, self.phase, self._listing, self._storages = head, [], "forward", False, {}

    def __enter__(self):
        self.phase, self._listing = "forward", True
        return super().__enter__()

    def __exit__(self, *error):
        self._listing = False
        return super().__exit__(*error)

    def add(self, name, kind, tensors, count, flops=0, launches=1):
        if not self._listing:
            return
        shapes = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors[:4])
        self.operations.append(Operation(self.phase, name, kind, shapes, count, flops, launches))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        schema = function._schema
        name = schema.name.split("::")[1]
        if name in FREE or schema.name.startswith("nanogpt_fast::"):
            return out
        read, written = [], []
        for argument, value in itertools.zip_longest(schema.arguments, args):
            value = kwargs.get(argument.name) if value is None else value
            tensors = _tensors(value)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            writes &= (name, argument.name) != ("_fused_adamw_", "grads") or kwargs.get("grad_scale") is not None      # as the kernel does
            written += tensors if writes else []
            read += [] if writes and (argument.name == "out" or name in OVERWRITING) else tensors
        given = {id(t) for t in read + written}
        written += [t for t in _tensors(out) if id(t) not in given]
        if not any(t.is_cuda for t in read + written):
            return out
        kind, flops = "memory", 0
        if name in ("mm", "addmm"):
            a, b = read[-2:]
            kind, flops = "matmul", 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name.startswith("_scaled_dot_product"):
            backward = name.endswith("backward")
            q = read[1] if backward else read[0]
            kind, flops = "attention", self.attention_flops(q.shape[:3], 5 if backward else 2)
        overload = f".{schema.overload_name}" if "out" in schema.overload_name or "dtype" in schema.overload_name else ""
        self.add(name + overload, kind, read or written, _bytes(_met(name, read)) + _bytes(written), flops, _launches(name, args))
        return out

    def attention_flops(self, batch_heads_tokens, matmuls):
        """Of so many causal products: half of all pairs of tokens, two FLOPs for each of a head's channels."""
        return matmuls * math.prod(batch_heads_tokens) * batch_heads_tokens[-1] * self.head

    # ------------------------------------------------------------------------------------------------------------- our kernels

    @contextlib.contextmanager
    def stubs(self):
        """Inside, our kernels list themselves instead of being launched, and PyTorch takes the paths that it takes on CUDA tensors."""
        with contextlib.ExitStack() as stack:
            for name in KERNEL_MODULES:
                module = importlib.import_module(f"nanogpt_fast.kernels.{name}")
                kernels = [key for key, kernel in vars(module).items() if isinstance(kernel, JITFunction) and key.endswith("_kernel")]
                stack.enter_context(overridden(module, **{key: _Stub(self, f"{name}.{key}") for key in kernels}))
            stack.enter_context(overridden(extension, _C=_Extension(self), cuda_why_not=lambda _: None, plain=lambda tensor: tensor is not None))
            stack.enter_context(overridden(importlib.import_module("nanogpt_fast.kernels.adamw"), Table=lambda: _AdamW(self)))
            for name, module in list(sys.modules.items()):      # a parameter that is a fake tensor is no nn.Parameter
                if name.startswith("nanogpt_fast.") and name != "nanogpt_fast.touched" and hasattr(module, "touched"):
                    stack.enter_context(overridden(module, touched=lambda *_: None))
            stack.enter_context(overridden(torch.Tensor, data_ptr=lambda tensor: self._address(tensor),
                                           backward=lambda *args, **kwargs: self._backward(*args, **kwargs)))
            for name in ("_has_foreach_support", "_device_has_foreach_support"):
                stack.enter_context(overridden(torch.nn.utils.clip_grad, **{name: lambda *_: True}))
            stack.enter_context(overridden(F, scaled_dot_product_attention=_cudnn_attention))
            stack.enter_context(mock.patch.dict(touched.FUNCTIONS, scaled_dot_product_attention=_cudnn_attention))  # as PyTorch's own
            yield

    def _address(self, tensor):
        """What data_ptr() returns for a fake tensor: a number that stands for its storage."""
        if not isinstance(tensor, FakeTensor):
            return DATA_PTR(tensor)
        storage = tensor.untyped_storage()
        start, _ = self._storages.setdefault(storage._cdata, ((len(self._storages) + 1) << 40, storage))
        return start + tensor.storage_offset() * tensor.itemsize

    def _backward(self, tensor, *args, **kwargs):
        self.phase = "backward"
        BACKWARD(tensor, *args, **kwargs)
        self.phase = "update"

    def triton(self, name, tensors, options):
        kind, flops = "memory", 0
        if name.startswith("attention"):
            lse = next(t for t in tensors if t.dim() == 3 and t.dtype == torch.float32)
            products = {"forward": 2, "dq": 3, "dkdv": 4, "head": 5}
            kind, flops = "attention", self.attention_flops(lse.shape, next(n for part, n in products.items() if f"{part}_kernel" in name))
        elif "_linear_" in name:
            a, b = tensors[:2]
            kind, flops = "matmul", 2 * a.shape[0] * a.shape[1] * max(b.shape)      # the wider side is the MLP's inner one
        met = _met(name, tensors)
        twice = met[:1] if options.get(IN_PLACE.get(name)) else []
        self.add(name, kind, tensors, _bytes(met) + _bytes(twice), flops)

    def extension(self, name, args):
        """A CUDA kernel of the extension, one of `EXTENSION`. args: numbers, among them addresses; tuples of an address and strides."""
        starts = {start: storage for start, storage in self._storages.values()}
        given = {value >> 40 << 40 for a in args for value in (a if isinstance(a, tuple) else (a,)) if isinstance(value, int)}
        count = sum(storage.nbytes() for start, storage in starts.items() if start in given)
        if name == "linear_act_sm90":
            M, N, K = args[10:13]
            self.add(name, "matmul", [], count, 2 * M * N * K)
        else:
            B, H, T = args[-6:-3]
            self.add(name, "attention", [], count, self.attention_flops((B, H, T), 5), launches=2)


class _Stub:
    """Stands for a Triton kernel: `kernel[grid](...)` lists the launch."""

    def __init__(self, trace, name):
        self.trace, self.name = trace, name

    def __getitem__(self, grid):
        return lambda *args, **options: self.trace.triton(self.name, [a for a in args if isinstance(a, torch.Tensor)], options)


class _AdamW:
    """Stands for kernels/adamw.py's Table."""

    def __init__(self, trace):
        self.trace = trace

    def write(self, tensors, groups, options):
        self.tensors = tensors

    def step(self, rates, factor):
        weights, gradients, exp_avgs, exp_avg_sqs, _, copies = zip(*self.tensors)
        twice = weights + exp_avgs + exp_avg_sqs
        self.trace.add("adamw._adamw_numbers_kernel", "memory", [], 0)
        self.trace.add("adamw._adamw_kernel", "memory", twice,
                       2 * _bytes(twice) + _bytes(gradients) + _bytes(copy for copy in copies if copy is not None))


class _Extension(SimpleNamespace):
    """Stands for nanogpt_fast._C as built for sm_90."""

    def __init__(self, trace):
        super().__init__(build_info=lambda: dict(cuda="13.0", cuda_archs="90"))
        for name in EXTENSION:      # a call of any other raises AttributeError
            setattr(self, name, lambda *args, name=name: trace.extension(name, args))


def _cudnn_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What PyTorch's attention is on an H100. Fake tensors would take the path of plain matmuls."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def overridden(owner, **values):
    """Inside, owner.name is the value, for each name=value."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def _met(name, tensors):
    """The tensors, but of one with a row for each word only as many rows as there can be different words."""
    if name not in BY_WORD:
        return tensors
    table, words = BY_WORD[name]
    rows = tensors[words].numel() // (tensors[table].size(1) if tensors[words].is_floating_point() else 1)
    return [tensor[:rows] if i == table else tensor for i, tensor in enumerate(tensors)]


def _launches(name, args):
    """Kernels of one operation: one, but for those over lists of tensors."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    if not lists or not name.startswith(("_foreach", "_fused")):
        return 1
    most, launches, tensors, blocks = TENSORS[min(len(lists), 5)], 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        chunks = -(-tensor.numel() // CHUNK)
        while chunks:
            fit = min(chunks, BLOCKS - blocks)
            blocks, chunks = blocks + fit, chunks - fit
            if blocks == BLOCKS or (tensors == most and not chunks):
                launches, blocks, tensors = launches + 1, 0, int(chunks > 0)
    return launches + bool(blocks)
