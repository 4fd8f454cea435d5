"""Batches: nanoGPT's draws bit for bit, in the background, resumable."""
import os

import numpy as np
import pytest
import torch

from nanogpt_fast.text import tokens as token_files
from nanogpt_fast.text.batches import Batches
from nanogpt_fast.text.tokens import TokenCheck, open_tokens

B, T = 4, 8


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, size in (("train", 500), ("val", 60)):
        rng.integers(0, 65, size, dtype=np.uint16).astype("<u2").tofile(tmp_path / f"{split}.bin")
    return tmp_path


def upstream_get_batch(folder, split):
    """What nanoGPT's get_batch computes."""
    data = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
    offsets = torch.randint(len(data) - T, (B,))
    windows = [[torch.from_numpy(data[o + s:o + s + T].astype(np.int64)) for o in offsets] for s in (0, 1)]
    return torch.stack(windows[0]), torch.stack(windows[1])


def take(batches, steps):
    return [torch.stack(batches.next()) for _ in range(steps)]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_those_of_nanogpt(folder, split):
    torch.manual_seed(1337)
    theirs = [torch.stack(upstream_get_batch(folder, split)) for _ in range(20)]
    torch.manual_seed(1337)
    assert equal(take(Batches(folder, split, B, T), 20), theirs)


def test_prefetching_keeps_the_order_of_draws_with_dropout_in_between(folder):
    def run(get, prefetch):
        torch.manual_seed(7)
        seen = []
        prefetch()
        for _ in range(10):
            x, y = get()
            seen.append(torch.stack((x, y)))
            seen.append(torch.nn.functional.dropout(torch.ones(16), 0.5))  # the forward pass draws from the same generator
            prefetch()
        return seen

    batches, waiting = Batches(folder, "train", B, T), []
    theirs = run(waiting.pop, lambda: waiting.append(upstream_get_batch(folder, "train")))
    assert equal(run(batches.next, batches.prefetch), theirs)


def test_a_second_prefetch_draws_nothing(folder):
    batches = Batches(folder, "train", B, T)
    batches.prefetch()
    state = torch.get_rng_state()
    batches.prefetch()
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_that_was_taken_is_not_overwritten_by_later_ones(folder):
    batches = Batches(folder, "train", B, T)
    first = batches.next()[0]
    copy = first.clone()
    take(batches, 5)
    assert torch.equal(first, copy)


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_resumed_run_goes_on_with_the_same_batches(folder, own_generator):
    def new():
        return Batches(folder, "train", B, T, generator=torch.Generator() if own_generator else None)

    torch.manual_seed(1)
    batches = new()
    take(batches, 3)
    batches.prefetch()  # saved with a batch under way, as the trainer does
    saved, random_state = batches.state_dict(), torch.get_rng_state()
    expected = take(batches, 6)
    torch.manual_seed(99)
    resumed = new()
    resumed.prefetch()  # a batch that must be forgotten
    torch.set_rng_state(random_state)
    resumed.load_state_dict(saved)
    assert equal(take(resumed, 6), expected)


def test_the_state_survives_a_file(folder, tmp_path):
    batches = Batches(folder, "train", B, T, generator=torch.Generator())
    batches.prefetch()
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = take(batches, 3)
    resumed = Batches(folder, "train", B, T, generator=torch.Generator())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(take(resumed, 3), expected)


def test_a_state_of_other_data_or_another_shape_is_refused(folder):
    batches = Batches(folder, "train", B, T)
    batches.prefetch()
    state = batches.state_dict()
    with pytest.raises(ValueError, match="held 500 when"):
        Batches(folder, "val", B, T).load_state_dict(state)
    with pytest.raises(ValueError, match="does not fit batch_size 5"):
        Batches(folder, "train", 5, T).load_state_dict(state)


def test_every_window_of_the_file_can_be_drawn_and_none_beyond(folder):
    np.arange(T + 3, dtype="<u2").tofile(folder / "train.bin")  # offsets 0, 1 and 2
    drawn = torch.cat([xy[0, :, 0] for xy in take(Batches(folder, "train", B, T), 40)])
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


