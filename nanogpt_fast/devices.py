"""Where a run computes: the device, the dtype of its forward pass, and the ranks that torchrun started."""
import contextlib
import datetime
import gc
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = ("nccl", "gloo", "mpi", "ucc")  # torch.distributed's backends

# In narrower models a step is so short that the casts around its matmuls cost more than bf16 saves. Measured at 12 x 64 tokens, 4 layers,
# one thread with AMX: 128 wide, 46 ms in bf16 and 66 in float32; 64 wide, 24 and 28; 32 wide (2 layers, 4 x 32 tokens), 5.2 and 3.2.
NARROWEST_IN_BF16 = 128

# Dense (no sparsity) bf16 tensor-core peak in FLOP/s, by a part of the device's name; the first match wins.
BF16_PEAK = (
    ("B200", 2250e12), ("GB200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("GH200", 989e12), ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A10", 125e12), ("L40S", 362e12), ("L40", 181e12),
    ("L4", 121e12), ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)


def choose_device(name="auto"):
    """torch.device for "auto" (the accelerator that torch finds: CUDA, MPS, XPU, ...; else the CPU) or for a name such as
    "cpu", "cuda", "cuda:1", "mps".

    Raises ValueError for an invalid name, RuntimeError if this machine has no such device.
    """
    if name == "auto":
        return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda, cuda:0, cuda:1, ... or mps") from None
    module = getattr(torch, device.type, None)  # torch.cuda, torch.mps, torch.xpu, ...: each counts its devices
    count = module.device_count() if hasattr(module, "device_count") else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise RuntimeError(f"device={name}, but PyTorch {torch.__version__} sees {count or 'no'} {device.type.upper()} device(s) "
                           "here; device=auto uses what is available")
    return device


def make_current(device):
    """Let a device with a number be its kind's current one, for a program that computes on it alone: PyTorch reads clocks, events and random
    states of the current one. Returns the device."""
    module = getattr(torch, device.type)
    if device.index is not None and hasattr(module, "set_device"):
        module.set_device(device)
    return device


def choose_dtype(name, device, n_embd=0):
    """torch.dtype for "auto" or a name. n_embd: the width of the model to train.

    auto: bfloat16 on GPUs that compute in it, float16 on older ones; bfloat16 on a CPU that has instructions for it, if the
    model is wide enough to gain (NARROWEST_IN_BF16); float32 otherwise.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu" and n_embd:
        return torch.bfloat16 if n_embd >= NARROWEST_IN_BF16 and fast_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        # GPUs before Ampere only emulate bfloat16, which is slower than the float16 that they have in hardware.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def fast_bfloat16():
    """The instructions that multiply bf16 matrices faster than float32 ones here ("AMX", "AVX-512 bf16"), or None."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512 bf16" if torch.cpu._is_avx512_bf16_supported() else None


def why_dtype(n_embd):
    """Why `choose_dtype` with `auto` gives its dtype for a model of this width on a CPU."""
    if fast_bfloat16() is None:
        return "this CPU has no fast bf16 matmul"
    if n_embd < NARROWEST_IN_BF16:
        return f"bf16 is faster only from {NARROWEST_IN_BF16} channels on"
    return f"this CPU has {fast_bfloat16()}; --dtype=float32 for nanoGPT's"


