"""Tried, not shipped: cuDNN's attention by its own Python front end (`pip install nvidia-cudnn-frontend`), on the packed projection.

PyTorch's cuDNN attention returns dq, dk and dv as three tensors, and a `cat` of 604 MB a layer makes one gradient of them. Here cuDNN
writes the thirds of one (B, T, 3C) gradient: only the strides of its outputs differ. A graph is built once for a shape.
"""
import functools
import math

import cudnn
import torch


@functools.cache
def _handle(device):
    return cudnn.create_handle()


def _graph(device):
    return cudnn.pygraph(io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT,
                         compute_data_type=cudnn.data_type.FLOAT, handle=_handle(device))


def _build(graph, device):
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph.get_workspace_size()


@functools.cache
def _forward_graph(B, H, T, D, device):
    graph, C = _graph(device), H * D
    packed, heads = [T * 3 * C, D, 3 * C, 1], [T * C, D, C, 1]
    q, k, v = (graph.tensor(name=name, dim=[B, H, T, D], stride=packed, data_type=cudnn.data_type.BFLOAT16) for name in "qkv")
    out, lse = graph.sdpa(q=q, k=k, v=v, generate_stats=True, attn_scale=1 / math.sqrt(D), use_causal_mask=True, name="sdpa")
    out.set_output(True).set_dim([B, H, T, D]).set_stride(heads)
    lse.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    return graph, (q, k, v, out, lse), _build(graph, device)


@functools.cache
def _backward_graph(B, H, T, D, device, deterministic):
    graph, C = _graph(device), H * D
    packed, heads = [T * 3 * C, D, 3 * C, 1], [T * C, D, C, 1]
    q, k, v = (graph.tensor(name=name, dim=[B, H, T, D], stride=packed, data_type=cudnn.data_type.BFLOAT16) for name in "qkv")
    out, do = (graph.tensor(name=name, dim=[B, H, T, D], stride=heads, data_type=cudnn.data_type.BFLOAT16) for name in ("o", "do"))
    lse = graph.tensor(name="stats", dim=[B, H, T, 1], stride=[H * T, T, 1, 1], data_type=cudnn.data_type.FLOAT)
    gradients = graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=do, stats=lse, attn_scale=1 / math.sqrt(D), use_causal_mask=True,
                                    use_deterministic_algorithm=deterministic, name="sdpa_backward")
    for gradient in gradients:
        gradient.set_output(True).set_dim([B, H, T, D]).set_stride(packed)
    return graph, (q, k, v, out, do, lse, *gradients), _build(graph, device)


def _run(graph, tensors, addresses, workspace, device):
    handle = _handle(device.index)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    scratch = torch.empty(workspace, dtype=torch.uint8, device=device)
    graph.execute(dict(zip(tensors, addresses)), scratch.data_ptr(), handle=handle)


def forward(qkv, H):
    """(out (B, T, C), lse (B, H, T, 1) fp32, natural logarithm) of qkv (B, T, 3C) bf16, contiguous."""
    B, T, C3 = qkv.shape
    C, third = C3 // 3, C3 // 3 * qkv.itemsize
    graph, tensors, workspace = _forward_graph(B, H, T, C // H, qkv.device.index)
    out = torch.empty(B, T, C, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, T, 1, dtype=torch.float32, device=qkv.device)
    start = qkv.data_ptr()
    _run(graph, tensors, (start, start + third, start + 2 * third, out.data_ptr(), lse.data_ptr()), workspace, qkv.device)
    return out, lse


def backward(do, qkv, out, lse, H, deterministic=False):
    """dqkv (B, T, 3C)."""
    B, T, C3 = qkv.shape
    C, third = C3 // 3, C3 // 3 * qkv.itemsize
    graph, tensors, workspace = _backward_graph(B, H, T, C // H, qkv.device.index, deterministic)
    dqkv = torch.empty_like(qkv)
    start, to = qkv.data_ptr(), dqkv.data_ptr()
    _run(graph, tensors, (start, start + third, start + 2 * third, out.data_ptr(), do.data_ptr(), lse.data_ptr(),
                          to, to + third, to + 2 * third), workspace, qkv.device)
    return dqkv
