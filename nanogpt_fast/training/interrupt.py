"""Ctrl-C, and SIGTERM from a job scheduler, as a wish to stop at the next safe place."""
import signal
import threading


class StopOnSignal:
    """`with StopOnSignal() as stop: ... if stop.signal: save and leave`.

    The first SIGINT or SIGTERM is only remembered, as `stop.signal`; a second SIGINT raises KeyboardInterrupt, for who can't
    wait. (Under torchrun a Ctrl-C reaches every rank twice, from the terminal and from torchrun: there the second means
    nothing.) Outside Python's main thread signals can't be caught, and nothing is.
    """

    def __init__(self, alone=True):
        self.signal = None
        self._alone = alone
        self._former = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number, _frame):
        if self.signal == number == signal.SIGINT and self._alone:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
