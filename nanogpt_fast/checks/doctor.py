"""`nanogpt-fast doctor`: what is installed, what runs because of it, and how to fix what is missing.

People run it when something is broken, so it assumes that nothing works: this file imports only the standard library (so do threads.py,
tables.py and options.py), each probe runs in `look`, which turns any exception into a finding, and PyTorch, Triton, the driver and the
extension are probed in processes of their own, where even a crash (a library with another ABI) is a finding.
"""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nanogpt_fast import options, tables
from nanogpt_fast.options import option
from nanogpt_fast.threads import about

PACKAGE = Path(__file__).parents[1]
WHEELS = "https://download.pytorch.org/whl"
SECONDS = 120  # for one probe: importing torch from a cold network disk takes a minute


@dataclass
class DoctorOptions:
    """Says what is installed, what runs because of it, and how to fix what is missing. It assumes that nothing works: PyTorch, Triton, the
    driver and the extension are probed in processes of their own, where even a crash is a finding."""
    format: str = tables.format_option()
    json: bool = option(False, "print the findings as one JSON object in place of the tables")


def main(argv):
    """The command `nanogpt-fast doctor`: prints the findings. Exit status 0 whatever is missing; 1 if PyTorch does not import."""
    o = options.parse(DoctorOptions, argv, "nanogpt-fast doctor")
    findings = examine()
    print(json.dumps(findings, indent=1) if o.json else report(findings, o.format))
    if o.format == "csv" and not o.json:
        print("\n".join(_ops(findings["ops"])[0]), file=tables.aside(o.format))
    return 0 if "error" not in findings["torch"] else 1


def examine():
    """All findings as one dict. A section whose probe failed holds {"error": why}."""
    return {"machine": look(machine), "compilers": look(compilers), "driver": look(driver), "torch": ask(TORCH),
            "triton": ask(TRITON), "extension": extension(), "ops": ask(OPS)}


# ------------------------------------------------------------------------------------------------------------------- probes

def look(probe):
    """What a probe finds, or {"error": why it failed}."""
    try:
        return probe()
    except Exception as error:  # any failure is a finding
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def ask(code):
    """Run Python code in its own process; returns what it prints as JSON, or {"error": the exception's first line}."""
    # A value of NANOGPT_FAST_BACKEND that this package rejects would hide everything else; only OPS looks at it.
    environment = {key: value for key, value in os.environ.items() if key != "NANOGPT_FAST_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE.parent), environment.get("PYTHONPATH"))))
    environment["NANOGPT_FAST_ASKED"] = os.environ.get("NANOGPT_FAST_BACKEND", "")
    try:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True,
                              timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS} s"}
    except OSError as error:
        return {"error": first_line(error)}
    if done.returncode == 0:
        try:
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return {"error": f"unexpected output: {done.stdout[-200:]!r}"}
    if done.returncode < 0:
        return {"error": f"the process was killed: {signal.Signals(-done.returncode).name}"}
    last_traceback = done.stderr.rpartition("Traceback (most recent call last):\n")[2].rstrip().splitlines()
    lines = [line for line in last_traceback if not line.startswith(" ")]       # the exception, of which a message may have several
    return {"error": lines[0] if lines else f"exit status {done.returncode}"}


def first_line(error):
    return (str(error).strip().splitlines() or [""])[0]


def machine():
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
             "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    found["waiting"] = about()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        found["cpu"] = next(names, platform.processor())
        flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
        known = (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("avx512_bf16", "AVX-512 bf16"), ("amx_bf16", "AMX bf16"),
                 ("asimd", "NEON"))
        found["features"] = [name for flag, name in known if flag in flags]
    return found


def compilers():
    """The C++ compiler and nvcc, in the places where setup.py looks."""
    found = {}
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    found["c++"] = version([*compiler.split(), "--version"]) if compiler else None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvccs = [*(os.path.join(home, "bin", "nvcc") for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in nvccs if path and os.access(path, os.X_OK)), None)
    release = re.search(r"release (\S+),", run([nvcc, "--version"])) if nvcc else None
    found["nvcc"] = release.group(1) if release else ("it does not answer" if nvcc else None)
    return found


