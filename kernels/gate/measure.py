"""What compiled code costs: a Row of registers, spills, shared memory, instructions and access widths; and its limits."""
import dataclasses
import math
import re

KB = 1024

# Bytes of shared memory that one block may have, and that a multiprocessor has (each block takes 1 KB more for the system).
# Warps and blocks that a multiprocessor holds. CUDA C++ programming guide, "Technical specifications per compute capability".
ARCHITECTURES = {
    80: dict(shared_block=163 * KB, shared_sm=164 * KB, warps=64, blocks=32),
    86: dict(shared_block=99 * KB, shared_sm=100 * KB, warps=48, blocks=16),
    89: dict(shared_block=99 * KB, shared_sm=100 * KB, warps=48, blocks=24),
    90: dict(shared_block=227 * KB, shared_sm=228 * KB, warps=64, blocks=32),
    100: dict(shared_block=227 * KB, shared_sm=228 * KB, warps=64, blocks=32),
}
REGISTERS_SM = 65536            # on all of them, in four partitions
REGISTER_UNIT = 256             # a warp's registers are allocated in units of 256
SYSTEM_SHARED = 1 * KB
TENSOR_MEMORY_COLUMNS = 512     # sm_100

H200_BYTES_PER_SECOND = 4.3e12  # a copy's, as published by others; the datasheet says 4.8e12
H200_FLOPS_PER_SECOND = 790e12  # bf16, dense, sustained; the datasheet says 989e12

WIDE = 16                       # bytes of the widest load that all architectures have (sm_100 also has 32)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case compiled to."""
    arch: int
    name: str
    tile_row: str
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    resident_blocks: int
    wgmma: int
    serialised: bool                # by ptxas: each wgmma waits for the one before
    mma: int
    tcgen05: int
    widest_load: int                # bytes; 0: no load
    widest_store: int
    tma: bool
    narrow_loads: int
    large_half_dots: int            # tl.dot with half-precision operands: 64 rows and more
    small_half_dots: int            # fewer rows
    bytes: int | None
    flops: int | None
    floor_us: float | None
    compile_seconds: float
    in_model: bool
    allowed_spill_bytes: int
    spill_reason: str
    allowed_narrow_loads: int
    narrow_reason: str


# ------------------------------------------------------------------------------------------------------ reading compiled code


def measured(case, compiled):
    """The Row of a case, from its `compiling.Compiled`."""
    arch, ptx, log = compiled.arch, compiled.texts["ptx"], compiled.log
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    # Triton puts no arrays of its own on the stack, so everything there is a spill.
    spill_bytes = int(re.search(r"(\d+) bytes stack frame", log).group(1))
    # With warp specialisation the block has more warps than num_warps; the PTX has their number.
    warps = math.ceil(int(re.search(r"\.reqntid\s+(\d+)", ptx).group(1)) / 32)
    shared, tensor_memory = compiled.metadata["shared"], compiled.metadata.get("tmem_size") or 0
    loads, stores, tma_load, tma_store = global_accesses(ptx)
    large, small = half_dots(compiled.texts["ttir"])
    return Row(
        arch=arch, name=case.name, tile_row=case.tile_row, warps=warps, registers=registers, spill_bytes=spill_bytes,
        shared=shared,
        resident_blocks=resident_blocks(arch, registers, shared, warps, tensor_memory),
        wgmma=ptx.count("wgmma.mma_async"), serialised="C7515" in log,
        mma=len(re.findall(r"(?<![\w.])mma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        widest_load=max(loads, default=0), widest_store=max(stores, default=0), tma=tma_load or tma_store,
        narrow_loads=sum(size < WIDE for size in loads), large_half_dots=large, small_half_dots=small,
        bytes=case.bytes, flops=case.flops, floor_us=floor_us(case.bytes, case.flops),
        compile_seconds=round(sum(compiled.seconds.values()), 3), in_model=case.in_model,
        allowed_spill_bytes=case.allowed_spill_bytes, spill_reason=case.spill_reason,
        allowed_narrow_loads=case.allowed_narrow_loads, narrow_reason=case.narrow_reason)


def resident_blocks(arch, registers, shared, warps, tensor_memory=0):
    """How many blocks a multiprocessor holds at once; 0 where not even one fits."""
    limits = ARCHITECTURES[arch]
    if shared > limits["shared_block"]:
        return 0
    # Each of the four partitions holds whole warps.
    per_warp = math.ceil(max(registers, 1) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_SM // 4 // per_warp * 4 // warps
    by_shared = limits["shared_sm"] // (math.ceil(shared / 128) * 128 + SYSTEM_SHARED)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else limits["blocks"]
    return min(by_registers, by_shared, limits["warps"] // warps, limits["blocks"], by_tensor_memory)


def global_accesses(ptx):
    """(sizes in bytes of the load instructions, of the stores, does TMA load, does TMA store)."""
    def sizes(op):
        order = r"(?:volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?"
        found = re.findall(rf"{op}\.{order}global[\w.:]*?(?:\.v(\d+))?\.[bfus](\d+)\b", ptx)
        return [int(vector or 1) * int(bits) // 8 for vector, bits in found]
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)]
    tma_load = re.search(r"cp\.async\.bulk[\w.:]*\.shared::c\w+\.global", ptx) is not None
    tma_store = re.search(r"cp\.async\.bulk[\w.:]*\.global\.shared::c\w+", ptx) is not None
    return sizes("ld") + copies, sizes("st"), tma_load, tma_store


def half_dots(ttir):
    """(number of half-precision `tl.dot` with 64 rows or more, number with fewer rows or a batch, which wgmma doesn't take)."""
    found = re.findall(r"tt\.dot\b[^\n]*?: tensor<(\d+x)?(\d+)x\d+x(?:bf16|f16)>", ttir)
    large = [int(rows) >= 64 and not batch for batch, rows in found]
    return sum(large), len(large) - sum(large)


def floor_us(bytes, flops):
    """The microseconds that the launch takes an H200 at least, or None where a case counts neither."""
    if bytes is None and flops is None:
        return None
    return 1e6 * max((bytes or 0) / H200_BYTES_PER_SECOND, (flops or 0) / H200_FLOPS_PER_SECOND)


# ----------------------------------------------------------------------------------------------------------------- the limits


def failures(row):
    """What is wrong with a row, as sentences; empty where nothing is."""
    found, limits = [], ARCHITECTURES[row.arch]
    if row.spill_bytes > row.allowed_spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes a thread; {row.allowed_spill_bytes} are declared")
    if row.shared > limits["shared_block"]:
        found.append(f"takes {row.shared} bytes of shared memory; a block may have {limits['shared_block']}")
    elif row.resident_blocks == 0:
        found.append(f"doesn't fit a multiprocessor: {row.registers} registers in {row.warps} warps")
    if row.narrow_loads > row.allowed_narrow_loads:
        found.append(f"{row.narrow_loads} loads are narrower than {WIDE} bytes; {row.allowed_narrow_loads} are declared")
    if row.arch == 90 and row.large_half_dots and row.wgmma == 0:
        found.append("has a half-precision matmul of 64 rows or more and no wgmma")
    if row.arch == 90 and row.large_half_dots and not row.small_half_dots and row.mma > 0:
        found.append(f"{row.mma} mma.sync: not every half-precision matmul of 64 rows or more became wgmma")
    if row.serialised:
        found.append("ptxas serialises its wgmma (note C7515)")
    return [f"sm_{row.arch} {row.name} ({row.tile_row}): {what}" for what in found]
