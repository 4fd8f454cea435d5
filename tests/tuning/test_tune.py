"""`nanogpt-fast tune`: on this CPU as it is; for a GPU with made-up times, which is how its choices are tested without one."""
import os
import time

import cards
import pytest
import torch

from nanogpt_fast import backend, cli
from nanogpt_fast.generation import decode as decode_op
from nanogpt_fast.kernels import attention_common, decode, fastest
from nanogpt_fast.ops import attention, mlp, norm
from nanogpt_fast.ops.hopper import attention as hopper_attention, mlp as hopper_mlp
from nanogpt_fast.tuning import command, contests, saved, screen, timing, trying
from nanogpt_fast.tuning.contest import UNTUNED

TINY = dict(B=2, T=16, C=32, H=2, V=65, layers=2, bias=True, dropout=0.0, device="cpu", cuda=False)


# ------------------------------------------------------------------------------------------------------------------ this CPU


def tune(tmp_path, *words):
    return cli.main(["tune", "--model=tiny", f"--out={tmp_path}/tuned.json", *words])


@pytest.mark.parametrize("words", (("--dtype=bfloat16",), ("--generate=2",)), ids=("training", "generation"))
def test_the_command_measures_and_writes_its_file(tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(trying, "try_all", lambda shape, listed, *_: {(c.name, label): None for c in listed for label in c.entries})
    monkeypatch.setattr(timing, "ROUNDS", 6)        # not the clock ends it
    before = fastest.in_force()
    assert tune(tmp_path, "--minutes=10", *words) == 0
    out = capsys.readouterr().out
    machine, = saved.read(tmp_path / "tuned.json")
    assert machine["card"] == fastest.cpu_name() and not machine["cuda"] and machine["versions"] == saved.versions(False)
    assert {"decode", "sample"} <= {c["name"].split(":")[0] for c in machine["contests"]} if "--generate=2" in words else \
        any(c["name"].startswith("loss training") for c in machine["contests"])
    assert all(len(values) >= 3 for c in machine["contests"] for values in c["samples"].values())
    assert ("choices were changed" in out or "Nothing was clearly faster" in out) and f"{tmp_path}/tuned.json" in out
    assert fastest.in_force() is before         # the process that tuned goes on as it was


def test_whole_steps_are_compared_in_turns():
    shape = contests.Shape(dtype=torch.float32, **TINY)
    config = dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    seen = []

    def make():
        step = command.step_of(config, shape, torch.device("cpu"))
        return lambda: (seen.append(fastest.in_force()), step())
    tables = {"untuned": fastest.Table(fastest.SHIPPED), "tuned": fastest.Table([fastest.Row("cross_entropy", "reference"), *fastest.SHIPPED])}
    samples = timing.steps_in_turns(make, tables, 3, False, time.monotonic() + 60)
    assert {name: len(values) for name, values in samples.items()} == {"untuned": 3, "tuned": 3}
    assert {id(table) for table in seen} == {id(table) for table in tables.values()}


def test_a_run_that_is_too_short_says_so_and_changes_nothing(tmp_path, capsys, monkeypatch):
    """What a longer run measured stays."""
    monkeypatch.setattr(trying, "try_all", lambda shape, listed, *_: {(c.name, label): None for c in listed for label in c.entries})
    file = tmp_path / "tuned.json"
    file.write_text('{"format": 1, "machines": []}')
    before = file.read_text()
    assert tune(tmp_path, "--minutes=0.0001", "--dtype=bfloat16") == 0
    out = capsys.readouterr().out
    assert "Nothing was decided, and nothing is written" in out and file.read_text() == before
    assert "Not decided, the time was too short (--minutes): attention, training, " in out


@pytest.mark.parametrize("width, without", ((100, ()), (82, ("tried",)), (71, ("tried", "PyTorch")), (52, ("tried", "PyTorch", "next best")),
                                            (46, ("tried", "PyTorch", "next best", "it was"))))
def test_a_narrow_terminal_gets_whole_numbers_in_fewer_columns(width, without):
    contest = contests.Contest("c", "attention, training", None, None, None, {"cpp": (), "PyTorch": ()}, torch.float32, now="triton")
    contest.samples = contest.again = {UNTUNED: [13e-3] * 5, "cpp": [11e-3] * 5, "PyTorch": [12e-3] * 5}
    with screen.Screen([contest]) as shown:
        shown.console.width = width
        with shown.console.capture() as text:
            shown.console.print(shown.table())
    header, line = text.get().rstrip().splitlines()[-2:]
    line = " ".join(line.split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text.get() and "attention, training" in line and "cpp 11,000 us" in line and "1.18 x" in line
    assert {name for name in screen.COLUMNS if name not in header} == set(without)


def test_in_a_pipe_each_decided_op_is_a_line_of_what_runs_and_how_long_it_takes(capsys):
    contest = contests.Contest("c", "loss", None, None, None, {"cpp": (), "PyTorch": ()}, torch.float32, now="triton")
    with screen.Screen([contest]) as shown:
        shown.decided(contest)
        contest.samples = contest.again = {UNTUNED: [13e-3] * 5, "cpp": [11e-3] * 5, "PyTorch": [12e-3] * 5}
        shown.decided(contest)
    assert capsys.readouterr().out == "  loss: not decided\n  loss: cpp 11,000 us 1.18 x\n"


def test_an_entry_that_cannot_run_or_was_not_reached_is_not_called_wrong(capsys):
    """Nor is the advice to run verify."""
    for why, said in (("its process ended with status 1", "cannot be timed here: its process ended with status 1\n"), (None, ""), ("wrong: a", "wrong: a; run `nanogpt-fast verify`")):
        contest = contests.Contest("c", "c", None, None, None, {"a": ()}, torch.float32)
        with screen.Screen([contest]) as shown:
            command.decide([contest], {("c", UNTUNED): why} if why else {}, None, time.monotonic() + 60, [], shown)
            late = command.summary([contest], [], {}, "file.json", True)
        out = capsys.readouterr().out
        assert said in out and ("verify" in out) == (why == "wrong: a")
        assert ("Not decided, the time was too short (--minutes): c" in late) == (why is None)


def test_the_summary_says_who_reads_the_file():
    contest = contests.Contest("c", "c", None, None, None, {"a": ()}, torch.float32, samples={UNTUNED: [1.0] * 5, "a": [0.5] * 5})
    contest.again = contest.samples
    texts = [command.summary([contest], [contest], {}, "file.json", is_read) for is_read in (True, False)]
    assert "1 of 1 choices were changed, in file.json; `auto` takes them from now on" in texts[0]
    assert "`auto` takes them where NANOGPT_FAST_TUNED=file.json is set" in texts[1]


def test_a_choice_without_enough_samples_is_not_decided():
    contest = contests.Contest("c", "c", None, None, None, {"a": ()}, torch.float32)
    few, enough = [1.0] * 4, [1.0] * 5
    for samples, again, decided in (({}, {}, False), ({UNTUNED: few, "a": few}, {}, False), ({UNTUNED: enough, "a": [0.5] * 3}, {}, True),
                                    ({UNTUNED: enough, "a": [0.5] * 5}, {UNTUNED: few, "a": few}, False),
                                    ({UNTUNED: enough, "a": [0.5] * 5}, {UNTUNED: enough, "a": enough}, True)):
        contest.samples, contest.again = samples, again
        assert contest.decided == decided, samples


def test_a_file_that_cannot_be_written_is_known_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contests, "contests", None)
    (tmp_path / "old.json").write_text('{"format": 0, "machines": []}')
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("", "is a folder; expected a file's name"), ("old.json", "of format 1; it would be overwritten: move it away, or name another"),
                         ("old.json/a", "old.json"), ("pipe", "is a named pipe")):
        assert cli.main(["tune", f"--out={tmp_path / name}"]) == 2
        assert reason in capsys.readouterr().err
    monkeypatch.setattr(saved, "default", lambda: None)     # no home
    assert cli.main(["tune"]) == 2 and "name one with --out=FILE" in capsys.readouterr().err
    assert (tmp_path / "old.json").read_text() == '{"format": 0, "machines": []}'


