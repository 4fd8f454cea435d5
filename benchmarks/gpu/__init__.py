"""What a quarter of an hour on a GPU machine can measure; every result is written as soon as it exists.

    benchmarks/gpu.sh DIR              everything, without a limit
    benchmarks/gpu.sh DIR first 6      the first run, in at most 6 minutes: is it correct, how fast is a step, where does the time go
    benchmarks/gpu.sh DIR second 5     the second: the sweep of forms and tiles, more tests, the step again
    benchmarks/gpu.sh DIR rest 5       memory checks, all tests, generation, the baby GPT, peers, counters, the trainer varied

`__main__.py` lists the stages and `lease.py` runs them against the clock. `smoke.py` and `sweep.py` hold the stages that are not also
commands of the package.
"""
