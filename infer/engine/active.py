"""The requests of an engine, from when they come until everyone who waits has heard the end."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from infer.completion import Piece, Row
from infer.engine.compilations import compilations_here
from infer.engine.loaded_adapters import Adapter
from infer.engine.options import EngineOptions
from infer.engine.request import Event, Failed, Finished, QueueFullError, Request, Started
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice, Scheduler
from infer.engine.structure import TextMatcher

log = logging.getLogger(__name__)

# Of `counts`, what `statistics` gives.
_COUNTERS = (
    "prefix_hit_tokens_total",
    "prefix_query_tokens_total",
    "prompt_tokens_total",
    "generated_tokens_total",
    "aborts_total",
    "compilations_total",
    "draft_tokens_total",
    "accepted_tokens_total",
)


@dataclass(eq=False)
class Active:
    """A request on its way. choices: those still to end. later: those that wait until the prompt
    has been read once, because then they find it in the cache."""

    request: Request
    on_event: Callable[[Event], None]
    rows: list[Row]
    adapter: Adapter | None
    matcher: TextMatcher | None
    choices: list[Choice] = field(default_factory=list)
    later: list[Row] = field(default_factory=list)
    num_ended: int = 0
    is_admitted: bool = False
    cached_tokens: int = 0
    queued_seconds: float = 0.0
    submitted: float = field(default_factory=time.monotonic)


class ActiveRequests:
    """changed: the engine's lock, which also guards the scheduler. Whoever waits for it is told
    when a request has come or ended.

    by_id: those that have not ended. inbox: what the engine's thread does between two turns.
    counts: since the engine started. first_compilation: compilations of the engine's thread before
    it began.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        scheduler: Scheduler,
        runner: Runner,
        changed: threading.Condition,
    ):
        self._options, self._scheduler, self._runner = options, scheduler, runner
        self._changed = changed
        self.by_id: dict[str, Active] = {}
        self.inbox: deque[Callable[[], None]] = deque()
        self.counts: Counter[str] = Counter()
        self.first_compilation = 0
        self._request_seconds = 1.0  # a running mean of how long requests take

    # In any thread

    def come(self, active: Active) -> None:
        """The caller has the lock. Raises ValueError, QueueFullError."""
        request, options = active.request, self._options
        if request.id in self.by_id:
            raise ValueError(f"a request with the id {request.id!r} is running; ids are unique")
        waiting = self._num_waiting()
        free = max(0, options.max_slots - len(self._scheduler.running))
        if waiting >= options.queue_limit + free:
            seconds = self._request_seconds * (1 + waiting / options.max_slots)
            raise QueueFullError(
                f"{waiting} requests wait, as many as may (queue_limit); try again in "
                f"{math.ceil(seconds)} seconds",
                seconds,
            )
        self.by_id[request.id] = active
        self.inbox.append(lambda: self._begin(active))
        self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self.by_id:
                self.inbox.append(lambda: self._end_cancelled(request_id))
                self._changed.notify_all()

    def statistics(self) -> Mapping[str, float]:
        with self._changed:
            running = {id(c.request) for c in self._scheduler.running}
            return {
                "requests_waiting": self._num_waiting(),
                "requests_running": len(running),
                "blocks_total": self._scheduler.blocks.num_blocks,
                "blocks_free": self._scheduler.blocks.num_free,
                "preemptions_total": self._scheduler.num_preemptions,
                **{name: self.counts[name] for name in _COUNTERS},
            }

    def _num_waiting(self) -> int:
        return sum(not each.is_admitted for each in self.by_id.values())

    # In the engine's thread

    def _begin(self, active: Active) -> None:
        first, *later = active.rows
        if first.limit == 0 and not first.wants_prompt_logprobs:
            active.is_admitted = True
            self.tell(active, Started(0))
            for row in active.rows:
                for text in row.start():
                    self.tell(active, text)
            self._finish(active)
            return
        active.later = later
        self.add(active, first)

    def add(self, active: Active, row: Row) -> None:
        use_cache = self._options.prefix_cache
        if row.wants_prompt_logprobs and row.index == 0:
            use_cache = False  # every state of the prompt is needed
        with self._changed:
            identity = "" if active.adapter is None else active.adapter.identity
            choice = self._scheduler.make_choice(
                active.request, row, adapter=identity, use_cache=use_cache
            )
            choice.adapter = -1 if active.adapter is None else active.adapter.place
            choice.matcher = active.matcher and active.matcher.copy()
            active.choices.append(choice)
            self._scheduler.add(choice)

    def _end_cancelled(self, request_id: str) -> None:
        active = self.by_id.get(request_id)
        if active is not None:
            self.counts["aborts_total"] += 1
            self.end(active, Failed("cancelled", "the request was cancelled"))

    def choice_ended(self, active: Active, choice: Choice) -> None:
        with self._changed:
            self._remove(choice)
        active.choices.remove(choice)
        active.num_ended += 1
        if active.num_ended == len(active.rows):
            seconds = time.monotonic() - active.submitted
            self._request_seconds += 0.2 * (seconds - self._request_seconds)
            self._finish(active)

    def _finish(self, active: Active) -> None:
        tokens = sum(len(row.token_ids) for row in active.rows)
        prompt_tokens = len(active.request.prompt_token_ids)
        self.end(active, Finished(prompt_tokens, tokens, active.cached_tokens))

    def end(self, active: Active, event: Finished | Failed) -> None:
        """Everything it held is free before it hears of it."""
        with self._changed:
            for choice in active.choices:
                self._remove(choice)
            active.choices, active.later = [], []
            del self.by_id[active.request.id]
            self.counts["compilations_total"] = compilations_here() - self.first_compilation
            self._changed.notify_all()
        self.tell(active, event)

    def tell(self, active: Active, event: Event | Piece) -> None:
        try:
            active.on_event(event)
        except Exception:
            # What one client's callback does must not end the others' requests.
            log.exception("the callback of request %s failed; it is cancelled", active.request.id)
            with self._changed:
                self.inbox.append(lambda: self._end_cancelled(active.request.id))

    def _remove(self, choice: Choice) -> None:
        self._scheduler.remove(choice)
        self._runner.forget(choice)
