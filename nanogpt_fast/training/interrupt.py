"""Treat Ctrl-C, a job scheduler's signals and a closed terminal as a request to stop at the next safe point."""
import signal
import threading

# Ctrl-C; a scheduler; a closed terminal; Ctrl-\\; Slurm's --signal=USR1@60. Not every system has all of them.
REQUESTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1") if hasattr(signal, name)]


class StopOnSignal:
    """`with StopOnSignal() as stop: ... if stop.signal: save and exit`.

    The first of REQUESTS is only recorded, in `stop.signal`; a second SIGINT raises KeyboardInterrupt, for users who can't wait.
    (Under torchrun, alone=False, a Ctrl-C reaches every rank twice, from the terminal and from torchrun, so the second is ignored.)
    SIGHUP and SIGQUIT stay ignored where they are: nohup and shell scripts in the background ask for it. Outside Python's main thread
    signals can't be handled, and this does nothing.
    """

    def __init__(self, alone=True):
        self.signal = None
        self._alone = alone
        self._former = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                ignored = number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) == signal.SIG_IGN
                if not ignored:
                    self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def nobody_listens(self):
        """What the run prints reaches nobody: the terminal is closed, or the other end of a pipe. Stop as after SIGHUP."""
        self.signal = self.signal or getattr(signal, "SIGHUP", signal.SIGTERM)

    def _remember(self, number, _frame):
        if self.signal == number == signal.SIGINT and self._alone:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