def test_a_contest_of_one_is_none():
    """In float32 a CPU has one implementation of attention and of LayerNorm."""
    listed = {contest.title: contest.choice for contest in contests.contests(contests.Shape(dtype=torch.float32, **TINY))}
    assert listed == {"attention, training": False, "add + LayerNorm, training": False, "loss, training": True}


def test_under_dropout_pytorch_is_right_by_its_shape():
    """It draws another mask; as what runs untuned, too."""
    from nanogpt_fast.tuning import contest as rules
    contest = contests.contests(contests.Shape(dtype=torch.float32, **TINY | dict(dropout=0.5)))[0]
    inputs = contest.make()
    expected = torch.zeros_like(inputs["qkv"])      # of another mask
    assert {label: rules.check(contest, label, inputs, (expected,)) for label in contest.entries} == dict.fromkeys(contest.entries)
    assert "has shape" in rules.check(contest, UNTUNED, inputs, (expected[:1],))
    contest.unlike = frozenset()
    assert "off, relatively" in rules.check(contest, UNTUNED, inputs, (expected,))


@pytest.mark.parametrize("wrong, reason", (
    ("--n_head=3", "n_embd is 32 and n_head 3: expected a multiple"), ("--minutes=0", "minutes"), ("--model=huge", "expected"), ("--generate=-1", "generate")))
