"""What a run shows and records: the progress bar or plain lines, metrics.jsonl, loss.png, TensorBoard, W&B.

metrics.jsonl has one JSON object per line, of two kinds:
    {"iter", "loss", "lr", "ms_per_step", "tokens_per_s", "mfu"}     a training step; its loss is that before the weight update;
                                                                     mfu: of this machine's bf16 peak, where devices.py knows that
    {"iter", "train_loss", "val_loss", "lr"}                         an evaluation, before the step of that number

Nothing here ends a run. A picture or a logger that fails is said once, and tried again next time; the lines that metrics.jsonl lacks are
then written at the next evaluation or at the end. A run of any length takes the same memory: rows are kept in the file, and here only as
many as the picture shows. Output that reaches nobody (a closed terminal or pipe) stops the run as SIGHUP does: it saves.
"""
import contextlib
import collections
import dataclasses
import errno
import json
import os
import sys
import time
from pathlib import Path

from ..checkpoints import schema
from ..files import replacing

LACKING = 100_000  # lines that are kept for metrics.jsonl while its disk is full: 15 MB
SHOWN = 4096       # most points of a curve: four for each pixel of its width
OFTEN = 10         # seconds between the lines of an evaluation; a bar moves five times a second
SMOOTHING = 0.95   # of the loss that the bar shows: an average over about the last 20 steps


