"""A case: one kernel, specialised one way, with its cost at GPT-2 124M shapes and the limits that it may exceed.

Each family's file in this package has a function

    def gate_cases(arch):
        '''One Case for each kernel, in each row of its tile table for `arch` (80, 86, 89, 90 or 100).'''
        yield Case(...)

and `families.py` lists these files. A jitted function that is launched on a grid is called `..._kernel` and must be in at least
one case (a test checks); a jitted function that kernels call has another name.

A case describes the launch as Triton's own launcher would specialise it on a GPU:

    Case(
        name="mlp.linear_act fc gelu inference bf16",   # file.kernel and what distinguishes it; unique for an architecture
        kernel=_linear_act_kernel,
        signature={"x_ptr": "*bf16", "M": "i32", ...},  # every argument that isn't constexpr: *fp32 *bf16 *i64 i32 fp32 ...
        constexprs={"BLOCK_M": 128, "stride": 1, ...},  # constexpr parameters, None for absent pointers, ints that are 1
        divisible=("N", "K", "stride_x"),               # ints that are multiples of 16 at this shape; pointers always count
        num_warps=4, num_stages=3,
        tile_row="90: 128x128x64",                      # which row of the table this is, in words
        bytes=..., flops=...,                           # what the launch must move and compute, see below
        in_model=False,                                 # True: a GPT-2 124M bf16 training step launches exactly this
        variant_of="mlp.linear_act fc gelu train bf16", # see below
    )

An int that is missing from `divisible` makes loads narrow, 2 bytes instead of 16, in rows that start at a multiple of it.

`bytes` counts each input once and each output once (no cache can save these), `flops` counts a multiply-add as two. Both are for
GPT-2 124M at B=64, T=1024 (C=768, H=12, D=64, V=50304; generation: one row, its last position), and None where that model makes
no such launch. The gate turns them into the floor in microseconds on an H200.

`variant_of` names a case with the same kernel and tile that needs as many resources or more: it has dropout where this one has
none, one input or output more, or bf16 for fp16. Every architecture compiles that case; the variant is compiled for sm_90 alone,
so that the gate shows every form of a kernel there. A case may be a variant on an architecture if both were compiled for it by
Triton 3.6 and 3.9, and it had no more spills, shared memory or narrow loads than the other; `--every` compiles variants for all
architectures. A launch of GPT-2's training step is never a variant.

The gate itself finds which kernels must use `wgmma` on sm_90: those with a half-precision `tl.dot` of 64 rows or more. A case
declares only exceptions:

    allowed_spill_bytes=16, spill_reason="..."      # stack bytes of a thread; the reason is printed beside them
    allowed_narrow_loads=9, narrow_reason="..."     # load instructions under 16 bytes: scalars, a row's statistics, a bias
"""
import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, specialised one way, for one architecture. The module's docstring explains the fields."""
    name: str
    kernel: typing.Any                      # the @triton.jit function
    signature: dict
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple = ()
    tile_row: str = ""
    bytes: int | None = None
    flops: int | None = None
    in_model: bool = False
    variant_of: str = ""
    allowed_spill_bytes: int = 0
    spill_reason: str = ""
    allowed_narrow_loads: int = 0
    narrow_reason: str = ""
    options: dict = dataclasses.field(default_factory=dict)     # further compile options, such as maxnreg

    def __post_init__(self):
        if bool(self.allowed_spill_bytes) != bool(self.spill_reason):
            raise ValueError(f"{self.name}: allowed_spill_bytes and spill_reason come together, got "
                             f"{self.allowed_spill_bytes} and {self.spill_reason!r}")
        if bool(self.allowed_narrow_loads) != bool(self.narrow_reason):
            raise ValueError(f"{self.name}: allowed_narrow_loads and narrow_reason come together, got "
                             f"{self.allowed_narrow_loads} and {self.narrow_reason!r}")
        if self.variant_of and self.in_model:
            raise ValueError(f"{self.name} has in_model=True and variant_of={self.variant_of!r}; expected one of the two")
        named = set(self.signature) | set(self.constexprs)
        expected = set(self.kernel.arg_names)
        if named != expected:
            raise ValueError(f"{self.name}: {self.kernel.__name__} takes arguments that the case doesn't describe "
                             f"({', '.join(sorted(expected - named)) or 'none'}) or the case describes some it doesn't take "
                             f"({', '.join(sorted(named - expected)) or 'none'})")
        unknown = set(self.divisible) - set(self.signature)
        if unknown:
            raise ValueError(f"{self.name}: divisible names {', '.join(sorted(unknown))}, not in the signature")