def test_wrong_options_are_named(tmp_path, capsys, wrong, reason):
    assert tune(tmp_path, wrong) == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (0, 2))
def test_every_entry_of_this_cpu_is_right(dtype, rows):
    from nanogpt_fast.tuning import contest as rules
    for contest in contests.contests(contests.Shape(dtype=dtype, rows=rows, **TINY)):
        inputs = contest.make()
        expected = contest.expected(dict(inputs))
        assert {label: rules.check(contest, label, inputs, expected) for label in contest.entries} == dict.fromkeys(contest.entries)


def test_under_a_row_the_op_takes_what_it_says():
    shape = contests.Shape(dtype=torch.bfloat16, **TINY)
    for contest in contests.contests(shape):
        if contest.name.startswith("layer_norm training"):
            t = contest.make()
            arguments = t["x"], t["weight"], t["bias"], t["branch"], torch.bfloat16
            taken = {}
            for label, rows in contest.entries.items():
                with fastest.trial(rows):
                    taken[label] = backend.choose("layer_norm", norm.CANDIDATES, None, arguments, norm.row_for)
            assert taken == {"cpp": "cpp", "PyTorch": "reference", UNTUNED: "cpp"}
            contest.begin()
            assert contest.now == "cpp" and list(contest.entries) == [UNTUNED, "PyTorch"] and contest.kept[0].use == "cpp"
            return
    pytest.fail("no contest of LayerNorm")


@pytest.mark.slow
def test_the_whole_command_with_processes_that_try_each_entry(tmp_path, capsys):
    assert cli.main(["tune", "--model=tiny", "--minutes=0.3", f"--out={tmp_path}/tuned.json"]) == 0
    assert saved.read(tmp_path / "tuned.json")[0]["contests"]


# ---------------------------------------------------------------------------------------------- processes that try entries


class Answers:
    """A stand-in for trying.Worker: entries whose label says what becomes of them."""
    crew, room = [], 100

    def __init__(self, shape):
        Answers.crew.append(self)
        self.job, self.alive = None, True
        self.pipe, self.other = trying.multiprocessing.Pipe()
        self.process = type("Process", (), {"sentinel": self.other})

    def take(self, job, patience):
        self.job, self.alone = job, True
        self.other.send("done")

    def answer(self):
        label, _ = self.job[1], self.pipe.recv()
        self.alive = "dies" not in label
        if "large" in label and (2 if not self.alone else 1) > Answers.room:        # with company it fails, or wherever there is no room at all
            return trying.NO_MEMORY,
        return ("its process ended" if "dies" in label else "wrong" if "wrong" in label else None),

    def kill(self):
        self.pipe.close()
        self.alive = False


@pytest.mark.parametrize("room, result", [(2, None), (1, None), (0, trying.NO_MEMORY)])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_entry_for_which_there_is_no_memory_waits_until_fewer_processes_hold_some(workers, room, result, monkeypatch):
    monkeypatch.setattr(trying, "Worker", Answers)
    monkeypatch.setattr(Answers, "crew", [])
    monkeypatch.setattr(Answers, "room", room)
    contest = contests.Contest("c", "c", None, None, None, {"small": (), "large": (), "large too": (), "large as well": (), "last": ()}, torch.float32)
    seen = []
    found = trying.try_all(None, [contest], workers, time.monotonic() + 60, lambda *row: seen.append(row[1]))
    assert found == {("c", label): result if "large" in label else None for label in contest.entries}
    assert sorted(seen) == sorted(contest.entries)


@pytest.mark.parametrize("error, after, answer", [
    (RuntimeError("an illegal memory access"), RuntimeError("an illegal memory access"), ("RuntimeError: an illegal memory access", False)),
    (RuntimeError("no such tile"), None, ("RuntimeError: no such tile", True)),
    (torch.OutOfMemoryError("CUDA out of memory"), None, (trying.NO_MEMORY, True))])
