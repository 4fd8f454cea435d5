"""A run that is resumed where its data has changed, or its last.pt is damaged: it is noticed and said, with what to do."""
import types

import numpy as np
import pytest
import tiny

from nanogpt_fast.checkpoints.state import CheckpointError, random_states
from nanogpt_fast.text import tokens
from nanogpt_fast.training import start, train


@pytest.mark.parametrize("change", ["nothing", "a token", "one less"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_resumed_run_notices_that_its_data_has_changed(split, change, tmp_path, capsys):
    tiny.data(tmp_path)
    before = train(tiny.options(tmp_path, max_iters=2, eval_interval=2, learning_rate=1e-3))
    path = tmp_path / "data" / "sums" / f"{split}.bin"
    data = np.fromfile(path, "<u2")
    if change == "a token":
        data[len(data) // 2] ^= 1
    elif change == "one less":
        data = data[:-1]
    data.tofile(path)
    capsys.readouterr()
    # At this rate the loss only grows: the best is the former run's, unless that counts no more.
    after = train(tiny.options(tmp_path, init_from="resume", max_iters=4, eval_interval=2, learning_rate=9.0, min_lr=9.0))
    printed, best = capsys.readouterr().out, f"the best loss so far, {before.best_val_loss:.4f}, counts no more"
    assert (f"WARNING: not an exact continuation: {path} holds" in printed) == (split == "train" and change != "nothing")
    other = split == "val" and change != "nothing"
    assert (f"WARNING: the validation data has changed, so that {best}" in printed) == other
    if other:
        losses = {row["iter"]: row["val_loss"] for row in tiny.rows(tmp_path / "out") if "val_loss" in row}
        assert list(losses) == [0, 2, 4] and after.best_val_loss == losses[2]     # of the new data
    else:
        assert after.best_val_loss == before.best_val_loss


@pytest.mark.parametrize("ours, best", [(True, 2.5), (False, start.NONE_YET)])
def test_what_one_rank_notices_holds_on_all(ours, best, monkeypatch, capsys):
    """The other rank's train.bin, or its val.bin, is another one; this rank's are as they were."""
    saved = {"ranks": [{"random": random_states(), "batches": None}] * 2, "scaler": {}, "evaluated_at": 20, "val": 7}
    other = iter([["train.bin holds other tokens"], [not ours]])        # what the other rank found
    ranks = types.SimpleNamespace(size=2, rank=0, gather=lambda mine: [mine, *next(other)])
    batches = types.SimpleNamespace(load_state_dict=lambda state: None)
    begun = {"resume": saved, "best_val_loss": 2.5, "path": "last.pt"}
    found = start.continue_exactly(begun, None, None, types.SimpleNamespace(param_groups=[]), types.SimpleNamespace(is_enabled=lambda: False),
                                   batches, ranks, 7)
    assert (found, begun["best_val_loss"]) == ((20, 2.5) if ours else (None, best))
    assert "WARNING: not an exact continuation: train.bin holds other tokens" in capsys.readouterr().out


@pytest.mark.parametrize("whole, said", [(True, "ckpt.pt is whole, of step 2: move "), (False, "is not a checkpoint, or is damaged")])
def test_a_damaged_last_pt_points_to_a_whole_ckpt_pt(whole, said, tmp_path):
    tiny.data(tmp_path)
    train(tiny.options(tmp_path, max_iters=2, eval_interval=2))
    for path in [tmp_path / "out" / "last.pt"] + [tmp_path / "out" / "ckpt.pt"] * (not whole):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="last.pt is not a checkpoint, or is damaged") as error:
        train(tiny.options(tmp_path, init_from="resume", max_iters=4))
    assert said in str(error.value) and ("move" in str(error.value)) == whole


def test_the_checksum_of_a_large_file_is_of_pieces_from_all_of_it(monkeypatch):
    monkeypatch.setattr(tokens, "WHOLE", 4096)
    data = np.arange(10_000, dtype=np.uint16)
    found = tokens.checksum(data)
    assert found == tokens.checksum(data.copy())
    for at in (0, 5_000, 9_999):
        other = data.copy()
        other[max(0, at - 8):at + 8] ^= 1
        assert tokens.checksum(other) != found
