"""Several engines of one model, each on devices of its own, that answer as one. No JAX here."""

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from infer.engine.request import Engine, Event, Failed, Finished, Request

State = Literal["starting", "ready", "draining", "broken", "stopped"]

# The first that any of them is in is that of all.
_WORST_FIRST: tuple[State, ...] = ("broken", "stopped", "starting", "draining", "ready")

# Requests that begin alike and find engines equally busy go to the same one: its cache knows them.
_PREFIX_TOKENS = 64


class Replicas:
    """Implements `request.Engine`. A request goes to the engine with the fewest."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = list(engines)
        self._lock = threading.Lock()
        self._place_of: dict[str, int] = {}
        self._embeddings = 0

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        with self._lock:
            if request.id in self._place_of:
                raise ValueError(f"a request with the id {request.id!r} is running; ids are unique")
            place = self._place_of[request.id] = self._least_busy(request)

        def tell(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                self._forget(request.id)
            on_event(event)

        try:
            self._engines[place].submit(request, tell)
        except BaseException:
            self._forget(request.id)
            raise

    def _least_busy(self, request: Request) -> int:
        busy = Counter(self._place_of.values())
        prefix = repr((request.tenant, request.prompt_token_ids[:_PREFIX_TOKENS])).encode()
        first = hashlib.sha256(prefix).digest()[0]
        count = len(self._engines)
        order = [(first + step) % count for step in range(count)]
        return min(order, key=lambda place: busy[place])

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._place_of.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            place = self._place_of.get(request_id)
        if place is not None:
            self._engines[place].cancel(request_id)

    def embed(self, prompt_token_ids: tuple[int, ...]) -> list[float]:
        with self._lock:
            self._embeddings += 1
            place = self._embeddings % len(self._engines)
        return self._engines[place].embed(prompt_token_ids)

    def add_adapter(self, name: str, folder: str) -> None:
        """On all of them, or on none."""
        with contextlib.ExitStack() as undo:
            for engine in self._engines:
                engine.add_adapter(name, folder)
                undo.callback(engine.remove_adapter, name)
            undo.pop_all()

    def remove_adapter(self, name: str) -> None:
        for engine in self._engines:
            engine.remove_adapter(name)

    def start(self) -> None:
        for engine in self._engines:
            if engine.state in ("stopped", "broken"):
                engine.start()

    def stop(self, drain_seconds: float) -> None:
        threads = [
            threading.Thread(target=engine.stop, args=(drain_seconds,)) for engine in self._engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def state(self) -> State:
        states = {engine.state for engine in self._engines}
        return next(state for state in _WORST_FIRST if state in states)

    @property
    def max_context(self) -> int:
        return min(engine.max_context for engine in self._engines)

    def statistics(self) -> Mapping[str, float]:
        total: Counter[str] = Counter()
        for engine in self._engines:
            total.update(engine.statistics())
        return total
