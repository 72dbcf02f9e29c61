"""How an engine is set up. No JAX here."""

from dataclasses import dataclass
from typing import Literal

from llama_jax.config import MESH_AXES

MAX_DRAFT_TOKENS = 7

# Up to this many tokens a step sums in the order in which it sums a few: checked on a CPU with
# AVX-512, and by the engine's tests.
_MAX_DRAFTED_TOKENS = 24

_SERVING_AXES = ("tensor", "fsdp", "data")


@dataclass(frozen=True)
class EngineOptions:
    """Sizes are fixed when the engine starts: what it compiles follows from them.

    max_slots: choices that are computed together at most. max_context: tokens of a prompt and its
      answer together, at most what the model was made for; None is as many, as far as an eighth of
      the memory holds all slots and blocks. block_size: tokens of a
      block, the unit in which prefixes are shared. num_blocks: blocks that running requests and
      cached prefixes have together; None is enough for every slot to be full. Memory for keys and
      values is that of all slots and all blocks.
    piece_tokens: prompt tokens read in one go, between two steps of the others. queue_limit:
      requests that may wait. prefix_cache: whether prompts that begin alike share work.
    exact: whether an answer's tokens never depend on who else is there. False lets one request
      alone run in steps of one row, and others in products of any number of rows, which on a CPU
      take less time and sum in another order: where two tokens are all but equally likely, the
      answer may differ from that in a batch.
    prefill_share: of the time, how much at most goes to reading prompts while others generate, but
      where many prompts wait for their last piece only (see `Scheduler.reading_share`).
    max_adapters, max_lora_rank: LoRA adapters that may be loaded at a time, and their largest
      rank. Their factors cost time and memory whether used or not.
    draft_tokens: tokens that are guessed, from what came before or by a draft model, and checked in
      one step; 0 is off. Answers are the same either way. Used while few enough rows run (see
      `max_drafted_rows`).
    model_version: part of the key of cached prefixes.
    cache: where keys and values lie. `slots`: each choice has a contiguous slot, and blocks are
      copied into it, the faster way on a CPU. `pages`: choices hold blocks where they lie, the only
      way on a mesh; memory is then that of `num_blocks` and of one choice more. None is `pages` on
      TPUs and on a mesh, else `slots`.
    """

    max_slots: int = 16
    max_context: int | None = None
    block_size: int = 32
    num_blocks: int | None = None
    piece_tokens: int = 128
    queue_limit: int = 256
    prefix_cache: bool = True
    exact: bool = True
    prefill_share: float = 0.4
    max_adapters: int = 0
    max_lora_rank: int = 16
    draft_tokens: int = 0
    model_version: str = ""
    cache: Literal["slots", "pages"] | None = None

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
        for name, high in (("max_adapters", 256), ("draft_tokens", MAX_DRAFT_TOKENS)):
            if getattr(self, name) != 0:
                _check(name, getattr(self, name), high=high)
        _check("max_lora_rank", self.max_lora_rank, high=1024)
        cache_named(self.cache)
        if not 0 < self.prefill_share <= 1:
            raise ValueError(f"prefill_share is {self.prefill_share!r}; it must be in (0, 1]")

    @property
    def max_drafted_rows(self) -> int:
        """With more rows than this, steps are better filled by requests than by guesses."""
        return _MAX_DRAFTED_TOKENS // (1 + self.draft_tokens) if self.draft_tokens else 0


def _check(name: str, value: object, *, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be an integer between 1 and {high}")


def cache_named(name: str | None) -> Literal["slots", "pages"] | None:
    """Raises ValueError."""
    match name:
        case None | "slots" | "pages":
            return name
    raise ValueError(f"cache is {name!r}; it must be slots or pages")


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes of `tensor=4`, `tensor=8,fsdp=2` or `data=2,tensor=4`. Raises ValueError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, separator, number = part.strip().partition("=")
        if not separator or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"mesh is {text!r}; write axes and sizes, such as tensor=8,fsdp=2")
        if name not in _SERVING_AXES:
            known = "does not help to serve" if name in MESH_AXES else "is unknown"
            raise ValueError(
                f"mesh axis {name!r} {known}; give tensor, fsdp to divide further, or data, the "
                f"number of copies"
            )
        if name in sizes:
            raise ValueError(f"mesh is {text!r}; it names {name} twice")
        sizes[name] = int(number)
    return sizes
