"""What a client asks of an engine and what it hears back. No JAX here.

An engine runs many requests at once, in a thread of its own. A server hands it `Request`s with
`submit` and gets `Event`s through the callback it gave, from the engine's thread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from infer.completion import Piece
from infer.params import SamplingParams


@dataclass(frozen=True)
class Structure:
    """What the text must match. kind: `json_schema`, `json_object`, `regex` or `grammar` (Lark).
    source: the schema as a JSON text, the pattern, the grammar; empty for `json_object`."""

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    source: str = ""


@dataclass(frozen=True)
class Request:
    """One prompt, of which `params.n` choices are generated.

    id: unique among the requests of an engine. continues_text: whether the answer follows the
    prompt's text (a completion) or begins afresh (a chat answer). adapter: the name of a loaded
    LoRA adapter, None for the base. tenant: whose request it is: cached prefixes are never shared
    between tenants, and waiting requests are served fairly among them. priority: lower goes first.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    continues_text: bool = True
    adapter: str | None = None
    tenant: str = ""
    priority: int = 0
    structure: Structure | None = None


@dataclass(frozen=True)
class Started:
    """The prompt has been read. cached_tokens: how many of its tokens the prefix cache held.
    prompt_logprobs: with `echo` and `logprobs`, as in `completion.Output`, else None.
    queued_seconds: from its submission until it had a slot."""

    cached_tokens: int
    prompt_logprobs: list[Any] | None = None
    queued_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Failed:
    """The request ended without an answer. reason: `cancelled`, `request` (what it asks cannot be
    done), `engine` (the engine broke), or `drained` (the time to finish at shutdown was over)."""

    reason: Literal["cancelled", "request", "engine", "drained"]
    message: str


@dataclass(frozen=True)
class Finished:
    """All choices have ended. completion_tokens: of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


# In this order: `Started`, then `Piece`s (whose `prompt_index` is 0), then `Finished`;
# or `Failed` at any point, and nothing after it.
Event = Started | Piece | Finished | Failed


class QueueFullError(RuntimeError):
    """As many requests wait as may. retry_after_seconds: when a place should be free."""

    def __init__(self, message: str, retry_after_seconds: float):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NotReadyError(RuntimeError):
    """The engine is starting, draining or broken, and takes no requests."""


class Engine(Protocol):
    """What a server needs of an engine. Every method may be called from any thread."""

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Queues a request. `on_event` is called from the engine's thread and must not block.

        Raises ValueError for a request that can never be served (too long, ids outside the
        vocabulary, an unknown adapter, a structure that cannot be compiled), QueueFullError,
        NotReadyError.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request, which then hears `Failed("cancelled")`; its blocks are free at once.
        Nothing happens when it has ended already."""

    def embed(self, prompt_token_ids: tuple[int, ...]) -> list[float]:
        """The mean of the final hidden states of the prompt [D]. Blocks."""

    def add_adapter(self, name: str, folder: str) -> None:
        """Loads a PEFT adapter folder beside the base. Raises ValueError; the engine runs on."""

    def remove_adapter(self, name: str) -> None:
        """Unloads an adapter once its running requests have ended."""

    def start(self) -> None:
        """Compiles or loads every shape it will use, then takes requests. Blocks. May be called
        again once the engine is broken or stopped."""

    def stop(self, drain_seconds: float) -> None:
        """Takes no more requests, waits for the running ones, fails what is left. Blocks."""

    @property
    def state(self) -> Literal["starting", "ready", "draining", "broken", "stopped"]: ...

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def statistics(self) -> Mapping[str, float]:
        """Counters and gauges by name, for metrics: `requests_waiting`, `requests_running`,
        `blocks_total`, `blocks_free`, `prefix_hit_tokens_total`, `prefix_query_tokens_total`,
        `prompt_tokens_total`, `generated_tokens_total`, `preemptions_total`, `aborts_total`,
        `compilations_total` (since start), `draft_tokens_total`, `accepted_tokens_total`."""
