"""Builds the C++/CUDA extension `nanogpt_fast._C`; everything static is in pyproject.toml.

The extension needs a C++17 compiler, pybind11 and ninja, but not torch. The CUDA part is built if nvcc is found in CUDA_HOME (or
CUDA_PATH), on PATH or in /usr/local/cuda. If a tool is missing, only the part that needs it is left out; the reason is printed and
kept for `nanogpt-fast doctor`, in `_C.build_info()` or, if there is no extension at all, in `nanogpt_fast/_C_missing.txt`.

    NANOGPT_FAST_CUDA=0             do not build the CUDA part
    NANOGPT_FAST_CUDA=1             fail if the CUDA part cannot be built; fetch nvcc from PyPI if the machine has none
    NANOGPT_FAST_CUDA_ARCHS=90,100  only these architectures
    CXX=clang++                     another compiler
"""
import ctypes
import glob
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = os.path.dirname(os.path.abspath(__file__))
ARCHS = ("80", "86", "89", "90", "100", "120")  # A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50; the newest also as PTX
MISSING = "_C_missing.txt"

# -ffp-contract=off: the sampler's definition (sampler/definition.h) must not be compiled to fused multiply-adds. The next two flags let
# the compiler vectorise loops with comparisons.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
X86_ISAS = {"avx2": ["-mavx2", "-mfma"],
            "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]}
# For files whose results need not be bitwise reproducible. -Wno-psabi: vectors are never passed between files, so the ABI doesn't matter.
VECTOR_FLAGS = ["-ffp-contract=fast", "-Wno-psabi"]


# ---------------------------------------------------------------- what this machine has

def cuda_wanted():
    value = os.environ.get("NANOGPT_FAST_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"NANOGPT_FAST_CUDA is {value!r}; expected 0 (no CUDA part), 1 (required) or nothing (built if nvcc is found)")
    return value


def find_nvcc():
    """(command, None) or (None, why not)."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes]
    candidates += [found for found in [shutil.which("nvcc")] if found] + ["/usr/local/cuda/bin/nvcc"]
    if cuda_wanted() == "1":  # PyPI's nvidia-cuda-nvcc, which setup_requires installed
        candidates += [found for folder in sys.path for found in glob.glob(os.path.join(folder, "nvidia", "cu*", "bin", "nvcc"))]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate, None
    return None, "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda"


def nvcc_from_pypi():
    """The PyPI packages to install if nvcc is required and not found, no newer than the driver (if there is one) supports."""
    if cuda_wanted() != "1" or find_nvcc()[0]:
        return []
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        pass  # no driver here: the build is for another machine
    limit = ""
    if version.value:
        major, minor = version.value // 1000, version.value % 1000 // 10
        if major < 13:
            raise SystemExit(f"NANOGPT_FAST_CUDA=1: the driver supports CUDA {major}.{minor}, but PyPI has nvcc only from 13.0 on. "
                             f"Install the CUDA {major}.{minor} toolkit and set CUDA_HOME.")
        limit = f",<{major}.{minor + 1}"
    parts = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
    return [f"{part}>=13{limit}" for part in parts]


def cuda_architectures(nvcc):
    """The requested architectures that this nvcc knows; warns about the others."""
    asked = re.findall(r"\d+", os.environ.get("NANOGPT_FAST_CUDA_ARCHS", "").replace(".", "")) or list(ARCHS)
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    for arch in asked:
        if arch not in known:
            print(f"nanogpt_fast: this nvcc does not know sm_{arch}; it is left out", file=sys.stderr)
    archs = sorted({arch for arch in asked if arch in known}, key=int)
    if not archs:
        raise CompileError(f"{nvcc} knows none of the architectures {', '.join(asked)}")
    return archs


def nvcc_version(nvcc):
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found.group(1) if found else "unknown"


# ---------------------------------------------------------------- the build

def q(words):
    return shlex.join(words).replace("$", "$$")


def ninja_path(path):
    return re.sub(r"([$ :])", r"$\1", path)


def text_macro(name, value):
    return f'-D{name}="{value}"'


class NinjaBuildExt(build_ext):
    """build_ext that compiles through ninja: in parallel, C++ and CUDA alike, and only what changed."""

    def run(self):
        self.into_sources = self.inplace or self.editable_mode  # the base class clears `inplace` during the build
        super().run()  # distutils reports a failed optional extension and continues; build_extension keeps the reason
        for extension in self.extensions:
            for folder in self.package_folders(extension):
                path = os.path.join(folder, MISSING)
                if reason := getattr(extension, "missing", None):
                    os.makedirs(folder, exist_ok=True)
                    with open(path, "w") as file:
                        file.write(reason + "\n")
                elif os.path.exists(path):
                    os.remove(path)

    def package_folders(self, extension):
        """The folders that get the extension: the wheel's tree, and for editable and in-place builds the sources."""
        folders = [os.path.dirname(os.path.join(self.build_lib, *self.get_ext_fullname(extension.name).split(".")))]
        if self.into_sources:
            folders.append(os.path.join(ROOT, "nanogpt_fast"))
        return folders

    def build_extension(self, extension):
        try:
            self.ninja(self.get_ext_fullpath(extension.name))
        except CompileError as error:
            extension.missing = str(error)
            # Remove older libraries, which would hide the failure.
            for folder in self.package_folders(extension):
                for stale in glob.glob(os.path.join(folder, "_C.*.so")):
                    os.remove(stale)
            print(f"nanogpt_fast: the C++/CUDA extension was NOT built: {error}\n"
                  "nanogpt_fast: everything works without it; sampling runs on plain PyTorch, slower.", file=sys.stderr)
            raise

    def ninja(self, target):
        compiler = shlex.split(os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), ""))
        if not compiler or not shutil.which(compiler[0]):
            raise CompileError(f"no C++ compiler ({compiler[0] if compiler else 'c++, g++, clang++'}) was found; "
                               "install one (Debian, Ubuntu: apt install g++) or name it in CXX, and install again")
        python = sysconfig.get_paths()["include"]
        if not os.path.exists(os.path.join(python, "Python.h")):
            raise CompileError(f"Python.h is not in {python}; install Python's headers (Debian, Ubuntu: apt install python3-dev)")
        try:
            import ninja
            import pybind11
        except ImportError as error:  # possible only without build isolation
            raise CompileError(f"{error.name} is missing; pip install pybind11 ninja, or build with isolation") from error

        if cuda_wanted() == "0":
            nvcc, why_not = None, "NANOGPT_FAST_CUDA=0 was set during the build"
        else:
            nvcc, why_not = find_nvcc()
        if nvcc is None:
            if cuda_wanted() == "1":
                raise CompileError(f"NANOGPT_FAST_CUDA=1, but {why_not}")
            print(f"nanogpt_fast: building the CPU part of the extension only: {why_not}", file=sys.stderr)

        os.makedirs(self.build_temp, exist_ok=True)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        plan = os.path.join(self.build_temp, "build.ninja")
        with open(plan, "w") as file:
            file.write(self.ninja_file(os.path.abspath(target), compiler, [python, pybind11.get_include()], nvcc, why_not))
        done = subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", self.build_temp], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            lines = done.stdout.splitlines()
            first = next((line for line in lines if "error:" in line), "its output is below")
            raise CompileError("\n".join([f"the compiler failed: {first}", *lines[-40:]]))

    def ninja_file(self, target, compiler, includes, nvcc, why_not):
        """The text of build.ninja: one rule per tool, one edge per object."""
        source = os.path.join(ROOT, "csrc")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
            version = tomllib.load(file)["project"]["version"]
        name = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        about = [text_macro("NGF_VERSION", version), text_macro("NGF_COMPILER", name[0].replace('"', "") if name else compiler[0])]
        for_x86 = ["-DNGF_X86"] if x86 else []
        objects = [(name, name, for_x86) for name in ("isa", "sampler/cpu", "decode/decode", "decode/amx", "rows/training")]
        # GCC 12 reports its own AVX-512 intrinsics as uninitialized; Clang has no such warning.
        quiet = ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"] if x86 else []
        objects += [(name, name, [*for_x86, *quiet]) for name in ("amx/gemm", "amx/gemm_fp32", "amx/attention")]
        for isa, flags in {"baseline": [], **(X86_ISAS if x86 else {})}.items():
            objects.append((f"sampler/cpu_row_{isa}", "sampler/cpu_row", [f"-DNGF_ISA={isa}", *flags]))
            for name in ("decode/kernels", "rows/cross_entropy", "rows/attention", "rows/layer_norm", "rows/adamw"):
                objects.append((f"{name}_{isa}", name, [f"-DNGF_ISA={isa}", *flags, *VECTOR_FLAGS]))
        # team.h looks up PyTorch's OpenMP with dlsym, which glibc before 2.34 has in a separate library.
        link = ["-ldl"] if sys.platform.startswith("linux") else []
        if nvcc:
            archs = cuda_architectures(nvcc)
            about += ["-DNGF_CUDA", text_macro("NGF_CUDA_VERSION", nvcc_version(nvcc)),
                      text_macro("NGF_CUDA_ARCHS", " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"]))]
            generate = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            generate.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            # -t 0 compiles the architectures in parallel. cudart is static, so no library is needed at run time, and the extension
            # can be imported without a driver.
            nvcc_command = [nvcc, "-ccbin", compiler[0], "-std=c++17", "-O3", "-t", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden",
                            f"-I{source}"]
            cuda_objects = {"sampler/cuda": generate}
            if "90" in archs and not nvcc_version(nvcc).startswith(("11.", "unknown")):     # they use instructions that only Hopper has
                for name in ("hopper/linear_act", "hopper/attention_backward"):
                    cuda_objects[name] = ["-gencode=arch=compute_90a,code=sm_90a"]
                about.append("-DNGF_SM90")
            home = os.path.dirname(os.path.dirname(os.path.realpath(self.real_nvcc(nvcc))))
            folders = [os.path.join(home, lib) for lib in ("lib64", "lib") if glob.glob(os.path.join(home, lib, "libcudart_static.a"))]
            if not folders:
                raise CompileError(f"libcudart_static.a is not beside {nvcc} (looked in {home}/lib64 and {home}/lib)")
            link += [f"-L{folders[0]}", "-lcudart_static", "-ldl", "-lrt"]
        else:
            about.append(text_macro("NGF_CUDA_WHY_NOT", why_not))
        objects.append(("bindings", "bindings", [*about, *(f"-I{include}" for include in includes)]))

        shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        lines = ["rule cxx", f"  command = {q([*compiler, *CXX_FLAGS, '-pthread', f'-I{source}'])} $flags -MMD -MF $out.d -c $in -o $out",
                 "  depfile = $out.d", "  deps = gcc",
                 "rule link", f"  command = {q([*compiler, *shared, '-pthread'])} $in $libraries -o $out"]
        for name, file, flags in objects:
            lines += [f"build {name}.o: cxx {ninja_path(os.path.join(source, file + '.cpp'))}", f"  flags = {q(flags)}"]
        outputs = [f"{name}.o" for name, _, _ in objects]
        if nvcc:
            lines += ["rule nvcc", f"  command = {q(nvcc_command)} $flags -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
            for name, flags in cuda_objects.items():
                lines += [f"build {name}.o: nvcc {ninja_path(os.path.join(source, name + '.cu'))}", f"  flags = {q(flags)}"]
                outputs.append(f"{name}.o")
        lines += [f"build {ninja_path(target)}: link {' '.join(outputs)}", f"  libraries = {q(link)}", ""]
        return "\n".join(lines)

    @staticmethod
    def real_nvcc(nvcc):
        """The nvcc of the toolkit: the command may be a script or a link elsewhere, but --dryrun prints where its toolkit is."""
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
        return os.path.join(found.group(1).strip(), "bin", "nvcc") if found else nvcc


def description():
    """README.md for a package index, which has none of our files: a picture becomes its caption, a link to a file its own text."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = re.sub(r"<!-- .*? -->\n", "", file.read())
    text = re.sub(r"!\[(.*?)\]\((?!https?:)(.*?)\)", r"*\1: \2 in the source archive.*", text)
    return re.sub(r"\[(.*?)\]\((?!https?:).*?\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("nanogpt_fast._C", sources=glob.glob("csrc/**/*.c*", recursive=True),
                           depends=glob.glob("csrc/**/*.h", recursive=True), optional=cuda_wanted() != "1")],
    cmdclass={"build_ext": NinjaBuildExt},
    setup_requires=nvcc_from_pypi(),
)
