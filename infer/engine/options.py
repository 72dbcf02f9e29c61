"""How an engine is set up. No JAX here."""

from dataclasses import dataclass
from typing import Literal

from infer.params import checked_int, checked_number
from llama_jax.config import MESH_AXES

MAX_DRAFT_TOKENS = 7

# Up to this many tokens a step sums in the order in which it sums a few: checked on a CPU with
# AVX-512, and by the engine's tests.
_MAX_DRAFTED_TOKENS = 24

_SERVING_AXES = ("tensor", "fsdp", "data")


# Names with the least and the greatest value.
_INTEGERS = (
    ("max_slots", 1, 1024),
    ("max_context", 1, 2**24),
    ("block_size", 1, 1024),
    ("num_blocks", 1, 2**24),
    ("piece_tokens", 1, 8192),
    ("queue_limit", 1, 2**20),
    ("max_adapters", 0, 256),
    ("max_lora_rank", 1, 1024),
    ("draft_tokens", 0, MAX_DRAFT_TOKENS),
)
_OPTIONAL = ("max_context", "num_blocks")


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
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, checked_int(name, value, low=low, high=high))
        if self.piece_tokens % self.block_size:
            raise ValueError(
                f"piece_tokens is {self.piece_tokens}; it must be a multiple of block_size "
                f"{self.block_size}"
            )
        cache_named(self.cache)
        share = checked_number("prefill_share", self.prefill_share, low=0.0, high=1.0)
        if share == 0:
            raise ValueError("prefill_share is 0; it must be in (0, 1]")
        object.__setattr__(self, "prefill_share", share)

    @property
    def max_drafted_rows(self) -> int:
        """With more rows than this, steps are better filled by requests than by guesses."""
        return _MAX_DRAFTED_TOKENS // (1 + self.draft_tokens) if self.draft_tokens else 0


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
