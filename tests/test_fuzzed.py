"""Random calls of the extension's CPU ops against plain PyTorch (tests/fuzzed.py): a moment of them here, minutes in `make test-all`."""
import os

import fuzzed
import pytest

from nanogpt_fast.ops import extension

pytestmark = pytest.mark.skipif(extension._C is None, reason="the extension is missing")


def test_random_calls_are_right():
    assert fuzzed.run(0.0, least=12).keys() == {op.__name__ for op in fuzzed.OPS}


@pytest.mark.slow
def test_random_calls_are_right_for_minutes():
    fuzzed.run(float(os.environ.get("NANOGPT_FAST_FUZZ_SECONDS", "300")), seed=10**6)


def test_a_wrong_result_is_named(monkeypatch):
    monkeypatch.setattr(fuzzed.norm, "add_layer_norm", lambda x, *args, **kwargs: [y * 1.1 for y in fuzzed.reference.add_layer_norm(x, *args)])
    with pytest.raises(AssertionError, match=r"fuzz_norm, seed \d+: .*relative error"):
        fuzzed.run(0.0)
