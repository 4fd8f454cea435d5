"""What a GPU machine can tell in a quarter of an hour, so that nothing that was measured is lost.

    benchmarks/gpu.sh DIR              everything, without a limit
    benchmarks/gpu.sh DIR first 6      the first call, in at most 6 minutes: is it right, how fast is a step, where does time go
    benchmarks/gpu.sh DIR second 5     the second: the sweep of forms and tiles, more tests, the step again
    benchmarks/gpu.sh DIR rest 5       memory checks, all tests, generation, the baby GPT, peers, counters, the trainer varied

`__main__.py` lists the stages, `lease.py` runs them against the clock; what a stage does that no other command does is in
`smoke.py` and `sweep.py`.
"""