class Progress:
    """Shows and records a run; where `active` is false (every rank but the first) it does nothing.

    start, total: steps already done, and in all. tokens: per step, over all ranks. evaluated_at: the step whose evaluation was
    already done before a resumed run stopped. stop: the run's StopOnSignal. forecast: micro-batches of a step on this rank, if the
    first evaluation is to say how long the run takes (on a device that computes a batch before the next begins), else None.
    """

    def __init__(self, options, *, start, total, tokens, stop, evaluated_at=None, active=True, forecast=None):
        self.active, self.tokens, self.stop = active, tokens, stop
        if not active:
            return
        self.forecast, self.steps_left, self.preset = forecast, total - start, getattr(options, "preset", "")
        self.dropout = options.dropout
        self.evaluations_left = total // options.eval_interval - start // options.eval_interval + 1
        self.total, self.log_interval = total, options.log_interval
        self.folder = Path(options.out_dir)
        self.smoothed = self.val_loss = self.rate = None
        self.path = self.folder / "metrics.jsonl"
        self.steps, self.evaluations, self.best = Thinned(), Thinned(), None      # rows for the picture; that of the best evaluation
        with replacing(self.path) as f:
            for row in _rows_before(self.path, start, evaluated_at):
                self._keep(row)
                f.write(_line(row))
        self.file = open(self.path, "ab", buffering=0)      # unbuffered: each row reaches the file at once
        self.size = os.path.getsize(self.path)              # bytes of whole lines in it
        self.lacking = collections.deque(maxlen=LACKING)    # lines that it lacks
        self.failed = set()     # what failed and was said to
        self.trackers = _trackers(options)
        self.bar = None
        if sys.stderr.isatty() or in_a_notebook():
            from tqdm.auto import tqdm
            self.bar = tqdm(total=total, initial=start, dynamic_ncols=True, smoothing=0.1, leave=False, postfix="",
                            bar_format="step {n_fmt}/{total_fmt} |{bar}| {postfix} ETA {remaining}")
        self.since = (time.perf_counter(), start)  # of the last row
        self.paused = 0.0                          # seconds since then that were not spent training

    def say(self, text):
        """Print a line above the bar."""
        if not self.active:
            return
        if self.bar is None:
            self._show(print, text, flush=True)
        else:
            self._show(self.bar.write, text)

    def step(self, iter_num, loss, lr, mfu):
        """Step `iter_num` is done. mfu: the model's FLOPs utilisation as a function of seconds a step; its result is None if unknown."""
        if not self.active:
            return
        self.forecast = None    # from here on the lines and the bar say what is left
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        if iter_num % self.log_interval == 0:
            now = time.perf_counter()
            seconds = (now - self.since[0] - self.paused) / (iter_num + 1 - self.since[1])
            self.since, self.paused = (now, iter_num + 1), 0.0
            self.rate = self.tokens / seconds
            used = mfu(seconds)
            self._record({"iter": iter_num, "loss": loss, "lr": lr, "ms_per_step": round(seconds * 1e3, 3),
                          "tokens_per_s": round(self.rate, 1), **({} if used is None else {"mfu": round(used, 7)})})
            if self.bar is None:
                left = (self.total - iter_num - 1) * seconds
                self.say(f"iter {iter_num}: loss {loss:.4f}, time {seconds * 1e3:.2f}ms, "
                         + ("" if used is None else f"mfu {used * 100:.2f}%, ") + f"{_short(self.rate)} tok/s, ETA {_clock(left)}")
        if self.bar is not None:
            val = "" if self.val_loss is None else f"val {self.val_loss:.4f} "
            rate = "" if self.rate is None else f"{_short(self.rate)} tok/s"
            self.bar.postfix = f"loss {self.smoothed:.4f} {val}{rate}"
            self._show(self.bar.update, 1)

    def evaluating(self, done, count):
        """Batch `done` of the `count` of an evaluation is computed. Says now and then how long it still takes, and once how long a run."""
        if not self.active:
            return
        now = time.perf_counter()
        if done == 1:       # the first one also warms up
            self.first = self.said_at = now
            return
        seconds = (now - self.first) / (done - 1)
        if self.forecast is not None and (now - self.first > 2 or done == count):
            self.say(self._forecast(seconds, count))
            self.forecast = None
        text = f"evaluating: {done} of {count} batches, {_clock((count - done) * seconds)} left"
        if self.bar is None and now - self.said_at > OFTEN and done < count:
            self.said_at = now
            self.say(text)
        elif self.bar is not None and now - self.said_at > 0.2:
            self.said_at, self.bar.postfix = now, text
            self._show(self.bar.refresh)

    def _forecast(self, seconds, count):
        """How long the run takes, if the forward pass of a micro-batch takes so many seconds: a step's backward takes twice that.

        An evaluation drops nothing. With dropout a step of the baby took 3.6 times as long: on a CPU PyTorch draws all masks.
        """
        step = 3 * self.forecast * seconds
        whole = self.steps_left * step + self.evaluations_left * count * seconds
        hint = "; --preset=laptop takes minutes" if whole > 3600 and self.preset != "laptop" else ""
        about, more = ("at least", f", which dropout={self.dropout:g} makes longer") if self.dropout > 0 else ("about", "")
        return f"time    {about} {_duration(whole)} on this CPU: {self.steps_left:,} steps of {_duration(step)}{more}{hint}"

    def evaluated(self, iter_num, losses, lr):
        """Record an evaluation. losses: {"train", "val"}. To be called before the checkpoint of this step is written, `tell` after it."""
        if not self.active:
            return
        self.val_loss = losses["val"]
        self._record({"iter": iter_num, "train_loss": losses["train"], "val_loss": losses["val"], "lr": lr})

    def tell(self, iter_num, losses, note, sample):
        """Show an evaluation and draw the curves. note: text to append to the line; sample: text, or None."""
        if not self.active:
            return
        self.say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}{note}")
        if sample is not None:
            self.say("\n".join("    | " + line for line in sample.splitlines()))
        self._draw()

    @contextlib.contextmanager
    def pause(self):
        """`with progress.pause(): ...` excludes its time from tokens/s: for evaluation and saving."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.active:
                self.paused += time.perf_counter() - began

    def close(self):
        """Close the bar, the log file and the trackers, and draw loss.png a last time."""
        if not self.active:
            return
        if self.bar is not None:
            self._show(self.bar.close)
        self._try("metrics.jsonl", self._catch_up)
        self.file.close()
        for tracker in self.trackers:
            self._try(type(tracker).__name__, tracker.close)
        if self.steps.count or self.evaluations.count:
            self._draw()

    def _draw(self):
        evaluations = self.evaluations.rows()
        if self.best is not None and self.best not in evaluations:
            evaluations = sorted([*evaluations, self.best], key=lambda row: row["iter"])
        self._try("loss.png", draw, [*self.steps.rows(), *evaluations], self.folder / "loss.png")

    def _keep(self, row):
        """For the picture."""
        if "loss" in row:
            self.steps.add(row)
        elif "val_loss" in row:
            self.evaluations.add(row)
            self.best = row if self.best is None or row["val_loss"] < self.best["val_loss"] else self.best

    def _record(self, row):
        self._keep(row)
        self._try("metrics.jsonl", self._append, row)
        for tracker in self.trackers:
            self._try(type(tracker).__name__, tracker.log, row)

    def _append(self, row):
        line = _line(row)
        if not self.lacking:
            self._write(line)
        else:
            if len(self.lacking) == LACKING and "lines" not in self.failed:
                self.failed.add("lines")
                self.say(f"WARNING: metrics.jsonl lacks {LACKING:,} lines; the first of them are dropped as more come")
            self.lacking.append(line)
            if "val_loss" in row:
                self._catch_up()

    def _write(self, line):
        """Write a line; if that fails, keep it."""
        self.lacking.appendleft(line)
        if self.file.write(line) < len(line):  # half a line, where the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lacking.popleft()
        self.size += len(line)

    def _catch_up(self):
        """If lines could not be written, remove half of one from the file's end and write them."""
        if self.lacking:
            self.file.close()
            if self.path.exists() and os.path.getsize(self.path) > self.size:
                os.truncate(self.path, self.size)
            self.file = open(self.path, "ab", buffering=0)
            while self.lacking:
                self._write(self.lacking.popleft())

    def _try(self, name, function, *args):
        """Call function(*args). If it fails, say so once for each name: what a run shows is not worth the run."""
        try:
            function(*args)
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                self.say(f"WARNING: {name} failed, and the run goes on without it ({type(error).__name__}: {error})")

    def _show(self, function, *args, **options):
        """Call function(*args, **options), which prints."""
        try:
            function(*args, **options)
        except OSError as error:  # on the full disk of a log file there is no way to say anything
            if error.errno in (errno.EPIPE, errno.EIO):
                self.stop.nobody_listens()


