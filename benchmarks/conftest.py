"""What `pytest benchmarks` prints: medians and their spread, fastest first, in one screen."""


def pytest_configure(config):
    for name, ours in (("benchmark_columns", ["median", "iqr", "rounds"]), ("benchmark_sort", "median"), ("benchmark_group_by", "group")):
        if not any(str(word).startswith("--" + name.replace("_", "-")) for word in config.invocation_params.args):
            setattr(config.option, name, ours)
