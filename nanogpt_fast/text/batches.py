"""Batches of training data: drawn as in nanoGPT, gathered in the background while the step runs.

nanoGPT's get_batch does two things: it draws B random offsets, and it copies B windows of T + 1 tokens out of the file. Only the
draw touches the random state, so only the draw must happen at its place in the program; a thread does the copying. Call
`prefetch()` where nanoGPT calls get_batch and `next()` where the batch is used: the batches are the same, in the same order, even
on a CPU, where dropout draws from the same generator in between.

    batches = Batches(folder, "train", batch_size=12, block_size=1024, device="cuda")
    batches.prefetch()
    for step in range(steps):
        x, y = batches.next()             # (B, T) int64 each, on the device; y is x shifted by one token
        loss = model(x, y)[1]
        batches.prefetch()                # drawn here, gathered during the backward pass
        loss.backward()
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanogpt_fast.text.tokens import bad_id, checksum, open_tokens


class Batches:
    """Random windows of one split of a data folder, drawn as nanoGPT draws them.

    split:       "train" or "val"
    batch_size:  B windows of block_size = T tokens each
    device:      where x and y go; for CUDA through pinned buffers, without waiting for the copy
    generator:   a CPU torch.Generator to draw from; None means torch's default generator, as in nanoGPT
    vocab_size:  if given, ids outside of it raise ValueError; on a GPU the embedding's assertion would kill the process
    Raises FileNotFoundError, and ValueError if the file is damaged or holds fewer than block_size + 1 tokens.
    """

    def __init__(self, folder, split, batch_size, block_size, *, device="cpu", generator=None, vocab_size=None):
        self.path = os.path.join(folder, f"{split}.bin")
        self.tokens = open_tokens(self.path, block_size)
        self.batch_size, self.block_size, self.vocab_size = batch_size, block_size, vocab_size
        self.device = torch.device(device)
        self.generator = generator
        self.checksum = None      # of the tokens; computed for the first checkpoint
        self.drawn = None         # offsets (B,) of the prefetched batch, until `next` takes it
        self._gathering = None    # the future of its tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{split}-batches")
        # CUDA: two pinned buffers in turn, each with an event recorded after its last copy. Pinning needs the CUDA runtime, which
        # a thread must not call while the main thread captures a graph; so it happens here, and the thread only writes memory.
        shape = (2, batch_size, block_size)  # x and y in one buffer, so that one copy moves both
        self._pinned = [(torch.empty(shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event())
                        for _ in range(2)] if self.device.type == "cuda" else []

    def prefetch(self):
        """Draw the next batch now and gather it in the background. Does nothing if a batch is already waiting."""
        if self._gathering is None:
            self.drawn = torch.randint(len(self.tokens) - self.block_size, (self.batch_size,), generator=self.generator)
            self._start()

    def next(self):
        """(x, y): the prefetched batch, or one drawn now."""
        self.prefetch()
        gathering, self._gathering, self.drawn = self._gathering, None, None
        xy, copied = gathering.result()
        if self.device.type == "cpu":
            return xy[0], xy[1]
        xy = xy.to(self.device, non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(self.device))
        return xy[0], xy[1]

    def state_dict(self):
        """What a resumed run needs to continue with the same batches; the caller saves torch's own random state.

        {"drawn": (B,) int64 offsets of the prefetched batch or None, "generator": its state or None,
        "size": tokens in the file, "checksum": theirs}
        """
        if self.checksum is None:
            self.checksum = checksum(self.tokens)
        return {"drawn": None if self.drawn is None else self.drawn.clone(), "size": len(self.tokens), "checksum": self.checksum,
                "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state):
        """Continue where `state_dict` was taken. Raises ValueError if the data or the shape of a batch has changed."""
        drawn = state["drawn"]
        if state["size"] != len(self.tokens):
            raise ValueError(f"{self.path} holds {len(self.tokens):,} tokens, and held {state['size']:,} when the run was "
                             "saved: the data has changed, so an exact resume is impossible")
        self.checksum = checksum(self.tokens)
        if state.get("checksum", self.checksum) != self.checksum:       # earlier checkpoints have none
            raise ValueError(f"{self.path} holds other tokens than when the run was saved, as many: the data has changed, so an exact resume "
                             "is impossible")
        if drawn is not None and (drawn.shape != (self.batch_size,) or drawn.max() >= len(self.tokens) - self.block_size):
            raise ValueError(f"the saved batch ({len(drawn)} windows) does not fit batch_size {self.batch_size} and block_size "
                             f"{self.block_size}: resume with the values of the saved run")
        if self._gathering is not None:
            self._gathering.result()
        self._gathering, self.drawn = None, None
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
        if drawn is not None:
            self.drawn = drawn.cpu().clone()
            self._start()

    def close(self):
        """End the thread."""
        self._thread.shutdown()

    def _start(self):
        target, copied = None, None
        if self._pinned:
            self._pinned.reverse()
            target, copied = self._pinned[0]
            copied.synchronize()  # the copy of two batches ago: done long ago
        self._gathering = self._thread.submit(self._gather, self.drawn.numpy(), target, copied)

    def _gather(self, offsets, target, copied):
        windows = self.tokens[offsets[:, None] + np.arange(self.block_size + 1)]  # (B, T + 1) uint16
        if self.vocab_size is not None and windows.max() >= self.vocab_size:
            b, t = np.argwhere(windows >= self.vocab_size)[0]
            raise bad_id(self.path, windows[b, t], offsets[b] + t, self.vocab_size)
        xy = torch.empty(2, self.batch_size, self.block_size, dtype=torch.int64) if target is None else target
        xy.numpy()[0] = windows[:, :-1]
        xy.numpy()[1] = windows[:, 1:]
        return xy, copied
