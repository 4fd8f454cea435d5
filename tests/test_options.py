"""Config files and the command line (C28): what is accepted, and that everything else is one clear line."""
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from nanogpt_fast import options
from nanogpt_fast.options import option


@dataclass
class Options:
    """Things to set."""

    out_dir: str = option("out", "where results go", section="Files")
    eval_interval: int = option(2000, "steps between evaluations", minimum=1)
    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    dropout: float = option(0.0, "probability of dropping", minimum=0, below=1)
    compile: bool = option(False, "run torch.compile")
    dtype: str = option("auto", "arithmetic", choices=("auto", "float32", "bfloat16"))
    top_k: int | None = option(200, "keep this many", minimum=1)
    dataset: str = option("embedded", "what to learn", alias="data")


def parse(*argv):
    return options.parse(Options, list(argv), "prog")


def test_defaults_hold_when_nothing_is_given():
    assert parse() == Options()


@pytest.mark.parametrize("argv", [("--eval_interval=5",), ("--eval_interval", "5"), ("--eval-interval=5",)])
def test_a_key_is_set_with_an_equals_sign_a_space_or_a_dash(argv):
    assert parse(*argv).eval_interval == 5


def test_an_int_is_accepted_for_a_float_and_becomes_one():
    value = parse("--learning_rate=1").learning_rate
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize("argv, expected", [
    (("--compile",), True), (("--compile=True",), True), (("--compile", "false"), False),
    (("--compile", "--dropout=0.1"), True)])
def test_a_bool_may_stand_alone_or_have_a_value(argv, expected):
    assert parse(*argv).compile is expected


@pytest.mark.parametrize("argv, expected", [
    ((), "auto"), (("--compile",), True), (("--compile", "auto"), "auto"), (("--compile=False",), False),
    (("--compile", "--x=1"), True)])
def test_a_bool_may_have_a_third_value(argv, expected):
    @dataclass
    class Third:
        compile: bool | str = option("auto", "compile", choices=("auto", True, False))
        x: int = option(0, "another")

    assert options.parse(Third, argv, "prog").compile is expected
    with pytest.raises(ValueError, match="compile is 'atuo'; expected auto | True | False; the nearest is 'auto'"):
        options.parse(Third, ["--compile=atuo"], "prog")


def test_an_empty_choice_is_shown():
    @dataclass
    class Choice:
        preset: str = option("", "settings by name", choices=("", "laptop"))

    assert "('' | laptop)" in options.help_text(Choice, "prog")


@pytest.mark.parametrize("text, expected", [("a=b", "a=b"), ("123", "123"), ("'quoted'", "quoted"), ("", ""), ("True", "True")])
def test_a_string_stays_what_was_typed(text, expected):
    assert parse(f"--out_dir={text}").out_dir == expected


def test_none_is_accepted_where_the_type_says_so():
    assert parse("--top_k=None").top_k is None
    with pytest.raises(ValueError, match=r"eval_interval is None \(NoneType\); expected int"):
        parse("--eval_interval=None")


def test_an_alias_sets_its_field():
    assert parse("--data", "my.txt").dataset == "my.txt"


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown option --learning_rat; the nearest is --learning_rate"):
        parse("--learning_rat=1")


