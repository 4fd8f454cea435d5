import pytest

from nanogpt_fast.swap import parts


@pytest.fixture
def on_ops(monkeypatch):
    """Swapped modules take their formulas although no kernel runs, so that what a formula drops shows as a number."""
    monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
