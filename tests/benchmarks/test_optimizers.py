"""The table of AdamW beside Muon: what loss it counts the steps to."""
from benchmarks import optimizers


def curve(*losses, seconds=1.0):
    """Evaluations every 10 steps, each of which takes so many seconds."""
    return [[10 * i, 10 * i * seconds, loss] for i, loss in enumerate(losses)]


def test_steps_are_counted_to_the_loss_that_the_better_adamw_ends_with_for_the_same_seed():
    record = dict(benchmark="optimizers", run="laptop", device="cpu", seeds=[1, 2], commands={"Muon": "nanogpt-fast train --optimizer=muon"},
                  curves={"AdamW": [curve(4, 3, 2.5), curve(4, 3, 2.6)], "AdamW, learning_rate=4e-3": [curve(4, 3, 2.0), curve(4, 2.2, 2.1)],
                          "Muon": [curve(4, 2.1, 1.5, seconds=1.5), curve(4, 2.0, 1.6, seconds=1.5)]},
                  environment=dict(time="2026-01-01", cpu="a CPU", threads=1, torch="2", commit="abc", load=3.0, cores=2))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in optimizers.section([record]).splitlines() if line.startswith("|")]
    assert rows[2:5] == [["AdamW", "2.500, 2.600", "never, never", "", "1.00", ""],
                         ["AdamW, learning_rate=4e-3", "2.000, 2.100", "20, 20", "1.00", "1.00", "1.00"],
                         ["Muon", "1.500, 1.600", "20, 10", "0.75", "1.50", "1.12"]]
