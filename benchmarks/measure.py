"""Where the scripts of this folder leave their results; the timing itself is nanogpt_fast/measure.py."""
from pathlib import Path

from nanogpt_fast.measure import append, interleaved, medians  # noqa: F401

RESULTS = Path(__file__).parent / "results"
