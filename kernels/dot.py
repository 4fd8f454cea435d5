"""A matrix product added to a running sum, as the loops of attention and the MLP need it."""
import triton
import triton.language as tl


@triton.jit
def add_dot(a, b, acc):
    """a b + acc in fp32. a [M, K], b [K, N] of one dtype, acc [M, N].

    float32 is multiplied as IEEE demands, by fused multiply-adds without tensor cores, one after the other. Started from acc, each
    would round at the size of the whole sum: over 1,024 tokens dv was off by 4 times what PyTorch's is. So a tile's products are
    summed apart. Triton folds `acc + tl.dot(a, b)` back into one chain; a difference it leaves alone.
    """
    if a.dtype.is_fp32():
        return acc - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