def test_a_process_whose_gpu_is_lost_says_so_with_its_answer(error, after, answer, monkeypatch):
    def fails(*args):
        raise error

    def synchronize():
        if after is not None:
            raise after
    contest = contests.Contest("c", "c", dict, None, lambda t: (), {"one": ()}, torch.float32)
    monkeypatch.setattr(contests, "contests", lambda shape: [contest])
    monkeypatch.setattr(trying.rules, "check", fails)
    for name, function in (("set_device", lambda number: None), ("empty_cache", lambda: None), ("synchronize", synchronize)):
        monkeypatch.setattr(torch.cuda, name, function)
    pipe = Once(("c", "one"))
    trying.work(pipe, type("Shape", (), {"cuda": True, "number": 0})())
    assert pipe.sent == [answer]
    worker = object.__new__(trying.Worker)
    worker.pipe, worker.alive, worker.process = Once(answer), True, type("Process", (), {"kill": lambda self: None, "join": lambda self: None})()
    assert worker.answer() == (answer[0],) and worker.alive is answer[1]


class Once:
    """A pipe with one message; keeps what is sent."""

    def __init__(self, message):
        self.messages, self.sent = [message], []
        self.send = self.sent.append

    def poll(self):
        return bool(self.messages)

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop()

    def close(self):
        pass


def test_an_entry_that_kills_its_process_costs_that_alone(monkeypatch):
    monkeypatch.setattr(trying, "Worker", Answers)
    monkeypatch.setattr(Answers, "crew", [])
    contest = contests.Contest("c", "c", None, None, None, {"good": (), "dies": (), "wrong": (), "dies too": (), "last": ()}, torch.float32)
    seen = []
    found = trying.try_all(None, [contest], 2, time.monotonic() + 60, lambda *row: seen.append(row[1]))
    assert found == {("c", UNTUNED): None, ("c", "good"): None, ("c", "dies"): "its process ended", ("c", "wrong"): "wrong",
                     ("c", "dies too"): "its process ended", ("c", "last"): None}
    assert sorted(seen) == sorted(contest.entries) and len(Answers.crew) >= 3
    assert trying.try_all(None, [contest], 2, time.monotonic() - 1) == {}       # out of time


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_is_replaced():
    worker = trying.Worker(None)
    contest = contests.Contest("c", "c", None, None, None, {}, torch.float32)
    worker.take((contest, UNTUNED), patience=0.0)
    worker.deadline = time.monotonic() + 0.5            # it is still importing PyTorch
    while (answer := worker.answer()) is None:
        time.sleep(0.05)
    assert answer[0].startswith("no answer for") and not worker.alive
    worker = trying.Worker(None)
    worker.take((contest, UNTUNED), patience=60.0)
    worker.process.kill()
    worker.process.join()
    assert worker.answer() == ("its process ended with status -9",)


# ------------------------------------------------------------------------------------------------- a GPU, with made-up times


@pytest.fixture
def gpu(monkeypatch):
    """A card with all kernels, of GPT-2's shape; returns (shape, decide): `decide(times)` runs the contests with times by title and label."""
    for module, name in ((attention, "_why_no_cudnn"), (backend, "triton_import_error")):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(backend, "triton_why_not", lambda *tensors: None)
    monkeypatch.setattr(attention, "_cudnn_why_not", lambda *args: None)
    monkeypatch.setattr(attention, "CANDIDATES", (("triton", lambda *args: None), ("cudnn", lambda *args: None)))
    for module in (hopper_attention, hopper_mlp):
        monkeypatch.setattr(module, "why_not", lambda *args, **kwargs: None)
    cards.on_card(monkeypatch, 90)
    shape = contests.Shape(**TINY | dict(B=64, T=1024, C=768, H=12, V=50304, layers=12, device="meta", cuda=True, dtype=torch.bfloat16))
    monkeypatch.setattr(contests.Shape, "number", 0)

    def decide(times, wrong=()):
        listed = contests.contests(shape)
        assert set(times) <= {contest.title for contest in listed}

        def timed(contest, labels, cuda, until):
            of = times.get(contest.title, {})
            assert set(of) <= {UNTUNED, *labels}, f"{contest.title} has {labels}"
            contest.samples = contest.again = {label: [of.get(label, 100e-6)] * 8 for label in labels}
        monkeypatch.setattr(timing, "time_contest", timed)
        decided = []
        tried = {(contest.name, label): "wrong" if (contest.title, label) in wrong else None for contest in listed for label in contest.entries}
        with screen.Screen(listed) as shown:
            command.decide(listed, tried, shape, time.monotonic() + 60, decided, shown)
        return listed, decided
    return decide


def forms(rows, dtype=torch.bfloat16):
    x = type("X", (), {"is_cuda": True, "dtype": dtype, "device": torch.device("cuda"), "size": lambda self, i: 768, "numel": lambda self: 768 * rows,
                       "get_device": lambda self: 0})()
    return mlp._faster_forms(x, torch.empty(3072, 768, device="meta"), None, "gelu")


