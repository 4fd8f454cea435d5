"""Counting a training step on a GPU without one: operations, bytes, FLOPs. `python -m benchmarks.count` is the command."""
