"""Everything static is in pyproject.toml; this file only builds the C++/CUDA extension `nanogpt_fast._C`."""
from setuptools import setup

setup()
