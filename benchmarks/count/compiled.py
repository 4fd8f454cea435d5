"""What a compiled forward and backward do: Inductor writes its code for sm_90 from fake tensors, and each node of its schedule is counted.

Nothing is compiled by Triton or run. Our own operators, which Inductor calls, list what they launch (trace.py). `_no_device` replaces
the internals of PyTorch that would ask the device or run something on it.
"""
import contextlib

import torch

from nanogpt_fast.ops.registration import implementations

from .trace import Operation, overridden


class _Stop(Exception):
    """Raised instead of running the generated code."""


def operations(call, weights, fake_mode, trace):
    """[Operation] of the forward and backward graphs that torch.compile makes during call(). weights: a context for the
    call, or None. fake_mode: the FakeTensorMode of its tensors."""
    import torch._inductor.config as config
    import torch._inductor.compile_fx           # noqa: F401
    from torch._inductor.graph import GraphLowering

    graphs = []

    def compile_to_module(graph):
        graph.codegen()
        graphs.append(graph)

        class Module:
            __file__, key, runner = "count.py", "count", None

            @staticmethod
            def call(_):
                raise _Stop
        return Module

    changed = dict(fx_graph_cache=False, compile_threads=1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(changed))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True))
        _no_device(stack)
        for name in ("compile_to_module", "_compile_to_module"):
            stack.enter_context(overridden(GraphLowering, **{name: compile_to_module}))
        if weights is not None:
            stack.enter_context(weights)
        try:
            call()
        except Exception as error:
            if len(graphs) != 2:
                raise RuntimeError(f"expected a forward and a backward graph from torch.compile, got {len(graphs)}") from error
    return [operation for phase, graph in zip(("forward", "backward"), graphs) for operation in _of(graph, phase, fake_mode, trace)]


def _of(graph, phase, fake_mode, trace):
    from torch._inductor.virtualized import V
    found = []
    with V.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            ir, count = node.node, node.get_read_write_buffers_sizes()
            if type(ir).__name__ == "MultiOutput":      # one of the results of the operator before it
                found[-1].bytes += count
            elif not node.is_extern():
                found.append(Operation(phase, "a kernel of Inductor's", "memory", (), count))
            elif str(ir.op_overload).startswith("nanogpt_fast."):
                found += _ours(ir, phase, fake_mode, trace)
                found.append(Operation(phase, "", "memory", (), 0, launches=0))     # for the MultiOutputs, whose bytes are counted already
            else:
                found.append(_library_call(ir, phase, count, trace))
    return [each for each in found if each.launches]


def _library_call(ir, phase, count, trace):
    name = str(ir.python_kernel_name or ir.op_overload)
    shapes = tuple((tuple(int(n) for n in i.get_size()), str(i.get_dtype()).removeprefix("torch.")) for i in ir.inputs)
    kind, flops = "memory", 0
    if "mm" in name.rsplit(".", 1)[-1]:
        (m, k), (_, n) = (shape for shape, _ in shapes[-2:])
        kind, flops = "matmul", 2 * m * k * n
        count = 2 * (m * k + k * n + m * n)         # Inductor counts at most 10^9 elements for each
    elif "scaled_dot_product" in name:
        backward = "backward" in name
        kind, flops = "attention", trace.attention_flops(shapes[1 if backward else 0][0][:3], 5 if backward else 2)
    return Operation(phase, name, kind, shapes, count, flops)


def _ours(ir, phase, fake_mode, trace):
    """What one of our operators launches: its implementation is called with fake tensors like those of the graph."""
    def fake(value):
        if isinstance(value, (list, tuple)):
            return [fake(each) for each in value]
        if not hasattr(value, "get_size"):
            return value
        size, stride = [int(n) for n in value.get_size()], [int(n) for n in value.get_stride()]
        return torch.empty_strided(size, stride, dtype=value.get_dtype(), device="cuda")
    args, kwargs = ir.unflatten_args(ir.inputs, ir.constant_args)
    before = len(trace.operations)
    with fake_mode, trace, torch.no_grad():
        trace.phase = phase
        args, kwargs = [fake(value) for value in args], {name: fake(value) for name, value in kwargs.items()}
        implementations[ir.op_overload._schema.name.split("::")[1]](*args, **kwargs)
    made, trace.operations[before:] = trace.operations[before:], []
    return made


def _no_device(stack):
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.constant_folding as folding
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.misc_patterns as misc_patterns
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch.utils._triton

    from .fake_cuda import H100
    cuda = interfaces.CudaInterface
    answers = dict(is_available=True, get_device_properties=H100, current_device=0, device_count=1, get_compute_capability=90,
                   is_triton_capable=True, raise_if_triton_unavailable=None, get_raw_stream=0, exchange_device=0, maybe_exchange_device=0,
                   synchronize=None)
    replace = lambda owner, **values: stack.enter_context(overridden(owner, **values))
    replace(cuda, **{name: staticmethod(lambda *_, value=value: value) for name, value in answers.items()})
    replace(cuda.Worker, get_device_properties=staticmethod(lambda *_: H100), current_device=staticmethod(lambda *_: 0))
    for name in ("has_triton", "has_triton_package", "has_triton_tma", "has_triton_tma_device", "has_triton_stable_tma_api"):
        if hasattr(torch.utils._triton, name):
            replace(torch.utils._triton, **{name: lambda *_: True})
    # The patterns of these passes are traced on real tensors of the device.
    replace(fuse_attention, _sfdp_init=lambda *_, **__: None)
    replace(misc_patterns, _misc_patterns_init=lambda *_, **__: None)
    replace(pad_mm, _pad_mm_init=lambda *_, **__: None)
    # Constants are folded on the CPU.
    fetch = folding.ConstantFolder.fetch_args_kwargs_from_env

    def fetch_on_cpu(self, node):
        args, kwargs = fetch(self, node)
        return args, {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    replace(folding.ConstantFolder, fetch_args_kwargs_from_env=fetch_on_cpu)
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self, node):
        kwargs = node.kwargs
        if kwargs.get("device") is None:
            return deduce(self, node)
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kwargs
    replace(joint_graph.UniformValueConstantFolder, _deduce_value=deduce_on_cpu)
