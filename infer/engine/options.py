"""How an engine is set up. No JAX here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """Sizes are fixed when the engine starts: what it compiles follows from them.

    max_slots: choices that are computed together at most. max_context: tokens of a prompt and its
      answer together, at most and by default what the model was made for. block_size: tokens of a
      block, the unit in which prefixes are shared. num_blocks: blocks that running requests and
      cached prefixes have together; None is enough for every slot to be full. Memory for keys and
      values is that of all slots and all blocks.
    piece_tokens: prompt tokens read in one go, between two steps of the others. queue_limit:
      requests that may wait. prefix_cache: whether prompts that begin alike share work.
    prefill_share: of the time, how much at most goes to reading prompts while others generate.
    model_version: part of the key of cached prefixes.
    """

    max_slots: int = 16
    max_context: int | None = None
    block_size: int = 32
    num_blocks: int | None = None
    piece_tokens: int = 128
    queue_limit: int = 256
    prefix_cache: bool = True
    prefill_share: float = 0.5
    model_version: str = ""

    def __post_init__(self) -> None:
        _check("max_slots", self.max_slots, high=1024)
        if self.max_context is not None:
            _check("max_context", self.max_context, high=2**24)
        _check("block_size", self.block_size, high=1024)
        if self.num_blocks is not None:
            _check("num_blocks", self.num_blocks, high=2**24)
        _check("piece_tokens", self.piece_tokens, high=8192)
        if self.piece_tokens % self.block_size:
            raise ValueError(
                f"piece_tokens is {self.piece_tokens}; it must be a multiple of block_size "
                f"{self.block_size}"
            )
        _check("queue_limit", self.queue_limit, high=2**20)
        if not 0 < self.prefill_share <= 1:
            raise ValueError(f"prefill_share is {self.prefill_share!r}; it must be in (0, 1]")


def _check(name: str, value: object, *, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be an integer between 1 and {high}")
