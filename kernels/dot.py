"""A matrix product added to a running sum, as the loops of attention and the MLP need it."""
import triton
import triton.language as tl


@triton.jit
def add_dot(a, b, acc):
    """a b + acc in fp32. a [M, K], b [K, N] of one dtype, acc [M, N].

    float32 is multiplied in IEEE precision, by a chain of fused multiply-adds without tensor cores. With acc as the chain's initial
    value, each step would round at the magnitude of the whole sum: over 1,024 tokens the error of dv was 4 times PyTorch's. So the
    products of a tile are summed separately, then added. Triton would fold `acc + tl.dot(a, b)` back into one chain; it does not
    fold a difference.
    """
    if a.dtype.is_fp32():
        return acc - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
