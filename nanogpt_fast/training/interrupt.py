"""Treat Ctrl-C, and SIGTERM from a job scheduler, as a request to stop at the next safe point."""
import signal
import threading


class StopOnSignal:
    """`with StopOnSignal() as stop: ... if stop.signal: save and exit`.

    The first SIGINT or SIGTERM is only recorded, in `stop.signal`; a second SIGINT raises KeyboardInterrupt, for users who can't
    wait. (Under torchrun, alone=False, a Ctrl-C reaches every rank twice, from the terminal and from torchrun, so the second is
    ignored.) Outside Python's main thread signals can't be handled, and this does nothing.
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
