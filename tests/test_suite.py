"""The suite as a whole: what would stop it from running in one process, as it does where there is a GPU."""
from collections import Counter
from pathlib import Path


def test_no_two_test_files_have_one_name():
    """pytest imports each by its name alone; a second one of that name ends the run before its first test."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert max(names.values()) == 1, [name for name, n in names.items() if n > 1]