def autocast(device, dtype):
    """The context in which a forward pass runs. Parameters stay float32; float32 needs no context."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.amp.autocast(device.type, dtype)


def describe(device):
    """The device in words: "cpu (2 threads)", "cuda (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def peak_flops(device):
    """The bf16 matmul peak of a device in FLOP/s, or None if unknown (a CPU, a GPU not in the table)."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAK if part in name), None)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. A single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_master(self):
        """True on the one rank that prints, logs and writes checkpoints."""
        return self.rank == 0

    def mean(self, tensor):
        """The mean of a float tensor over all ranks, in place, without waiting for it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather(self, value):
        """[value of rank 0, value of rank 1, ...] on every rank. value: any picklable object."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def ranks(group_backend, device, group_of_one=False):
    """`with ranks("nccl", device) as (ranks, device)`: join torchrun's process group; without torchrun, a single rank.

    group_backend: one of GROUPS, or None for nccl on CUDA and gloo elsewhere. Every rank of a machine gets its own GPU. group_of_one:
    without torchrun, make a process group of this process alone. A rank that loses another one raises a RuntimeError that says so.
    """
    alone = "RANK" not in os.environ
    if alone:
        make_current(device)
    if alone and not group_of_one:
        yield Ranks(), device
        return
    if not torch.distributed.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} was built without torch.distributed here, which several ranks and --shard need")
    here = Ranks() if alone else Ranks(*map(_of_torchrun, ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device.type == "cuda":
        device = device if alone else make_current(choose_device(f"cuda:{here.local_rank}"))
    elif group_backend == "nccl":
        raise ValueError(f"backend=nccl connects NVIDIA GPUs, and the device is {device}; use backend=gloo")
    store = torch.distributed.HashStore() if alone else _store_of_this_start(here)
    how = {} if store is None else dict(store=store, rank=here.rank, world_size=here.size)
    torch.distributed.init_process_group(group_backend or ("nccl" if device.type == "cuda" else "gloo"), **how)
    try:
        yield here, device
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(f"rank {here.rank} on {socket.gethostname()} lost its connection to another rank, which ended or whose machine "
                           f"did; torchrun names it there, under \"Root Cause\". ({reason})") from None
    finally:
        gc.collect()    # a DDP freed only at exit deadlocks: it waits, holding the GIL, for gloo's thread, which needs it (PyTorch 2.13)
        torch.distributed.destroy_process_group()


def _store_of_this_start(here):
    """torchrun's store with a prefix that is new at every start of the ranks; None where torchrun has no store for them.

    Restarted ranks get the store that the former ones used, and would find the addresses there of ranks that have ended, gloo's and NCCL's
    (PyTorch issue 135712). What torchrun counts as restarts differs between machines. So the first rank chooses the prefix and answers
    every rank that greets it; the greetings are new, too, and a former rank's does no harm.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                                       timeout=datetime.timedelta(minutes=30))
    prefix = greeting = secrets.token_hex(8)
    store.set(f"nanogpt_fast/greeting {here.rank}", greeting)
    if here.is_master:
        answered = set()
        while store.add(f"nanogpt_fast/arrived {prefix}", 0) < here.size - 1:
            for key in (f"nanogpt_fast/greeting {rank}" for rank in range(1, here.size)):
                if store.check([key]) and (other := store.get(key).decode()) not in answered:
                    store.set(f"nanogpt_fast/answer {other}", prefix)
                    answered.add(other)
            time.sleep(0.01)
    else:
        prefix = store.get(f"nanogpt_fast/answer {greeting}").decode()      # waits for it
        store.add(f"nanogpt_fast/arrived {prefix}", 1)
    return torch.distributed.PrefixStore(f"nanogpt_fast/{prefix}", store)


def lost_connection(error):
    """Whether a collective raised this because another rank has ended."""
    of_gloo, of_nccl = ("gloo/transport", "Connection closed by peer", "Connection reset by peer"), ("remote process exited",)
    return any(words in str(error) for words in (*of_gloo, *of_nccl))


def launch():
    """({names of the launch of torchrun that started this rank}, those of them by which a restarted rank knows its own launch).

    Always by the process that started it; if torchrun counts a restart, also by a run id that is not torchrun's default. Both are empty
    without torchrun.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return set(), set()
    process = launching_process()
    names = {process} | ({f"run id {run}"} - {"run id none"})
    return names, names if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else {process}


def launching_process():
    """A name for the process that started this one: its machine, its number and, on Linux, its start, since numbers come again."""
    name = f"{socket.gethostname()} process {os.getppid()}"
    with contextlib.suppress(OSError):
        name += " started at tick " + Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return name


def is_master():
    """True on the rank that prints; always without torchrun."""
    return "RANK" not in os.environ or _of_torchrun("RANK") == 0


def _of_torchrun(name):
    """The number in an environment variable that torchrun sets. Raises ValueError where there is none."""
    if not os.environ.get(name, "").isdecimal():
        found = f"is {os.environ[name]!r}" if name in os.environ else f"is not set, and RANK is {os.environ['RANK']!r}"
        raise ValueError(f"the environment variable {name} {found}; torchrun sets RANK, LOCAL_RANK and WORLD_SIZE to whole numbers. Start several "
                         "ranks with torchrun, or unset RANK")
    return int(os.environ[name])


def start_reading(tensor):
    """Start copying a small tensor to the host; returns a function that waits for the copy and returns the values as a list."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))      # by itself it takes the current device's

    def read():
        copied.synchronize()
        return host.tolist()
    return read
