"""--shard: the losses, weights and moments are those of DDP, and any number of ranks goes on from what was saved."""
import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import disks
import kills
import pytest
import tiny
import together
import torch

from nanogpt_fast.checkpoints import convert, folder as run_folder, nanogpt as checkpoints, sharded
from nanogpt_fast.checkpoints.state import CheckpointError, untie_head
from nanogpt_fast.devices import Ranks
from nanogpt_fast.training import progress, sharding, trainer
from nanogpt_fast.training.trainer import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """matplotlib takes longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "draw", kills.quick_draw)
        yield


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


def same_state(a, b):
    """Assert that two files hold the same weights, moments and step, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a.keys() == b.keys() and a["iter_num"] == b["iter_num"] and list(a["model"]) == list(b["model"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][key]) for key, value in moments.items())


def test_two_ranks_that_share_the_model_take_the_steps_of_ddp_bit_for_bit_also_where_they_go_on(folder):
    ddp, shard = (tiny.options(folder, name, backend="gloo,reference", gradient_accumulation_steps=4, max_iters=6, eval_interval=3,
                               dropout=0.1, grad_clip=0.0, sample_tokens=3, shard=name == "shard") for name in ("ddp", "shard"))
    printed = together.train([ddp, dataclasses.replace(shard, max_iters=3), dataclasses.replace(shard, init_from="resume")])
    assert "divided among 2 ranks" in printed and "WARNING" not in printed
    assert tiny.losses(shard) == tiny.losses(ddp) and list(tiny.losses(ddp)) == [0, 1, 2, 3, 4, 5]
    assert tiny.evaluations(shard) == tiny.evaluations(ddp) and list(tiny.evaluations(ddp)) == [0, 3, 6]
    same_state(folder / "shard" / "ckpt.pt", folder / "ddp" / "ckpt.pt")
    samples = [line for line in printed.splitlines() if line.startswith("    | ")]
    assert samples[:len(samples) // 2] == samples[len(samples) // 2:]
    assert [path.name[:15] for path in (folder / "shard").glob("shards-*")] == ["shards-00000006"]     # the earlier ones are gone


@pytest.mark.slow
@pytest.mark.parametrize("given, bound", [
    (dict(backend="gloo,reference", dtype="bfloat16", grad_clip=0.0), 0.0),     # FSDP2's casts are autocast's
    (dict(backend="gloo,reference", grad_clip=0.5), 2e-6),      # the norm is summed in another order: a few units in the last place
    (dict(backend="gloo"), 2e-6),                               # DDP's gradients are the extension's, if it is built
    (dict(backend="gloo", dtype="bfloat16"), 3e-2),             # the bound of DDP's own bfloat16 (test_ddp.py)
    (dict(backend="gloo,reference", compile=True), 1e-5),       # compiled, sums have another order
], ids=str)
def test_the_losses_of_two_ranks_that_share_the_model_are_those_of_ddp(given, bound, folder):
    ddp, shard = (tiny.options(folder, name, gradient_accumulation_steps=4, max_iters=12, shard=name == "shard", n_layer=3,
                               **{**given, "compile": given.get("compile", False) and name == "shard"}) for name in ("ddp", "shard"))
    together.train([ddp, shard])
    assert len(tiny.losses(ddp)) == 12
    assert max(abs(loss - tiny.losses(ddp)[it]) for it, loss in tiny.losses(shard).items()) <= bound


@pytest.mark.slow
def test_three_ranks_share_what_three_does_not_divide(folder):
    ddp, shard = (tiny.options(folder, name, backend="gloo,reference", gradient_accumulation_steps=3, max_iters=8, eval_interval=4,
                               grad_clip=0.0, shard=name == "shard", bias=True) for name in ("ddp", "shard"))
    together.train([ddp, dataclasses.replace(shard, max_iters=4), dataclasses.replace(shard, init_from="resume")], ranks=3)
    for it, loss in tiny.losses(shard).items():
        assert loss == pytest.approx(tiny.losses(ddp)[it], abs=2e-6)       # a sum of three rounds
    assert len(tiny.losses(shard)) == 8


@pytest.mark.slow
def test_a_signal_to_one_rank_that_shares_the_model_stops_all_and_they_go_on_exactly(folder):
    straight, o = (tiny.options(folder, name, backend="gloo,reference", gradient_accumulation_steps=2, max_iters=14, dropout=0.1,
                                shard=True) for name in ("straight", "out"))
    together.train([straight])
    with together.Torchrun(folder, o, "--standalone", "--nproc_per_node=2", kills=[(0, 1, 7)], signal="SIGTERM") as ranks:
        status, printed = ranks.wait()
    assert status != 0 and "Stopped at step 8" in printed and max(tiny.losses(o)) == 7
    together.train([dataclasses.replace(o, init_from="resume")])
    assert tiny.losses(o) == tiny.losses(straight) and tiny.evaluations(o) == tiny.evaluations(straight)
    same_state(Path(o.out_dir, "ckpt.pt"), Path(straight.out_dir, "ckpt.pt"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, options) of a finished run of one rank, without torchrun; nothing may change it."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny.data(folder)
    o = tiny.options(folder, shard=True, max_iters=6, eval_interval=3)
    train(o)
    return folder, o


def copied(trained, tmp_path):
    """The options of the finished run in a copy of its folder."""
    folder, o = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    return dataclasses.replace(o, out_dir=str(tmp_path / "out"))


def shards(o):
    (found,) = Path(o.out_dir).glob("shards-*")
    return found


def test_one_rank_without_torchrun_writes_what_a_run_without_shards_writes(trained):
    folder, o = trained
    plain = dataclasses.replace(o, out_dir=str(folder / "plain"), shard=False)
    train(plain)
    assert tiny.losses(o) == tiny.losses(plain) and tiny.evaluations(o) == tiny.evaluations(plain)
    same_state(folder / "out" / "ckpt.pt", folder / "plain" / "ckpt.pt")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("shard", [True, False])
def test_a_run_with_shards_goes_on_from_whole_weights_and_the_other_way_round(shard, trained, tmp_path):
    first = dataclasses.replace(copied(trained, tmp_path), shard=not shard, init_from="resume", max_iters=8)
    train(first)                                                    # from shards to what the last run needs
    last = dataclasses.replace(first, shard=shard, max_iters=10)
    last.given = frozenset(field.name for field in dataclasses.fields(last))      # typed, --shard=False too
    train(last)
    straight = dataclasses.replace(first, out_dir=str(tmp_path / "straight"), shard=False, init_from="scratch", max_iters=10)
    train(straight)
    assert tiny.losses(last) == tiny.losses(straight)
    same_state(Path(last.out_dir, "ckpt.pt"), Path(straight.out_dir, "ckpt.pt"))
    assert len(list(Path(last.out_dir).glob("shards-*"))) == shard


def test_convert_and_sample_read_shards(trained, tmp_path, capsys):
    o = copied(trained, tmp_path)
    out = Path(o.out_dir)
    convert.main([str(out / "last.pt"), str(tmp_path / "ckpt.pt")])
    same_state(tmp_path / "ckpt.pt", out / "ckpt.pt")
    os.utime(out / "ckpt.pt", (1, 1))           # of an earlier save: the run that saved last.pt has not ended
    assert checkpoints.load_model(out)[2]["path"] == out / "last.pt"
    (out / "ckpt.pt").unlink()
    model, tokenizer, meta = checkpoints.load_model(out)
    assert meta["iter_num"] == 6 and tokenizer is not None and model.lm_head.weight is model.transformer.wte.weight
    train(dataclasses.replace(o, init_from="resume"))       # nothing is left to do but its end
    same_state(tmp_path / "ckpt.pt", out / "ckpt.pt")


def test_the_weights_with_the_best_loss_are_kept_until_ckpt_pt_is_made_of_them(folder, monkeypatch):
    found = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(trainer, "estimate_loss", lambda *_: dict(train=0.0, val=next(found)))
    o = tiny.options(folder, shard=True, max_iters=8, eval_interval=2, always_save_checkpoint=False)
    monkeypatch.setattr(trainer.run_folder, "export", lambda out_dir: None)     # killed before its end
    train(dataclasses.replace(o, max_iters=6))
    assert sorted(path.name[:15] for path in (folder / "out").glob("shards-*")) == ["shards-00000002", "shards-00000006"]
    monkeypatch.undo()
    train(dataclasses.replace(o, init_from="resume", shard=False))
    saved = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"]) == (2, 2.0) and "best" not in saved and "shards" not in saved


def refused(o, match):
    for use in (lambda: train(dataclasses.replace(o, init_from="resume", max_iters=8)),
                lambda: checkpoints.load_model(Path(o.out_dir, "last.pt"))):
        with pytest.raises(CheckpointError, match=match):
            use()


def test_damaged_or_missing_shards_are_refused(trained, tmp_path):
    o = copied(trained, tmp_path)
    (file,) = shards(o).glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(o, f"{file.name} is missing or has another checksum")
    shutil.rmtree(shards(o))
    refused(o, "is missing. The two belong together")


def test_a_metadata_file_that_would_run_code_is_refused(trained, tmp_path):
    o = copied(trained, tmp_path)

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)
    (shards(o) / ".metadata").write_bytes(pickle.dumps(Runs()))
    saved = torch.load(Path(o.out_dir, "last.pt"), weights_only=True)
    saved["shards"]["files"][".metadata"] = sharded._checksum(shards(o) / ".metadata")
    torch.save(saved, Path(o.out_dir, "last.pt"))
    refused(o, "it refers to posix.mkdir")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("number", [3, 4, 6])      # of shards, of .metadata, of last.pt; 1, 2 and 5 are of metrics.jsonl and of folders
def test_a_full_disk_leaves_the_former_shards_and_nothing_else(number, trained, tmp_path, monkeypatch):
    o = copied(trained, tmp_path)
    before = {path: path.read_bytes() for path in [Path(o.out_dir, "last.pt"), *shards(o).iterdir()]}
    with monkeypatch.context() as patch:
        disks.full_at_fsync(patch, number)
        with pytest.raises(CheckpointError, match="No space left on device.*The previous"):
            train(dataclasses.replace(o, init_from="resume", max_iters=8))
    assert {path: path.read_bytes() for path in [Path(o.out_dir, "last.pt"), *shards(o).iterdir()]} == before


@pytest.mark.parametrize("name", ["last.pt", "ckpt.pt"])
def test_a_kill_before_a_rename_loses_nothing(name, trained, tmp_path, monkeypatch):
    o = dataclasses.replace(copied(trained, tmp_path), init_from="resume", max_iters=8)
    real = os.replace

    def replace(source, target):
        if os.path.basename(target) == name:
            raise kills.Killed
        real(source, target)
    with monkeypatch.context() as patch, pytest.raises(kills.Killed):
        patch.setattr(os, "replace", replace)
        train(o)
    assert len(list(Path(o.out_dir).glob("shards-*"))) == (2 if name == "last.pt" else 1)
    train(o)
    assert list(tiny.losses(o)) == list(range(8)) and torch.load(Path(o.out_dir, "ckpt.pt"), weights_only=True)["iter_num"] == 8
    assert shards(o).name.startswith("shards-00000008")


@pytest.mark.parametrize("given, words", [(dict(dtype="float16"), "Use --dtype=bfloat16 or --dtype=float32"),
                                          (dict(cuda_graph="on"), "cuda_graph=auto trains without graphs")])
def test_options_that_cannot_work_with_shards_are_refused(given, words, folder):
    with pytest.raises(ValueError, match=words):
        train(tiny.options(folder, shard=True, **given))


def test_ranks_that_do_not_see_one_folder_are_refused(folder):
    class Two(Ranks):
        def gather(self, value):        # the other rank has another folder, or none
            return [value, None if isinstance(value, tuple) and isinstance(value[0], int) else ("far", False)]
    with run_folder.owned(folder / "out"), pytest.raises(RuntimeError, match="on far that is not the folder that the first rank"):
        sharding.refuse_separate_folders(folder / "out", Two(0, 0, 2))


def test_a_head_with_its_own_matrix_is_divided_saved_and_read_like_the_rest(trained, tmp_path):
    o = dataclasses.replace(copied(trained, tmp_path), init_from="resume", max_iters=8)
    saved = checkpoints.read(Path(o.out_dir, "ckpt.pt"))
    model = untie_head(checkpoints.build_model(saved, "ckpt.pt"))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    shutil.rmtree(o.out_dir)
    for name in ("out", "plain"):
        (tmp_path / name).mkdir()
        checkpoints.save(checkpoints.contents(model, optimizer, iter_num=6, best_val_loss=9.0, config={}), tmp_path / name / "ckpt.pt")
    plain = dataclasses.replace(o, out_dir=str(tmp_path / "plain"), shard=False)
    for each in (o, plain):
        train(each)
        train(dataclasses.replace(each, max_iters=10))
    assert tiny.losses(o) == tiny.losses(plain)
    same_state(tmp_path / "out" / "ckpt.pt", tmp_path / "plain" / "ckpt.pt")
    assert "lm_head.bias" in torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]


@pytest.mark.parametrize("shard", [True, False])
def test_a_ckpt_pt_that_nanogpt_has_trained_further_is_not_replaced_by_older_shards(shard, trained, tmp_path):
    o = copied(trained, tmp_path)
    path = Path(o.out_dir, "ckpt.pt")
    saved = torch.load(path, weights_only=True)
    torch.save({**{key: value for key, value in saved.items() if key not in ("run", "tokenizer")}, "iter_num": 8}, path)
    written = path.read_bytes()
    train(dataclasses.replace(o, init_from="resume", max_iters=7, shard=shard))     # which leaves nothing to do, not even to save
    assert path.read_bytes() == written
