"""Runs on two machines, and runs that lose a rank: all end at once and the rank is named; fewer go on; torchrun starts them again."""
import contextlib
import dataclasses
import shutil
import socket

import kills
import pytest
import tiny
import together
import torch

from nanogpt_fast import devices
from nanogpt_fast.training import progress
from nanogpt_fast.training.trainer import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


@contextlib.contextmanager
def one_host_twice():
    """In place of together.two_hosts."""
    yield [(), ()], "127.0.0.1", {}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [together.two_hosts, one_host_twice])
def test_a_killed_rank_of_two_machines_ends_all_and_is_named_and_fewer_ranks_go_on(hosts, folder):
    with contextlib.ExitStack() as stack:
        try:
            prefixes, address, environment = stack.enter_context(hosts())
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        o = tiny.options(folder, backend="gloo,reference", gradient_accumulation_steps=4, max_iters=20, eval_interval=5, grad_clip=0.0,
                         shard=True)
        machines = [stack.enter_context(together.Torchrun(
            folder, o, "--nnodes=2", f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}", "--nproc_per_node=2",
            kills=[(0, 3, 8)], at=prefix, **environment)) for number, prefix in enumerate(prefixes)]
        (first, of_first), (second, of_second) = (machine.wait() for machine in machines)
        assert together.killed_at(o) < 30
    assert first != 0 and second != 0
    # torchrun calls the failure that it noted first the root cause: on a busy machine that may be the rank that lost its peer.
    assert "rank      : 3 (local_rank: 1)" in of_second and "SIGKILL" in of_second
    where = "host-a" if environment else socket.gethostname()
    assert f"rank 0 on {where} lost its connection to another rank" in of_first and "[rank0]: Traceback" not in of_first
    assert list(tiny.losses(o))[-1] in (7, 8)

    fewer = dataclasses.replace(o, out_dir=str(folder / "fewer"), init_from="resume")
    ddp = dataclasses.replace(fewer, out_dir=str(folder / "ddp"), shard=False)
    for copy in (fewer, ddp):
        shutil.copytree(o.out_dir, copy.out_dir)
    printed = together.train([fewer, ddp])
    assert "saved by 4 ranks, resumed by 2" in printed and printed.count("step 5\n") == 2
    assert tiny.losses(fewer) == tiny.losses(ddp) and list(tiny.losses(fewer)) == list(range(20))
    assert tiny.evaluations(fewer) == tiny.evaluations(ddp)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [True, False])
def test_ranks_that_torchrun_starts_again_take_the_steps_of_a_run_that_lost_none(shard, folder):
    given = dict(backend="gloo,reference", gradient_accumulation_steps=2, max_iters=10, eval_interval=4, dropout=0.1, shard=shard)
    straight, o = tiny.options(folder, "straight", **given), tiny.options(folder, **given)
    former = dataclasses.replace(o, seed=7, shard=False, gradient_accumulation_steps=1, backend="reference", max_iters=6)
    train(former)       # an earlier run in the folder, which a restart must not go on with
    together.train([straight])
    with together.Torchrun(folder, o, "--standalone", "--nproc_per_node=2", "--max_restarts=2", kills=[(0, 1, 2), (1, 0, 6)]) as ranks:
        status, printed = ranks.wait()
    assert status == 0, printed
    assert printed.count("torchrun has restarted the ranks") == 1 and "this new run replaces it" in printed
    assert tiny.losses(o) == tiny.losses(straight) and tiny.evaluations(o) == tiny.evaluations(straight)


def test_a_restart_goes_on_with_its_own_run_and_a_new_launch_does_not(folder, monkeypatch, capsys):
    def launched(run_id, restarts, max_iters=4, **given):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        o = tiny.options(folder, max_iters=max_iters, eval_interval=2, **given)
        train(o)
        return "goes on from its own last checkpoint" in capsys.readouterr().out, list(tiny.losses(o))
    monkeypatch.setattr(progress, "draw", kills.quick_draw)
    process = iter([1, 1, 2, 2, 2, 3])
    monkeypatch.setattr(devices, "launching_process", lambda: f"process {next(process)}")
    assert launched("job", 0, max_iters=2) == (False, [0, 1])
    assert launched("job", 1) == (True, [0, 1, 2, 3])
    assert launched("job", 1, max_iters=6) == (True, [0, 1, 2, 3, 4, 5])    # by a torchrun that took the place of the first
    assert launched("none", 0) == (False, [0, 1, 2, 3])                     # a new launch
    assert launched("none", 0, max_iters=6) == (True, [0, 1, 2, 3, 4, 5])   # another machine joined: torchrun counts no restart
    assert launched("none", 1) == (False, [0, 1, 2, 3])
