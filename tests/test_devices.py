"""Choosing a device: what torch offers, by itself or by name, and a clear error for what is not there. How ranks find each other."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanogpt_fast import devices
from nanogpt_fast.devices import choose_device, make_current


@pytest.mark.parametrize("found", ["cuda", "mps", "xpu"])
def test_auto_takes_whatever_accelerator_torch_finds(monkeypatch, found):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(found))
    assert choose_device() == torch.device(found)
    assert choose_device("cpu") == torch.device("cpu")  # a name overrides it


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert choose_device("auto") == torch.device("cpu")


def test_a_name_takes_that_device_and_its_index_counts(monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "set_device", made_current.append)
    assert choose_device("xpu:1") == torch.device("xpu:1") and not made_current
    assert [make_current(torch.device(name)) for name in ("xpu", "xpu:1", "cpu:0", "mps:0")][1] == torch.device("xpu:1")
    assert made_current == [torch.device("xpu:1")]
    with pytest.raises(RuntimeError, match=r"device=xpu:2, but PyTorch .* sees 2 XPU device\(s\)"):
        choose_device("xpu:2")


@pytest.mark.parametrize("name, error, text", [("gpu", ValueError, "device is 'gpu'; expected auto, cpu, cuda"),
                                               ("xpu", RuntimeError, "device=xpu, but PyTorch .* sees no XPU")])
def test_what_is_no_device_or_not_there_is_named(monkeypatch, name, error, text):
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    with pytest.raises(error, match=text):
        choose_device(name)


def test_a_process_alone_makes_its_device_current(monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.xpu, "set_device", made_current.append)
    with devices.ranks(None, torch.device("xpu:1")) as (ranks, device):
        assert made_current == [device] == [torch.device("xpu:1")] and ranks == devices.Ranks()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_a_group_of_one_takes_a_gpu_without_a_number(monkeypatch):
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **more: joined.append(args))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with devices.ranks(None, torch.device("cuda"), group_of_one=True) as (ranks, device):
        assert (ranks, device, joined) == (devices.Ranks(), torch.device("cuda"), [("nccl",)])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_ranks_that_torchrun_starts_again_share_a_store_without_what_the_former_ones_left(monkeypatch):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)     # torchrun's, for all its starts
    for name, value in dict(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port)).items():
        monkeypatch.setenv(name, value)

    def started():
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda rank: devices._store_of_this_start(devices.Ranks(rank, rank, 3)), range(3)))
    for number in range(3):
        first, second, third = started()
        assert not first.check(["address of rank 2"])
        third.set("address of rank 2", str(number))
        assert second.get("address of rank 2") == first.get("address of rank 2") == str(number).encode()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert devices._store_of_this_start(devices.Ranks()) is None        # PyTorch's own way
