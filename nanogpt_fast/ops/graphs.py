"""CUDA graphs: capture functions on a side stream, and replay each with one launch instead of hundreds.

A captured function must read and write memory that stays allocated; its shapes are fixed at capture.
"""
import torch


class Recorder:
    """Captures graphs that share one memory pool.

    Sharing is safe because the graphs never run concurrently, and every tensor of the pool whose contents must persist is still
    alive when the next graph is captured.
    """

    def __init__(self, device, what, instead):
        """what: what is being captured; instead: what to do if capture fails. Both appear in the error message."""
        self.device, self.what, self.instead = device, what, instead
        self.stream = torch.cuda.Stream(device)
        self.pool = None

    def run(self, function):
        """Run the function on the capture stream: a warm-up that gets lazy compilation and allocation done."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function):
        """Capture the function without executing it; returns a callable that replays it on the current stream.

        Raises RuntimeError if something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Pass the stream explicitly: torch's default capture stream may belong to another GPU.
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                function()
        except RuntimeError as error:
            raise RuntimeError(f"{self.what} cannot be captured in a CUDA graph ({error}); {self.instead}") from error
        self.pool = graph.pool()
        return graph.replay
