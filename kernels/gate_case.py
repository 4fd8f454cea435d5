"""What a kernel file tells the compile gate: which launches there are, and what each may cost.

Every module of this package that holds `@triton.jit` kernels has a function

    def gate_cases(arch):
        '''One Case for each kernel, in each row of this file's tile table for `arch` (80, 86, 89, 90 or 100).'''
        yield Case(...)

and `gate.py` finds it, compiles each case for that architecture without a GPU and holds it to the limits. Nothing is
registered. Names decide what is a kernel: a jitted function that is launched on a grid is called `..._kernel` and must be in at
least one case (a test looks); a jitted function that kernels call is called otherwise.

A case describes the launch as Triton's own launcher would specialise it on a GPU:

    Case(
        name="mlp.fc gelu bf16 train",                  # file.kernel and what distinguishes it; unique for an architecture
        kernel=_fc_kernel,
        signature={"x_ptr": "*bf16", "M": "i32", ...},  # every argument that isn't constexpr: *fp32 *bf16 *i64 i32 fp32 ...
        constexprs={"BLOCK_M": 128, "stride": 1, ...},  # constexpr parameters, None for absent pointers, ints that are 1
        divisible=("N", "K", "stride_x"),               # ints that are multiples of 16 at this shape; pointers always count
        num_warps=4, num_stages=3,
        tile_row="90: 128x128x64",                      # which row of the table this is, in words
        bytes=..., flops=...,                           # what the launch must move and compute, see below
        in_model=True,                                  # a GPT-2 124M bf16 training step launches exactly this
        variant_of="mlp.fc gelu bf16 recompute",        # see below
    )

Leave an int out of `divisible` and loads of a row that starts at a multiple of it become narrow: 2 bytes instead of 16.

`bytes` counts each input once and each output once (what no cache can save), `flops` counts a multiply-add as two; both for
GPT-2 124M at B=64, T=1024 (C=768, H=12, D=64, V=50304; generation: one row, its last position) and None where a case isn't a
launch of that model. The gate turns them into the floor in microseconds on an H200.

`variant_of` names a case of the same kernel with the same tile that asks as much of the compiler: with dropout where this one
has none, with one input or output more, bf16 for fp16. Every architecture compiles each kernel in each tile in that form; a
variant is compiled for sm_90 alone, for which the gate shows every form. What may be called a variant on an architecture: a
case that was compiled for it, by Triton 3.6 and 3.9, and had no more spills, shared memory or narrow loads than the other;
`--every` compiles them wherever they are. A launch of GPT-2's training step never is a variant.

The gate finds by itself which kernels must use `wgmma` on sm_90 (a half-precision `tl.dot` with 64 rows or more). What a case
must declare is the exception:

    allowed_spill_bytes=16, spill_reason="..."      # stack bytes of a thread; the reason is printed beside them
    allowed_narrow_loads=9, narrow_reason="..."     # load instructions under 16 bytes: scalars, a row's statistics, a bias
    serial_reason="..."                             # why it may be that ptxas makes each wgmma wait for the one before
"""
import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, specialised one way, for one architecture. The fields are explained in this module's docstring."""
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
    serial_reason: str = ""
    options: dict = dataclasses.field(default_factory=dict)     # further compile options, such as maxnreg

    def __post_init__(self):
        if bool(self.allowed_spill_bytes) != bool(self.spill_reason):
            raise ValueError(f"{self.name}: allowed_spill_bytes and spill_reason come together, got "
                             f"{self.allowed_spill_bytes} and {self.spill_reason!r}")
        if bool(self.allowed_narrow_loads) != bool(self.narrow_reason):
            raise ValueError(f"{self.name}: allowed_narrow_loads and narrow_reason come together, got "
                             f"{self.allowed_narrow_loads} and {self.narrow_reason!r}")
        if self.variant_of and self.in_model:
            raise ValueError(f"{self.name} is in the model and a variant of {self.variant_of!r}; expected one of the two")
        named = set(self.signature) | set(self.constexprs)
        expected = set(self.kernel.arg_names)
        if named != expected:
            raise ValueError(f"{self.name}: {self.kernel.__name__} takes arguments that the case doesn't describe "
                             f"({', '.join(sorted(expected - named)) or 'none'}) or the case describes some it doesn't take "
                             f"({', '.join(sorted(named - expected)) or 'none'})")
        unknown = set(self.divisible) - set(self.signature)
        if unknown:
            raise ValueError(f"{self.name}: divisible names {', '.join(sorted(unknown))}, not in the signature")
