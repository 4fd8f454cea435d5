"""A run that is resumed where its data has changed, or its last.pt is damaged: it is noticed and said, with what to do."""
import numpy as np
import pytest
import tiny

from nanogpt_fast.checkpoints.state import CheckpointError
from nanogpt_fast.text import tokens
from nanogpt_fast.training import train


@pytest.mark.parametrize("change, said", [("nothing", None), ("a token", "holds other tokens than when the run was saved, as many"),
                                          ("one less", "the data has changed")])
def test_a_resumed_run_notices_that_its_data_has_changed(change, said, tmp_path, capsys):
    tiny.data(tmp_path)
    before = train(tiny.options(tmp_path, max_iters=2, eval_interval=2, learning_rate=1e-3))
    path = tmp_path / "data" / "sums" / "train.bin"
    data = np.fromfile(path, "<u2")
    if change == "a token":
        data[len(data) // 2] ^= 1
    elif change == "one less":
        data = data[:-1]
    data.tofile(path)
    capsys.readouterr()
    # At this rate the loss only grows: the best is the former run's, unless that counts no more.
    after = train(tiny.options(tmp_path, init_from="resume", max_iters=4, eval_interval=2, learning_rate=9.0, min_lr=9.0))
    printed = capsys.readouterr().out
    if said is None:
        assert "WARNING" not in printed and after.best_val_loss == before.best_val_loss
    else:
        assert f"WARNING: not an exact continuation: {path} " in printed and said in printed
        assert f"so far, {before.best_val_loss:.4f}, was of the former data: it counts no more" in printed
        assert [row["iter"] for row in tiny.rows(tmp_path / "out") if "val_loss" in row][-2:] == [2, 4]         # step 2 is evaluated again


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