def driver():
    """What nvidia-smi says; it needs the driver but no CUDA."""
    if not shutil.which("nvidia-smi"):
        return {"error": "there is no nvidia-smi: no NVIDIA driver is installed"}
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return {"error": f"nvidia-smi: {first_line(done.stdout + done.stderr)}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.strip().splitlines()]
    return {"gpus": [dict(zip(("name", "driver", "capability", "memory"), row)) for row in rows]}


def version(command):
    lines = run(command).splitlines()
    return lines[0].strip() if lines else "it does not answer"


def run(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def extension():
    """nanogpt_fast._C: whether it exists, whether it loads, what it contains."""
    files = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    missing = PACKAGE / "_C_missing.txt"
    if not files:
        text = look(missing.read_text) if missing.exists() else "it was not built"
        return {"error": first_line(text) if isinstance(text, str) else text["error"]}
    found = ask(EXTENSION.replace("@PACKAGE@", repr(str(PACKAGE))))
    if "error" in found:
        found["error"] = f"{', '.join(files)} does not load: {found['error']}"
    return found


# The probes that run in their own processes. Each prints one line of JSON.

TORCH = """
    import json, torch
    found = {"version": torch.__version__, "cuda_build": torch.version.cuda, "threads": torch.get_num_threads(), "cuda": False}
    if torch.version.cuda:
        try:
            torch.cuda.init()  # raises the reason, which is_available does not give
            found["cuda"] = torch.cuda.is_available()
            found["capability"] = torch.cuda.get_device_capability()
            found["gpu"] = torch.cuda.get_device_name()
            (torch.ones(8, device="cuda") + 1).sum().item()
        except Exception as error:
            found["cuda_error"] = str(error).strip().splitlines()[0]
            found["cuda"] = False
    print(json.dumps(found))
"""

TRITON = """
    import json, triton
    import triton.language
    print(json.dumps({"version": triton.__version__, "interpreted": triton.knobs.runtime.interpret}))
"""

# Loaded by its path: importing it through the package would import torch, which may be what is broken.
EXTENSION = """
    import glob, importlib.util, json, os
    path = next(path for path in sorted(glob.glob(os.path.join(@PACKAGE@, "_C.*"))) if path.endswith((".so", ".pyd")))
    import sysconfig
    mine = os.path.join(@PACKAGE@, "_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not os.path.exists(mine):
        raise SystemExit(f"it was built for another Python; this one loads {os.path.basename(mine)}")
    spec = importlib.util.spec_from_file_location("nanogpt_fast._C", mine)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = dict(module.build_info())
    found["cuda_here"] = module.cuda_why_not(0) or None
    print(json.dumps(found))
"""

# Which implementations `auto` takes, and why nothing faster: for a training step of a small GPT as the trainer calls it, in the dtype
# that the trainer would choose, for one decoding step and for one draw of the sampler. No kernel is launched.
OPS = """
    import contextlib, io, json, os
    import torch
    from nanogpt_fast import GPT, GPTConfig, backend, devices, explain, generation
    from nanogpt_fast.ops import sampler
    from nanogpt_fast.ops.hopper import attention as hopper_attention, mlp as hopper_mlp
    from nanogpt_fast.training.half_weights import HalfWeights
    from nanogpt_fast.tuning import saved
    found = {}
    asked = os.environ["NANOGPT_FAST_ASKED"]
    try:
        backend.parse(asked or None)
    except ValueError as error:
        found["environment"] = str(error)
        asked = ""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=128), backend=asked or None).to(device)
    training = devices.choose_dtype("auto", torch.device(device), 128)
    found["training"] = str(training).removeprefix("torch.") + (f": {devices.why_dtype(128)}" if device == "cpu" else "")
    with HalfWeights(model, training).in_use():
        rows = [list(row) for row in explain(model, dtype=training, return_logits=False)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found["tuned"] = saved.about(device == "cuda")
    with backend.recording() as record, torch.no_grad():
        generation.Session(model.eval(), 1, dtype)
        sampler.implementation(torch.zeros(1, 8, device=device), backend=model.backend)
    rows += [[op, name, "; ".join(reasons)] for op, _, name, reasons in record]
    taken, hopper = [row[:2] for row in rows], device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    if hopper and ["mlp", "triton"] in taken:
        why_not = hopper_mlp.why_not(torch.device(device), training, 768, 3072, "gelu")
        rows.append(["mlp, 2,048 rows on", "cpp" if why_not is None else "triton", why_not or ""])
    if hopper and (["attention", "triton"] in taken or ["attention", "cudnn"] in taken):
        why_not = hopper_attention.why_not(torch.device(device), training, hopper_attention.HEAD)
        rows.append(["attention, backward", "cpp" if why_not is None else "triton", why_not or ""])
    print(json.dumps({**found, "device": device, "asked": asked, "rows": rows}))
"""


# ------------------------------------------------------------------------------------------------------------------- report

def report(found, format="text"):
    """The findings as text: tables, with lines between them that a CSV file has not."""
    parts = tables.table(("part", "found"), (
        ("Python", _machine(found["machine"])), ("PyTorch", _torch(found["torch"])),
        ("GPU", _gpu(found["driver"], found["torch"])), ("Triton", _triton(found["triton"])),
        ("threads", found["machine"].get("waiting", "unknown")),
        ("compilers", _compilers(found["compilers"])), ("extension", _extension(found["extension"]))), format, "l")
    about, ops = _ops(found["ops"])
    advice = remedies(found)
    sections = [parts, "\n".join(about), tables.table(("op", "runs as", "why nothing faster"), ops, format, "l") if ops else "",
                tables.table(("to fix", "do"), advice, format, "l") if advice else "Nothing is missing."]
    if format == "csv":
        sections = [parts, sections[2], sections[3] * bool(advice)]
    return "\n\n".join(filter(None, sections))


def _machine(m):
    if "error" in m:
        return m["error"]
    cpu = f", {m['cpu']} ({', '.join(m['features']) or 'no vector extensions that we use'})" if "cpu" in m else ""
    return f"{m['python']} on {m['system']}, {m['cores']} cores{cpu}"


def _torch(t):
    if "error" in t:
        return f"BROKEN: {t['error']}"
    build = f"built for CUDA {t['cuda_build']}" if t["cuda_build"] else "built without CUDA"
    return f"{t['version']}, {build}, {t['threads']} threads"


def _gpu(d, t):
    if "error" in d:
        return f"none that can be used: {d['error']}"
    gpus = "; ".join(f"{g['name']}, compute capability {g['capability']}, {g['memory']}, driver {g['driver']}"
                     for g in d["gpus"])
    if t.get("cuda"):
        return gpus
    why_not = "CUDA does not start" if t.get("cuda_build") else "this PyTorch was built without CUDA"
    return f"{gpus}; PyTorch cannot use it: {t.get('cuda_error') or t.get('error') or why_not}"


def _triton(t):
    if "error" in t:
        return f"none that can be imported: {t['error']}"
    interpreting = ", interpreting (TRITON_INTERPRET is set): kernels can be checked, but are slow"
    return t["version"] + (interpreting if t["interpreted"] else "")


def _compilers(c):
    if "error" in c:
        return c["error"]
    return f"{c['c++'] or 'no C++ compiler'}; nvcc {c['nvcc'] or 'not found'}"


def _extension(e):
    if "error" in e:
        return f"none: {e['error']}"
    cuda = f"CUDA {e['cuda']} for {e['cuda_archs']}" if e["cuda"] else f"without CUDA ({e['cuda_why_not']})"
    return f"version {e['version']}, CPU code for {e['cpu_isas']}; {cuda}"


def _ops(ops):
    """(lines about what `auto` takes, the rows of the table of ops)."""
    if "error" in ops:
        return [f"Which ops run is unknown: {ops['error']}"], []
    asked = f"with NANOGPT_FAST_BACKEND={ops['asked']}" if ops["asked"] else "`auto`"
    lines = [f"On the {'GPU' if ops['device'] == 'cuda' else 'CPU'} {asked} takes:"]
    if "environment" in ops:
        lines.insert(0, f"NANOGPT_FAST_BACKEND is invalid, so importing nanogpt_fast fails: {ops['environment']}")
    if "training" in ops:
        lines.append(f"training in {ops['training']}")
    if ops.get("tuned"):
        lines.append(f"tuned: {ops['tuned']}")
    names = {"reference": "plain PyTorch", "triton": "Triton kernel", "cpp": "C++/CUDA extension", "error": "nothing: raises"}
    return lines, [(op, names.get(name, name), reason) for op, name, reason in ops["rows"]]


def remedies(found):
    """[(what is wrong, how to fix it)]."""
    torch, triton, driver, ext, ops = (found[name] for name in ("torch", "triton", "driver", "extension", "ops"))
    advice, rebuild = [], "pip install --force-reinstall --no-deps --no-cache-dir SOURCES    (a clone's folder or the source archive)"
    if (PACKAGE.parent / "pyproject.toml").exists():
        rebuild = "pip install -e .    (in the folder of the clone)"
    has_gpu = "gpus" in driver
    if "error" in torch:
        advice.append(("PyTorch does not import", "pip install --force-reinstall torch"))
    elif has_gpu and not torch["cuda_build"]:
        advice.append(("PyTorch without CUDA", f"pip install --force-reinstall torch --index-url {WHEELS}/cu128"))
    elif has_gpu and not torch["cuda"]:
        if "driver" in torch.get("cuda_error", "").lower():
            advice.append((f"a driver older than CUDA {torch['cuda_build']} needs", "update the NVIDIA driver, or take a "
                           f"PyTorch built for an older CUDA: pip install torch --index-url {WHEELS}/cu126"))
        else:
            advice.append(("CUDA does not start", "nvidia-smi, and the kernel's log (dmesg), say more; CUDA_VISIBLE_DEVICES "
                           "may hide the GPU"))
    elif not has_gpu:
        advice.append(("no GPU: Triton kernels stay idle", "nothing, unless the machine has one: install its driver"))
    capability = torch.get("capability")
    if capability and tuple(capability) < (8, 0):
        advice.append((f"compute capability {capability[0]}.{capability[1]}",
                       "no fix: the Triton kernels need 8.0 (A100, RTX 30) or later"))
    if "error" in triton and platform.system() == "Linux":
        advice.append(("no Triton", "pip install --force-reinstall triton"))
    elif triton.get("interpreted"):
        advice.append(("Triton interprets its kernels", "unset TRITON_INTERPRET"))
    if "error" in ext:
        compilers = found["compilers"]
        need = "" if compilers.get("c++") else "apt install g++ python3-dev, then "
        advice.append(("no extension" if not list(PACKAGE.glob("_C.*")) else "the extension does not load", need + rebuild))
    elif has_gpu and not ext["cuda"]:
        if found["compilers"].get("nvcc"):
            advice.append(("the extension has no CUDA part", rebuild))
        else:
            advice.append(("the extension has no CUDA part", f"NANOGPT_FAST_CUDA=1 {rebuild}"))
    elif has_gpu and torch.get("cuda") and ext["cuda_here"]:
        arch = "".join(map(str, capability)) if capability else "90"
        advice.append(("the extension cannot launch here", f"NANOGPT_FAST_CUDA_ARCHS={arch} {rebuild}    ({ext['cuda_here']})"))
    if "environment" in ops:
        advice.append(("NANOGPT_FAST_BACKEND", "unset NANOGPT_FAST_BACKEND, or set it to auto, fused or reference"))
    elif "NANOGPT_FAST_KERNELS" in ops.get("error", ""):
        advice.append(("NANOGPT_FAST_KERNELS", "correct the file that it names, or unset it"))
    elif "error" in ops and "error" not in torch:
        advice.append(("nanogpt_fast does not import", rebuild))
    return advice