class Thinned:
    """At most about SHOWN rows of a sequence of any length, evenly spaced, and its last one."""

    def __init__(self):
        self.kept, self.every, self.count, self.last = [], 1, 0, None

    def add(self, row):
        if self.count % self.every == 0:
            self.kept.append(row)
            if len(self.kept) > SHOWN:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.count, self.last = self.count + 1, row

    def rows(self):
        return self.kept if not self.kept or self.kept[-1] is self.last else [*self.kept, self.last]


def in_a_notebook():
    """Whether this process is a kernel of Jupyter or Colab, which shows a bar although its stderr is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _line(row):
    return json.dumps(row).encode() + b"\n"


def _rows_before(path, start, evaluated_at):
    """Yield the rows that a resumed run keeps: a killed run may have logged steps beyond its last checkpoint."""
    if start == 0 or not path.is_file():
        return
    damaged = 0
    with open(path, "rb") as lines:
        for line in lines:
            row = _row(line)
            if row is None:
                damaged += 1
            elif row["iter"] < start or ("val_loss" in row and row["iter"] == evaluated_at):
                yield row
    if damaged:
        print(f"WARNING: {path} has {damaged} line{'s' * (damaged > 1)} that no run wrote whole, left out now (a kill or a full disk "
              "cuts the last line short)")


def _row(line):
    """The row in a line of metrics.jsonl, or None if it is not one of the two kinds."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not schema.whole(row.get("iter")) or not all(map(schema.at_least_0, row.values())):
        return None
    return row if "loss" in row or {"train_loss", "val_loss"} <= set(row) else None


def draw(rows, path):
    """Write the loss curves of these rows of metrics.jsonl as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever pyplot's backend
    axes = figure.subplots()
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    axes.plot([row["iter"] for row in steps], [row["loss"] for row in steps], color="0.8", lw=1, label="training batches")
    for key, label, color in (("train_loss", "training", "tab:blue"), ("val_loss", "validation", "tab:orange")):
        axes.plot([row["iter"] for row in evaluations], [row[key] for row in evaluations], color=color, marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    if evaluations:
        best = min(evaluations, key=lambda row: row["val_loss"])
        axes.set_title(f"best validation loss {best['val_loss']:.4f} at step {best['iter']}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=120)


def _trackers(options):
    """The external loggers that the options enable, each with log(row) and close()."""
    return [tracker(options) for tracker, wanted in ((TensorBoard, options.tensorboard), (WandB, options.wandb_log)) if wanted]


class TensorBoard:
    def __init__(self, options):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(f"tensorboard=True needs a package: pip install tensorboard ({error})") from None
        self.writer = SummaryWriter(os.path.join(options.out_dir, "tensorboard"))

    def log(self, row):
        for key, value in row.items():
            if key != "iter":
                self.writer.add_scalar(key, value, row["iter"])

    def close(self):
        self.writer.close()


class WandB:
    def __init__(self, options):
        try:
            import wandb
        except ImportError:
            raise RuntimeError("wandb_log=True needs a package: pip install wandb, or use --wandb_log=False "
                               "(metrics.jsonl and loss.png are always written)") from None
        self.run = wandb.init(project=options.wandb_project, name=options.wandb_run_name, config=dataclasses.asdict(options))

    def log(self, row):
        names = {"train_loss": "train/loss", "val_loss": "val/loss"}  # nanoGPT's names
        self.run.log({names.get(key, key): value for key, value in row.items()})

    def close(self):
        self.run.finish()


def _short(number):
    """12345.6 -> "12.3k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds):
    """4000 -> "67 minutes"."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e3:,.0f} ms"


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
