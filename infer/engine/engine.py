"""The engine: a thread that computes many requests at once and tells each what came of it.

A turn of the thread: hear what clients want, give slots to who is next, read one piece of one
prompt, run one token of every choice that has been read. Compiled shapes are fixed and ready before
the first request, so no request waits for a compilation.
"""

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import jax

from infer.completion import Row
from infer.engine.active import Active, ActiveRequests
from infer.engine.agreement import Agreement
from infer.engine.blocks import BlockManager
from infer.engine.compilations import compilations_here, count_compilations
from infer.engine.embedding import read_embedding
from infer.engine.hosts import LOST_SECONDS, EngineFollowers
from infer.engine.loaded_adapters import LoadedAdapters
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.parts import make_parts
from infer.engine.request import Event, Failed, NotReadyError, Request
from infer.engine.scheduler import Scheduler
from infer.engine.structure import TextMatcher
from infer.engine.turns import Turns
from llama_jax.config import Compute

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

State = Literal["starting", "ready", "draining", "broken", "stopped"]


class BatchingEngine:
    """Implements `request.Engine` for one model.

    model: what `llama_jax.load` gives, or a tuple (config, params, tokenizer). mesh: that of
    `placement.serving_mesh`, on which the parameters lie by `placement.RULES`. draft: a smaller
    model of the same vocabulary, which guesses tokens (see `draft_model`); without it and with
    `draft_tokens`, they are looked up in the text. followers: where the devices of the mesh belong
    to several processes, in process 0 the others, which make the same engine and do in `following`
    what it tells them. agreement: there, that with those processes.
    """

    def __init__(
        self,
        model: Any,
        options: EngineOptions | None = None,
        *,
        compute: Compute | None = None,
        mesh: jax.sharding.Mesh | None = None,
        draft: Any = None,
        followers: EngineFollowers | None = None,
        agreement: Agreement | None = None,
    ):
        self._followers = followers
        self.options = options or EngineOptions()
        parts = make_parts(
            model,
            self.options,
            compute=compute or Compute(),
            mesh=mesh,
            draft=draft,
            followers=followers,
            agreement=agreement,
        )
        self._generator, self._runner = parts.generator, parts.runner
        self._num_blocks, self._guesser = parts.num_blocks, parts.guesser
        self._grammars = parts.grammars
        self.model = self._generator.model
        self._adapters = LoadedAdapters(self._runner)
        self._state: State = "stopped"
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._blocks = BlockManager(self._num_blocks, self.options.block_size)
        scheduler = Scheduler(
            self._blocks,
            max_slots=self.options.max_slots,
            shapes=self._runner.shapes.pieces,
            model_version=self.options.model_version,
            save=self._runner.read_out,
        )
        self._requests = ActiveRequests(
            self.options, scheduler=scheduler, runner=self._runner, changed=self._changed
        )
        self._turns = Turns(
            self.options,
            scheduler=scheduler,
            runner=self._runner,
            guesser=self._guesser,
            requests=self._requests,
            changed=self._changed,
        )
        self._is_over = False
        self._has_ended = False
        self._is_alive = True

    # What clients call, from any thread

    @property
    def state(self) -> State:
        return self._state

    @property
    def max_context(self) -> int:
        return self._generator.max_context

    def start(self) -> None:
        with self._changed:
            if self._state not in ("stopped", "broken"):
                raise NotReadyError(f"the engine is {self._state}; it cannot be started again")
            self._state = "starting"
        count_compilations()
        self._begin_afresh()
        self._adapters.reset()
        with self.model.context():
            self._runner.reset()
            self._runner.warm_up()
            self._guesser.start()
            self._runner.drop_inexact_shapes()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        with self._changed:
            self._state = "ready"
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        with self._changed:
            thread = None if self._state in ("stopped", "broken") else self._thread
            if thread is None:
                self._state = "stopped"
            else:
                self._state = "draining"
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: not self._requests.by_id or not self._is_alive, timeout=drain_seconds
                )
                self._is_over = True
                self._changed.notify_all()
        if thread is not None:
            thread.join()
            with self._changed:
                if self._is_alive:
                    self._state = "stopped"
        if self._followers is not None:
            self._followers.close()

    def part(self) -> PagedRunner:
        """In place of `start`: what takes part in the steps that another process begins."""
        assert isinstance(self._runner, PagedRunner)
        return self._runner

    def give_up(self, message: str) -> None:
        """In any thread: everyone who waits hears that no answer will come."""
        with self._changed:
            self._state, self._is_alive = "broken", False
            waiting = list(self._requests.by_id.values())
        for active in waiting:
            active.on_event(Failed("engine", message))

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        self._check_ready()
        rows, matcher = self._rows(request), self._matcher(request)
        with self._changed:
            self._check_ready()
            adapter = self._adapters.named(request.adapter)
            self._requests.come(Active(request, on_event, rows, adapter, matcher))

    def cancel(self, request_id: str) -> None:
        self._requests.cancel(request_id)

    def embed(self, prompt_token_ids: tuple[int, ...]) -> list[float]:
        tokens = self._generator.encode(prompt_token_ids, chat=False)
        future: Future[list[float]] = Future()

        def begin() -> None:
            job = read_embedding(
                tokens, future, runner=self._runner, blocks=self._blocks, changed=self._changed
            )
            self._turns.jobs.append(job)

        self._wish(begin)
        return self._outcome(future)

    def add_adapter(self, name: str, folder: str) -> None:
        factors = self._adapters.stack.read(folder)
        done: Future[None] = Future()

        def load() -> None:
            try:
                place = self._adapters.place_for(name)
            except ValueError as error:
                done.set_exception(error)
                return
            self._adapters.load(name, place, factors)
            done.set_result(None)

        self._wish(load)
        self._outcome(done)

    def remove_adapter(self, name: str) -> None:
        with self._changed:
            self._check_ready()
            adapter = self._adapters.leave(name)
            self._changed.wait_for(
                lambda: (
                    self._has_ended
                    or not any(each.adapter is adapter for each in self._requests.by_id.values())
                )
            )
        done: Future[None] = Future()

        def unload() -> None:
            self._adapters.unload(adapter)
            done.set_result(None)

        self._wish(unload)
        self._outcome(done)

    def statistics(self) -> Mapping[str, float]:
        return self._requests.statistics()

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise NotReadyError(f"the engine is {self._state} and takes no requests")

    def _wish(self, wish: Callable[[], None]) -> None:
        """Something to do in the thread, between two turns."""
        with self._changed:
            self._check_ready()
            self._requests.inbox.append(wish)
            self._changed.notify_all()

    def _outcome(self, future: "Future[_Result]") -> "_Result":
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if self._has_ended:
                    raise NotReadyError(f"the engine is {self._state}") from None

    def _matcher(self, request: Request) -> TextMatcher | None:
        if request.structure is None:
            return None
        if self._grammars is None:
            raise ValueError("structure needs a tokenizer; this model has none")
        if request.params.ignore_eos or request.params.min_tokens:
            name = "ignore_eos" if request.params.ignore_eos else "min_tokens"
            raise ValueError(
                f"{name} does not go with a structure (response_format, or a tool that must be "
                f"called), which decides where a text ends; leave it out"
            )
        return self._grammars.compile(request.structure)

    def _rows(self, request: Request) -> list[Row]:
        """A checked row for each choice."""
        params = request.params
        if not request.prompt_token_ids:
            raise ValueError("the prompt has no tokens; it must have at least one")
        ids = self._generator.encode(request.prompt_token_ids, chat=False)
        self._generator.check_wishes(params, where="the request")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return [
            Row(
                prompt=None,
                prompt_token_ids=ids,
                params=params,
                seed=seed,
                prompt_index=0,
                index=index,
                limit=params.limit_tokens(len(ids), self.max_context),
                end_tokens=self._generator.end_tokens,
                tokenizer=self._generator.tokenizer,
                continues_text=request.continues_text,
            )
            for index in range(params.n)
        ]

    # The thread

    def _run(self) -> None:
        try:
            self._requests.first_compilation = compilations_here()
            with self.model.context():
                while self._hear():
                    self._turns.take()
            self._fail_all("drained", "the server stopped before the answer was complete")
        except Exception as error:
            # The end of the thread, whatever its cause: everyone who waits must hear of it.
            log.exception("the engine broke")
            with self._changed:
                self._state = "broken"
                self._is_alive = False
            reason = f"the engine broke: {error}"
            if self._followers is not None:
                reason = self._followers.lost(LOST_SECONDS) or reason
            self._fail_all("engine", reason)
            if self._followers is not None:
                # Which steps the others have begun is not known.
                self._followers.give_up(reason)
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _hear(self) -> bool:
        """Waits for something to do and takes in what clients want; False when it is over."""
        with self._changed:
            while not (
                self._requests.inbox or self._requests.by_id or self._turns.jobs or self._is_over
            ):
                self._changed.wait()
            wishes, self._requests.inbox = self._requests.inbox, deque()
            if self._is_over:
                return False
        for wish in wishes:
            wish()
        return True

    def _fail_all(self, reason: Literal["engine", "drained"], message: str) -> None:
        with self._changed:
            failed = list(self._requests.by_id)
            jobs, self._turns.jobs = self._turns.jobs, deque()
        for request_id in failed:
            self._requests.end(self._requests.by_id[request_id], Failed(reason, message))
        for job in jobs:
            job.close()
