"""CUDA graphs: functions that run on a stream of their own are recorded there, and replayed with one launch instead of hundreds.

What a function reads and writes must lie in memory that stays; shapes are those of the recording.
"""
import torch


class Recorder:
    """Graphs that share one pool of memory, which is right since they never run at the same time and nothing that must stay lies in it but
    what is alive when the next one is recorded."""

    def __init__(self, device, what, instead):
        """what: is recorded, and instead: what to do where it cannot be; for the error's text."""
        self.device, self.what, self.instead = device, what, instead
        self.stream = torch.cuda.Stream(device)
        self.pool = None

    def run(self, function):
        """Run it where it would be recorded: what compiles or allocates lazily has done so then."""
        around = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(around)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            function()
        around.wait_stream(self.stream)

    def record(self, function):
        """What replays the function on the current stream; nothing is executed. RuntimeError where something in it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream is named: torch's default capture stream may lie on another GPU.
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                function()
        except RuntimeError as error:
            raise RuntimeError(f"{self.what} cannot be captured in a CUDA graph ({error}); {self.instead}") from error
        self.pool = graph.pool()
        return graph.replay
