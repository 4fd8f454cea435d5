"""Runs of several ranks: quick ones that one interpreter forks, and torchrun's, on one host or on two.

Two hosts are two network namespaces with a cable between them, and names of their own; `ip netns` needs root. Where it is not permitted,
two torchrun processes on this host stand for them.
"""
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import tiny

_numbers = itertools.count()

FORKED = textwrap.dedent("""
    import json, os, socket, sys
    import torch.distributed.checkpoint, torch.distributed.fsdp     # before the fork, for all ranks
    from nanogpt_fast import options
    from nanogpt_fast.training import progress, trainer
    progress.draw = lambda rows, path: None     # matplotlib takes longer than the runs
    runs, size = json.loads(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as one, socket.socket() as other:
        sockets = [socket.socket() for _ in runs]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
    rank, children = 0, []
    for child in range(1, size):
        pid = os.fork()
        if pid == 0:
            rank, children = child, []
            break
        children.append(pid)
    for words, port in zip(runs, ports):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        trainer.train(options.parse(trainer.TrainOptions, words, "train"))
    sys.exit(any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
    """)


def train(runs, ranks=2):
    """Train with each of these TrainOptions in turn, `ranks` ranks each; returns what they printed. One import of torch serves all."""
    command = [sys.executable, "-c", FORKED, json.dumps([tiny.words(o) for o in runs]), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parents[1]), *sys.path]), **more}


EACH_RANK = textwrap.dedent("""
    # sys.argv: a signal; a JSON list of (attempt, rank, step), at which a rank sends it to itself; and the words of the options
    import json, os, signal, sys, time
    from nanogpt_fast import cli
    from nanogpt_fast.training import progress, trainer
    name, kills, *words = sys.argv[1:]
    kills = json.loads(kills)
    here = [int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK")]
    real = trainer.learning_rate

    def learning_rate(it, o):
        if [*here, it] in kills:
            with open(f"{o.out_dir}/killed-at", "w") as f:
                f.write(str(time.time()))
            os.kill(os.getpid(), getattr(signal, name))
        return real(it, o)
    progress.draw, trainer.learning_rate = lambda rows, path: None, learning_rate
    sys.exit(cli.main(["train", *words]))
    """)


class Torchrun:
    """A torchrun process, started at once; ended, with all that it started, at the end of the `with`. at: a prefix of its command."""

    def __init__(self, folder, o, *words, kills=(), signal="SIGKILL", at=(), **environment):
        script = Path(folder, "each_rank.py")
        script.write_text(EACH_RANK)
        self.log = Path(folder, f"torchrun-{next(_numbers)}.log")
        command = [*at, sys.executable, "-m", "torch.distributed.run", *words, str(script), signal, json.dumps(kills), *tiny.words(o)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(**environment),
                                            start_new_session=True)

    def wait(self, seconds=240):
        """(exit status, what was printed). Fails if it takes longer."""
        status = self.process.wait(seconds)
        return status, self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()


@contextlib.contextmanager
def two_hosts():
    """Yields ([a prefix of commands on each of two hosts], the first one's address, {what the environment needs}).

    Raises OSError, with the reason, where network namespaces are not permitted."""
    names = [f"ngf{os.getpid()}{host}" for host in "ab"]

    def ip(*words, check=True):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if check and done.returncode != 0:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        raise OSError("the commands ip and unshare are not installed")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        prefixes = [["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname host-{host} && exec "$@"', "sh"]
                    for name, host in zip(names, "ab")]
        yield prefixes, "10.77.0.1", dict(GLOO_SOCKET_IFNAME="cable")
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def killed_at(o):
    """Seconds since a rank of EACH_RANK killed itself."""
    return time.time() - float(Path(o.out_dir, "killed-at").read_text())
