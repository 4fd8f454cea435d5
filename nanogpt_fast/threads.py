"""How the threads of PyTorch's operators wait for each other on a CPU: asleep in our commands, and not spinning.

Between two operators OpenMP's threads spin: each keeps its core busy for milliseconds, in case the next operator comes soon. Where another
program computes too, they spin while the thread that they wait for has no core, and a training step takes ten times as long or worse.
Asleep they cost a wake-up an operator: a third of a small model's speed when nothing else runs (docs/cpu.md has the figures).
"""
import os
import sys

# OpenMP reads them when torch is loaded: GNU's the first two, LLVM's and Intel's the first and the last.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_set_here = False


def sleep_while_waiting():
    """Let OpenMP's threads sleep while they wait, in this process and in those that it starts. Does nothing where one of VARIABLES is set,
    or where torch is loaded already, after which nothing changes it."""
    global _set_here
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        _set_here = True


def about():
    """How the threads wait, and who decided it, in one line."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if _set_here:
        return ("sleep while they wait (OMP_WAIT_POLICY=passive); GOMP_SPINCOUNT=300000 lets them spin, which is faster for small models "
                "on an idle machine")
    if given:
        return f"wait as the environment says: {', '.join(given)}"
    return "spin while they wait, OpenMP's default; if other programs compute here, set OMP_WAIT_POLICY=passive before Python starts"
