"""What a computation makes on its way: which tensors PyTorch's operators return, and how many matmuls there are."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Inside, counts matmuls and notes (dtype, number of elements, operator) of every tensor that an operator returns.

    A kernel's results show where it takes their memory (aten.empty), like any others.
    """

    def __init__(self):
        super().__init__()
        self.matmuls, self.tensors = 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.matmuls += operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.tensors += [(t.dtype, t.numel(), operator) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out

    def largest(self, dtype):
        """Elements of the largest tensor of this dtype; 0 where there was none."""
        return max((size for made, size, _ in self.tensors if made == dtype), default=0)