def test_the_shortest_possible_file_is_one_block_and_one_token(folder):
    np.arange(T + 1, dtype="<u2").tofile(folder / "train.bin")
    x, y = Batches(folder, "train", B, T).next()
    assert torch.equal(x, torch.arange(T).expand(B, T)) and torch.equal(y, x + 1)
    np.arange(T, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(ValueError, match="holds 8 tokens; with block_size 8 it must hold at least 9"):
        Batches(folder, "train", B, T)


def test_ids_are_little_endian_and_reach_65535(folder):
    (folder / "train.bin").write_bytes(b"\x01\x02" * (T + 1))
    assert Batches(folder, "train", B, T).next()[0][0, 0] == 0x0201
    (folder / "train.bin").write_bytes(b"\xff\xff" * (T + 1))
    assert Batches(folder, "train", B, T).next()[0][0, 0] == 65535


def test_a_token_outside_the_vocabulary_is_named_with_its_place(folder):
    tokens = np.zeros(T + 1, dtype="<u2")
    tokens[5] = 65
    tokens.tofile(folder / "train.bin")
    with pytest.raises(ValueError, match="holds token 65 at position 5, outside the model's vocabulary of 65"):
        Batches(folder, "train", B, T, vocab_size=65).next()
    Batches(folder, "train", B, T, vocab_size=66).next()


def test_missing_and_damaged_files_are_clear_errors(folder):
    with pytest.raises(FileNotFoundError, match="nanogpt-fast prepare"):
        Batches(folder / "nowhere", "train", B, T)
    (folder / "train.bin").write_bytes(b"\x00" * 101)
    with pytest.raises(ValueError, match="101 bytes long, which is not a whole number"):
        Batches(folder, "train", B, T)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 tokens"):
        Batches(folder, "train", B, T)


def test_preparing_again_does_not_disturb_a_running_job(folder):
    batches = Batches(folder, "train", B, T)
    before = batches.tokens[:].copy()
    replacement = folder / "new.bin"
    np.zeros(20, dtype="<u2").tofile(replacement)
    replacement.replace(folder / "train.bin")
    take(batches, 3)
    assert np.array_equal(batches.tokens, before)
    assert len(open_tokens(folder / "train.bin")) == 20


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("position", [0, 59])
def test_a_check_finds_the_one_bad_id_wherever_it_is(folder, split, position, monkeypatch):
    monkeypatch.setattr(token_files, "CHUNK", 50)
    TokenCheck(folder, 65).wait()
    tokens = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    tokens[position] = 65
    tokens.tofile(folder / f"{split}.bin")
    check = TokenCheck(folder, 65)
    for _ in range(2):      # whoever asks later learns it too
        with pytest.raises(ValueError, match=f"{split}.bin holds token 65 at position {position}, outside.*Prepare it again"):
            check.wait()
    TokenCheck(folder, 66).wait()
    TokenCheck(folder, 65, active=False).wait()


def test_a_check_that_is_closed_reads_no_further(folder, monkeypatch):
    check = TokenCheck(folder, 65)
    check.close()
    read = []

    class Tokens(np.ndarray):
        def max(self):
            read.append(len(self))
            return 0
    monkeypatch.setattr(token_files, "CHUNK", 50)
    check._run({"train.bin": np.zeros(500, np.uint16).view(Tokens)}, 65)
    assert read == [50]


@pytest.mark.parametrize("what, kind", [("fifo", "a named pipe, not a file"), ("/dev/zero", "a device, not a file"), ("folder", "a folder")])
def test_what_is_no_file_is_named_and_not_read(folder, what, kind):
    (folder / "val.bin").unlink()
    if what == "fifo":
        os.mkfifo(folder / "val.bin")
    elif what == "folder":
        (folder / "val.bin").mkdir()
    else:
        (folder / "val.bin").symlink_to(what)
    for opened in (lambda: Batches(folder, "val", B, T), lambda: TokenCheck(folder, 65, T)):
        with pytest.raises(ValueError, match=f"val.bin is {kind}"):
            opened()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_batches_are_the_same_and_pinned_on_the_way(folder):
    torch.manual_seed(3)
    expected = take(Batches(folder, "train", B, T), 10)
    torch.manual_seed(3)
    batches = Batches(folder, "train", B, T, device="cuda")
    got = take(batches, 10)
    assert all(xy.is_cuda for xy in got) and all(buffer.is_pinned() for buffer, _ in batches._pinned)
    assert equal([xy.cpu() for xy in got], expected)