@pytest.mark.parametrize("argv, message", [
    ("--eval_interval=1.5", "eval_interval is 1.5 (float); expected int"),
    ("--eval_interval=True", "eval_interval is True (bool); expected int"),
    ("--eval_interval=many", "eval_interval is 'many' (str); expected int"),
    ("--compile=2", "compile is 2 (int); expected bool"),
    ("--learning_rate=1e999", "learning_rate is inf; expected a finite number"),
    ("--eval_interval=0", "eval_interval is 0; expected int, at least 1"),
    ("--dropout=1.5", "dropout is 1.5; expected float, at least 0, below 1"),
    ("--dropout=1", "dropout is 1.0; expected float, at least 0, below 1"),
    ("--learning_rate=0", "learning_rate is 0.0; expected float, above 0"),
    ("--dtype=bfloat", "dtype is 'bfloat'; expected auto | float32 | bfloat16; the nearest is 'bfloat16'"),
    ("--eval_interval", "--eval_interval needs a value"),
])
def test_a_wrong_value_says_what_was_passed_and_what_is_accepted(argv, message):
    with pytest.raises(ValueError) as raised:
        parse(argv)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_file_overrides_defaults_and_the_command_line_overrides_it(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("import time\n# upstream's files do such things\nout_dir = 'run-' + str(int(time.time() * 0))\n"
                      "learning_rate = 1\neval_interval = eval_interval // 2\n_helper = 3\ndropout = _helper / 10\n")
    parsed = parse(str(config), "--dropout=0.2")
    assert (parsed.out_dir, parsed.learning_rate, parsed.eval_interval, parsed.dropout) == ("run-0", 1.0, 1000, 0.2)


def test_the_order_on_the_command_line_counts(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("eval_interval = 7\n")
    assert parse("--eval_interval=3", str(config)).eval_interval == 7


@pytest.mark.parametrize("source, message", [
    ("eval_interval = 'x'", "eval_interval is 'x' (str); expected int"),
    ("\nx = 1 / 0", "line 2: ZeroDivisionError"),
    ("\n\nx = = 1", "line 3: SyntaxError"),
    ("dropout = 1.5", "dropout is 1.5"),
])
def test_a_bad_config_file_is_one_clear_line(tmp_path, source, message):
    config = tmp_path / "config.py"
    config.write_text(source)
    with pytest.raises(ValueError) as raised:
        parse(str(config))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_files_own_names_are_its_own(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("tokens = 5\nnum_intervals = 2\ntotal_interval = 3\ndevice_type = 'cpu'\nlearn_rate = 1\neval_interval = tokens * 2\n")
    assert parse(str(config)).eval_interval == 10
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="unknown option --device_type"):      # on the command line nothing else can be meant
        parse("--device_type=cpu")


@pytest.mark.parametrize("name", ["learning_rat", "learning_ratee", "learning_rote", "laerning_rate"])
def test_a_name_one_letter_from_an_option_gets_a_hint(name, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"{name} = 1.0\n")
    assert parse(str(config)) == Options()
    assert capsys.readouterr().err == f"{config}: {name} is not an option and sets nothing; is learning_rate meant?\n"


@pytest.mark.parametrize("source, name, expected", [
    ("eval_interval = 2e0", "eval_interval", 2), ("eval_interval = eval_interval / 2", "eval_interval", 1000),
    ("eval_interval = eval_interval * 0.9", "eval_interval", 1800), ("compile = 1", "compile", True), ("compile = 0", "compile", False),
    ("import numpy as np\neval_interval = np.int64(7)", "eval_interval", 7), ("import numpy as np\ntop_k = np.uint8(7)", "top_k", 7),
    ("import numpy as np\ndropout = np.float32(0.5)", "dropout", 0.5), ("import numpy as np\ndropout = np.float64(0.25)", "dropout", 0.25)])
def test_numbers_are_taken_as_they_are_meant(source, name, expected, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(source)
    found = getattr(parse(str(config)), name)
    assert found == expected and type(found) is type(expected)


def test_numbers_of_an_instance_made_in_python_become_what_is_meant():
    made = Options(eval_interval=np.int32(4), top_k=3.0, compile=1, dropout=np.float64(0.5))
    options.check(made)
    assert [(value, type(value)) for value in (made.eval_interval, made.top_k, made.compile, made.dropout)] == [
        (4, int), (3, int), (True, bool), (0.5, float)]


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match="no config file 'nowhere.py'"):
        parse("nowhere.py")


def test_help_lists_every_key_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())  # wrapped to the terminal's width
    assert left.value.code == 0
    for words in ("Things to set.", "Files:", "--eval_interval=2000", "steps between evaluations", "int, at least 1",
                  "--top_k=200", "auto | float32 | bfloat16", "Also --data."):
        assert words in text


def test_check_holds_for_an_instance_made_in_python():
    options.check(Options())
    with pytest.raises(ValueError, match="dropout is 2.0"):
        options.check(Options(dropout=2.0))
    with pytest.raises(ValueError, match=r"eval_interval is 'x' \(str\)"):
        options.check(Options(eval_interval="x"))


def test_post_init_checks_what_spans_fields():
    @dataclass
    class Pair:
        n_embd: int = option(8, "width")
        n_head: int = option(2, "heads")

        def __post_init__(self):
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    with pytest.raises(ValueError, match="not divisible"):
        options.parse(Pair, ["--n_head=3"], "prog")


def test_positional_fields_take_bare_words_in_turn():
    @dataclass
    class Named:
        source: str = option("", "what", positional=True)
        target: str = option("", "where to", positional=True)
        seed: int = option(1, "seed")

    parsed = options.parse(Named, ["my.txt", "--seed=2", "out.txt"], "prog")
    assert (parsed.source, parsed.target, parsed.seed) == ("my.txt", "out.txt", 2)
    assert options.help_text(Named, "prog").startswith("usage: prog source target [--key=value")
    with pytest.raises(ValueError, match="'c' is one argument too many; usage: prog source target"):
        options.parse(Named, ["a", "b", "c"], "prog")


def test_importing_options_needs_no_torch():
    # `nanogpt-fast --help` is instant only while nothing heavy is imported on the way.
    code = "import sys, nanogpt_fast.options; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == 0
