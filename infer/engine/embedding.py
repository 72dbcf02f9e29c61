"""The mean of a prompt's final states, read a piece at a time between the steps of others."""

import contextlib
import threading
from collections.abc import Generator
from concurrent.futures import Future

import numpy as np

from infer.engine.blocks import BlockManager, OutOfBlocksError
from infer.engine.request import NotReadyError
from infer.engine.runner import Runner
from infer.engine.scheduler import plan_pieces


def read_embedding(
    tokens: list[int],
    future: "Future[list[float]]",
    *,
    runner: Runner,
    blocks: BlockManager,
    changed: threading.Condition,
) -> Generator[None, None, None]:
    """Reads a prompt in the scratch slot, a piece a turn of the engine's thread. changed: the
    engine's lock, which guards the blocks."""
    total = np.zeros(runner.model.config.hidden_size, np.float32)
    held: list[int] | None = None
    try:
        while held is None:
            with contextlib.suppress(OutOfBlocksError), changed:
                held = blocks.hold([], runner.num_scratch_blocks(len(tokens)))
            if held is None:
                yield  # until others have ended
        for piece in plan_pieces(len(tokens), runner.shapes.pieces):
            part = tokens[piece.begin : piece.end]
            total += runner.read(runner.scratch_slot, held, part, piece.begin, piece.shape)
            yield
        future.set_result((total / np.float32(len(tokens))).tolist())
    finally:
        with changed:
            blocks.release(held or [])
        if not future.done():
            future.set_exception(NotReadyError("the engine ended before the prompt was read"))
