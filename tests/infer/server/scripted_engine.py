"""An engine that says what a script tells it, one token a step, and keeps the engine's protocol."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from infer.completion import Row, make_logprob
from infer.engine.request import (
    Failed,
    Finished,
    NotReadyError,
    QueueFullError,
    Request,
    Started,
)

Script = Callable[[Request, int], Iterable[int]]


@dataclass
class _Running:
    request: Request
    listen: Callable
    rows: list[Row]
    tokens: list
    num_tokens: int = 0
    is_cancelled: bool = False


@dataclass
class ScriptedEngine:
    """script: token ids of a choice, by request and index. step_seconds: between tokens of one
    request. slots: requests at once; queue_limit: those that may wait. start_seconds: how long
    start blocks; start_error: raised by it."""

    tokenizer: object
    script: Script
    step_seconds: float = 0.0
    slots: int = 8
    queue_limit: int = 1000
    max_context: int = 256
    start_seconds: float = 0.0
    start_error: Exception | None = None
    end_tokens: frozenset = frozenset({258})
    adapters: dict = field(default_factory=dict)
    state: str = "starting"
    seen: list = field(default_factory=list)
    aborts: int = 0
    generated: int = 0

    def __post_init__(self):
        self._waiting, self._active = deque(), []
        self._lock = threading.Lock()
        self._thread = None
        self._breaks = False
        self._drain_until = None

    # The protocol

    def start(self):
        time.sleep(self.start_seconds)
        if self.start_error is not None:
            raise self.start_error
        self._breaks = False
        self.state = "ready"
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request, on_event):
        if self.state != "ready":
            raise NotReadyError(f"the engine is {self.state}")
        length = len(request.prompt_token_ids)
        if length >= self.max_context and request.params.max_tokens != 0:
            raise ValueError(f"the prompt has {length} tokens; the context is {self.max_context}")
        limit = request.params.limit_tokens(length, self.max_context)
        rows = [
            Row(
                prompt=None,
                prompt_token_ids=list(request.prompt_token_ids),
                params=request.params,
                seed=0,
                prompt_index=0,
                index=index,
                limit=limit,
                end_tokens=self.end_tokens,
                tokenizer=self.tokenizer,
                continues_text=request.continues_text,
            )
            for index in range(request.params.n)
        ]
        tokens = [iter(self.script(request, index)) for index in range(request.params.n)]
        with self._lock:
            if len(self._waiting) >= self.queue_limit + max(0, self.slots - len(self._active)):
                raise QueueFullError(f"{self.queue_limit} requests wait", 3.0)
            self.seen.append(request)
            self._waiting.append(_Running(request, on_event, rows, tokens))

    def cancel(self, request_id):
        with self._lock:
            for each in [*self._waiting, *self._active]:
                if each.request.id == request_id:
                    each.is_cancelled = True

    def embed(self, prompt_token_ids):
        return [float(len(prompt_token_ids)), 1.0, -0.5]

    def add_adapter(self, name, folder):
        if "bad" in folder:
            raise ValueError(f"{folder} is no adapter")
        self.adapters[name] = folder

    def remove_adapter(self, name):
        del self.adapters[name]

    def stop(self, drain_seconds):
        if self.state == "ready":
            self.state = "draining"
        end = time.monotonic() + drain_seconds
        while (self._waiting or self._active) and time.monotonic() < end:
            time.sleep(0.005)
        self.state = "stopped"
        if self._thread is not None:
            self._thread.join()
        for each in [*self._active, *self._waiting]:
            each.listen(Failed("drained", "the time is over"))

    def statistics(self):
        return {
            "requests_waiting": len(self._waiting),
            "requests_running": len(self._active),
            "blocks_total": 100,
            "blocks_free": 100 - len(self._active),
            "aborts_total": self.aborts,
            "generated_tokens_total": self.generated,
            "compilations_total": 0,
        }

    # What tests do to it

    def break_down(self):
        self._breaks = True

    @property
    def is_idle(self):
        return not self._waiting and not self._active

    # The loop

    def _loop(self):
        while self.state in ("ready", "draining"):
            if self._breaks:
                self.state = "broken"
                with self._lock:
                    for each in [*self._active, *self._waiting]:
                        each.listen(Failed("engine", "boom"))
                    self._active.clear()
                    self._waiting.clear()
                return
            with self._lock:
                while self._waiting and len(self._active) < self.slots:
                    self._begin(self._waiting.popleft())
                self._active = [each for each in self._active if self._step(each)]
                busy = bool(self._active)
            time.sleep(self.step_seconds if busy and self.step_seconds else 0.0005)

    def _begin(self, each):
        echoed = each.request.params.echo and each.request.params.logprobs is not None
        logprobs = None
        if echoed:
            ids = each.request.prompt_token_ids
            logprobs = [None, *(self._logprob(each.request, token) for token in ids[1:])]
        each.listen(Started(0, logprobs))
        for row in each.rows:
            for piece in row.start():
                each.listen(piece)
        self._active.append(each)

    def _step(self, each):
        """One token of every choice; whether there will be more."""
        if each.is_cancelled:
            self.aborts += 1
            each.listen(Failed("cancelled", ""))
            return False
        for row, tokens in zip(each.rows, each.tokens, strict=True):
            if row.finish_reason is not None:
                continue
            token = next(tokens, next(iter(self.end_tokens)))
            wanted = each.request.params.logprobs is not None
            each.num_tokens += 1
            self.generated += 1
            each.listen(row.push(token, self._logprob(each.request, token) if wanted else None))
        if any(row.finish_reason is None for row in each.rows):
            return True
        each.listen(Finished(len(each.request.prompt_token_ids), each.num_tokens, 0))
        return False

    def _logprob(self, request, token):
        top = [(token, -0.5), *((other, -2.0 - other) for other in range(3))]
        return make_logprob(self.tokenizer, token, -0.5, top[: request.params.logprobs])


def saying(tokenizer, text: str) -> Script:
    """The same text to everyone, for models whose tokens are bytes."""
    return lambda request, index: tokenizer.encode(text, add_special_tokens=False)
