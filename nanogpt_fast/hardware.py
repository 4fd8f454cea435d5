"""What the hardware could do at best: dense bf16 matmul peaks of NVIDIA GPUs, from their datasheets."""
import torch

# Dense (no sparsity) bf16 tensor-core peak in FLOP/s, by a part of the device's name; the first match counts.
BF16_PEAK = (
    ("B200", 2250e12), ("GB200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("GH200", 989e12), ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A10", 125e12), ("L40S", 362e12), ("L40", 181e12),
    ("L4", 121e12), ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)


def peak_flops(device):
    """The bf16 matmul peak of a device in FLOP/s, or None where it is not known (a CPU, a GPU not in the table)."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAK if part in name), None)
