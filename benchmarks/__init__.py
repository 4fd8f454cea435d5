"""Measurements that anyone can repeat; README.md beside this file says how they are taken."""
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
