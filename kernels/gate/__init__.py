"""The compile gate: compiles every kernel, in every row of its tile table, without a GPU, and checks the result against limits.

    __main__.py     the command `python -m nanogpt_fast.kernels.gate`, and what its columns mean
    case.py         Case: one kernel, specialised one way
    adamw.py, attention.py, cross_entropy.py, decode.py, embedding.py, layer_norm.py, mlp.py
                    the cases of one family of kernels, and the spills and narrow loads that are allowed there
    families.py     all of them together
    compiling.py    a case through Triton's stages; all cases, in parallel
    measure.py      what the compiled code costs, and the limits

The gate imports the kernels; no kernel imports the gate.
"""
