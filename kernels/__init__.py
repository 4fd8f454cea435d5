"""Triton kernels and their launchers: tensors in, tensors out. No autograd, no policy, no import from nanogpt_fast
(but for `gate`, a command, which prints its tables as the others do).

Installed as `nanogpt_fast.kernels`; `kernels/README.md` is the guided tour.
"""