def test_what_was_fastest_is_taken_at_its_shape(gpu):
    """The times of a card on which all of the shipped choices are wrong."""
    before = fastest.find("attention forward tile", 0, "half", size=64, tokens=65536, length=1024).tile
    assert forms(65536) == ("hopper", "hopper")
    gpu({"MLP forward": {"pointwise": 50e-6}, "MLP backward": {"epilogue 128x128x32, 4 warps, 4 stages": 60e-6},
         "attention forward": {"64x64, 4 warps, 3 stages": 70e-6},
         "attention dq": {"32x32, 4 warps, 3 stages": 80e-6}, "loss, chunks": {"8 chunks": 90e-6}})
    assert forms(65536) == ("pointwise", "epilogue") and forms(4096) == ("hopper", "hopper")
    tile = lambda what, tokens=65536, size=64, **more: fastest.find(what, 0, "half", size=size, tokens=tokens, length=1024, **more).tile
    assert str(tile("mlp backward tile", size=3072)) == "128x128x32, 4 warps, 4 stages"
    assert str(tile("attention forward tile")) == "64x64, 4 warps, 3 stages" and tile("attention forward tile", tokens=12288) == before
    assert str(tile("attention dq tile")) == "32x32, 4 warps, 3 stages"
    assert fastest.find("attention training", 0, "half", size=64, tokens=65536, length=1024).use == "triton"
    x = torch.empty(64, 1024, 2304, dtype=torch.bfloat16, device="meta")
    assert attention._backward_form(x, 64, None, 0.0, 64, 1024) == "split" and attention._backward_form(x, 64, None, 0.0, 64, 4096) == "hopper"
    assert fastest.find("cross_entropy chunks", 0, size=50304, tokens=65536).use == "8"


def test_pytorch_is_taken_where_the_whole_op_is_faster(gpu):
    gpu({"attention, training": {"PyTorch": 60e-6}, "add + LayerNorm, training": {"PyTorch": 10e-6}, "MLP, training": {"PyTorch": 99.5e-6},
         "attention forward": {"PyTorch": 1e-6}})
    row = fastest.find("attention training", 0, "half", size=64, tokens=65536, length=1024)
    assert row.use == "reference" and row.note == "measured here: PyTorch 60.0 us, cudnn 100 us"
    assert fastest.find("layer_norm", 0, "half", size=768, tokens=65536).use == "reference"
    assert fastest.find("mlp", 0, "half", size=768, tokens=65536).use == "triton"       # a tie


def test_without_a_difference_nothing_changes(gpu):
    before = forms(65536), fastest.find("attention forward tile", 0, "half", size=64, tokens=65536, length=1024)
    listed, decided = gpu({})
    assert len(decided) == len(listed) >= 12 and {contest.winner for contest in decided} == {UNTUNED}
    assert before == (forms(65536), fastest.find("attention forward tile", 0, "half", size=64, tokens=65536, length=1024))
    row = fastest.find("attention training", 0, "half", size=64, tokens=65536, length=1024)     # what was taken before, and now measured
    assert row.use == "cudnn" and row.note.startswith("measured here: cudnn 100 us, ")


def test_what_is_wrong_or_was_not_reached_never_wins(gpu):
    _, decided = gpu({"MLP forward": {}}, wrong={("MLP forward", "pointwise")})
    found = next(contest for contest in decided if contest.title == "MLP forward")
    assert found.failed == {"pointwise": "wrong"} and "pointwise" not in found.samples and found.winner == UNTUNED


def test_every_tile_that_competes_can_be_launched():
    """Powers of two that Triton takes, and warps that LayerNorm's backward has a number of programs for."""
    for rows in (contests.FORWARD, contests.DQ, contests.DKDV, contests.HEAD, contests.MATMUL):
        for row in rows:
            assert all(size & (size - 1) == 0 and size >= 16 for size in row[:-2]) and row[-2] in (4, 8) and 1 <= row[-1] <= 5, row
    assert attention_common.padded(64) == 64


def test_a_loop_over_chunks_takes_steps_of_one_or_more():
    """For the widest row and the fewest warps of the contest: with a step of 0, the kernel would never end."""
    chunks = {warps: decode.combined_chunks(decode_op.LARGEST_K, fastest.Tile(0, 1, 0, warps)) for warps in (1, 2, 4, 8)}
    assert chunks == {1: 1, 2: 1, 4: 1, 8: 1} and decode.combined_chunks(1024, fastest.Tile(0, 1, 0, 8)) == 8
