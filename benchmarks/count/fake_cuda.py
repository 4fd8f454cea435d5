"""A PyTorch without CUDA that takes itself for one on an H100: fake tensors on "cuda" have shapes and dtypes, and no memory.

`start()` must run before torch is imported in the process. Nothing on "cuda" computes afterwards; what would be launched is counted
(trace.py). The process is good for nothing else.
"""
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, gcnArchName="",
    is_integrated=False, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120)


def start():
    """Import torch as if it had an H100. Raises RuntimeError if torch is imported already, was built for CUDA, or if there is no g++."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; the count needs a process of its own")
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if not re.search(r"^cuda: .*= None$", (folder / "version.py").read_text(), re.MULTILINE):
        raise RuntimeError("this PyTorch was built for CUDA; the count needs a build for CPUs (torch==2.13.0 from the CPU index)")
    _load_guard(folder)
    import torch
    torch._C._ensureCUDADeviceGuardSet()
    _believe(torch.cuda)
    _triton_driver()


def _load_guard(torch_folder):
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_name("fake_guard.cpp"), Path(folder) / "fake_guard.so"
        include, lib = torch_folder / "include", torch_folder / "lib"
        command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", source, "-o", library, f"-I{include}",
                   f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
        try:
            built = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"the count needs a C++ compiler, and there is no {command[0]}; set CXX") from None
        if built.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed: {built.stderr[-500:]}")
        ctypes.CDLL(str(library))


def _believe(cuda):
    """Replace what torch.cuda asks the driver."""
    def answer(value):
        return lambda *_, **__: value

    class Nothing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            return False

    answers = dict(is_available=True, device_count=1, current_device=0, is_initialized=True, _lazy_init=None, get_device_properties=H100,
                   get_device_capability=(H100.major, H100.minor), get_device_name=H100.name, synchronize=None, set_device=None,
                   is_bf16_supported=True, is_current_stream_capturing=False, _exchange_device=0, _maybe_exchange_device=0,
                   current_stream=SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None), mem_get_info=(H100.total_memory,) * 2)
    for name, value in answers.items():
        setattr(cuda, name, answer(value))
    cuda.device = cuda.device_of = Nothing
    import torch.cuda.amp.common
    import torch.cuda.random
    torch.cuda.amp.common.amp_definitely_not_available = answer(False)
    for module in (cuda, torch.cuda.random):
        module.set_rng_state = answer(None)
        module.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.backends.cudnn.is_available, torch.backends.cudnn.version = answer(True), answer(92000)


def _triton_driver():
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    import torch

    class Driver:
        utils = SimpleNamespace(get_device_properties=lambda _: dict(
            max_shared_mem=H100.shared_memory_per_block_optin, multiprocessor_count=H100.multi_processor_count,
            max_num_regs=H100.regs_per_multiprocessor, warpSize=H100.warp_size))
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_device_capability = staticmethod(lambda *_: (9, 0))
    driver.set_active(Driver())
