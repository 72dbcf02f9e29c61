"""The engine: a thread that computes many requests at once and tells each what came of it.

A turn of the thread: hear what clients want, give slots to who is next, read one piece of one
prompt, run one token of every choice that has been read. Compiled shapes are fixed and ready before
the first request, so no request waits for a compilation.
"""

import contextlib
import itertools
import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from infer import generate
from infer.completion import Piece as TextPiece
from infer.completion import Row
from infer.engine import placement
from infer.engine.blocks import BlockManager, OutOfBlocksError
from infer.engine.compilations import compilations_here, count_compilations
from infer.engine.draft_model import DraftModel
from infer.engine.guesses import Guesser, small_model
from infer.engine.hosts import LOST_SECONDS, Followers, Leader
from infer.engine.leading import LeadingRunner, follow
from infer.engine.memory import (
    blocks_and_context,
    check_context,
    longest_context,
    pages_and_context,
)
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.request import (
    Event,
    Failed,
    Finished,
    NotReadyError,
    QueueFullError,
    Request,
    Started,
)
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice, Piece, Scheduler, plan_pieces
from infer.engine.slot_runner import SlotRunner
from infer.engine.step import Member, Step
from infer.engine.structure import Grammars, StructureError, TextMatcher
from infer.layers import Layers
from infer.sampling import NO_TOKEN, Sampled
from llama_jax.config import Compute

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

State = Literal["starting", "ready", "draining", "broken", "stopped"]


@dataclass(frozen=True)
class _Adapter:
    """place: its number in the stack. identity: no two that were ever loaded share it."""

    place: int
    identity: str


@dataclass(eq=False)
class _Active:
    """A request on its way. choices: those still to end. later: those that wait until the prompt
    has been read once, because then they find it in the cache."""

    request: Request
    on_event: Callable[[Event], None]
    rows: list[Row]
    adapter: "_Adapter | None"
    matcher: TextMatcher | None
    choices: list[Choice] = field(default_factory=list)
    later: list[Row] = field(default_factory=list)
    num_ended: int = 0
    is_admitted: bool = False
    cached_tokens: int = 0
    queued_seconds: float = 0.0
    submitted: float = field(default_factory=time.monotonic)


class BatchingEngine:
    """Implements `request.Engine` for one model.

    model: what `llama_jax.load` gives, or a tuple (config, params, tokenizer). mesh: that of
    `placement.serving_mesh`, on which the parameters lie by `placement.RULES`. draft: a smaller
    model of the same vocabulary, which guesses tokens (see `draft_model`); without it and with
    `draft_tokens`, they are looked up in the text. followers: where the devices of the mesh belong
    to several processes, the others, which made the same engine and called `follow`.
    """

    def __init__(
        self,
        model: Any,
        options: EngineOptions | None = None,
        *,
        compute: Compute | None = None,
        mesh: jax.sharding.Mesh | None = None,
        draft: Any = None,
        followers: Followers | None = None,
    ):
        self._followers = followers
        self.options = options or EngineOptions()
        config, params, tokenizer = generate.parts_of(model)
        check_context(config, self.options.max_context)
        longest = longest_context(config)
        compute = compute or Compute()
        if mesh is not None:
            compute = replace(compute, rules=placement.RULES)
        uses_pages = placement.uses_pages(self.options, mesh)
        small = None
        if draft is not None:
            small = small_model(
                draft, self.options, config=config, tokenizer=tokenizer, compute=compute, mesh=mesh
            )
        small_config = None if small is None else small.config
        if uses_pages:
            self._num_blocks, context = pages_and_context(
                config,
                self.options,
                longest,
                dtype=compute.held_dtype,
                mesh=mesh,
                draft=small_config,
            )
        else:
            self._num_blocks, context = blocks_and_context(
                config, self.options, longest, dtype=compute.held_dtype, draft=small_config
            )
        is_stacked = isinstance(params["layers"], dict)
        layers: Layers = "auto"
        if is_stacked:
            # Pages are handed on through a scan as well, which needs no copy of the weights.
            layers = "scanned" if uses_pages else "unrolled"
        self._generator = generate.Generator(
            config,
            params,
            tokenizer,
            compute=compute,
            mesh=mesh,
            layers=layers,
            max_context=context,
        )
        self.model = self._generator.model
        make_runner: Any = PagedRunner if uses_pages else SlotRunner
        if followers is not None:
            make_runner = partial(LeadingRunner, followers=followers)
        self._runner: Runner = make_runner(
            self.model, self.options, capacity=self.max_context, num_blocks=self._num_blocks
        )
        draft_model = None
        if small is not None:
            draft_model = DraftModel(
                small,
                self.options,
                longest=longest_context(small.config),
                capacity=self._runner.capacity,
                shapes=self._runner.shapes.pieces,
                vocab_size=config.vocab_size,
            )
        self._guesser = Guesser(self.options, self._runner, draft_model)
        tokenizer = self._generator.tokenizer
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            ends = self._generator.end_tokens
            self._grammars = Grammars(tokenizer, vocab_size=config.vocab_size, end_tokens=ends)
        self._serials = itertools.count()
        self._state: State = "stopped"
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._blocks = BlockManager(self._num_blocks, self.options.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_slots=self.options.max_slots,
            shapes=self._runner.shapes.pieces,
            model_version=self.options.model_version,
            save=self._save,
        )
        self._active: dict[str, _Active] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._jobs: deque[Generator[None, None, None]] = deque()
        self._counts: Counter[str] = Counter()
        self._first_compilation = 0
        self._owed_seconds = 0.0
        self._ahead: Step | None = None  # begun, and not read
        self._request_seconds = 1.0  # a running mean of how long requests take
        self._is_over = False
        self._has_ended = False
        self._is_alive = True
        self._adapters: dict[str, _Adapter] = {}
        self._leaving: set[int] = set()
        if self._runner.adapters is not None:
            for place in range(self._runner.adapters.count):
                self._runner.adapters.put(place, {})
            self._runner.use_adapters()

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
            if self._thread is None or self._state in ("stopped", "broken"):
                self._state = "stopped"
                return
            self._state = "draining"
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._active or not self._is_alive, timeout=drain_seconds
            )
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        if self._followers is not None:
            self._followers.close()
        with self._changed:
            if self._is_alive:
                self._state = "stopped"

    def follow(self, leader: Leader) -> None:
        """In place of `start`: takes part in the steps of another process until it stops."""
        assert isinstance(self._runner, PagedRunner)
        follow(self._runner, leader)

    def give_up(self, message: str) -> None:
        """In any thread: everyone who waits hears that no answer will come."""
        with self._changed:
            self._state, self._is_alive = "broken", False
            waiting = list(self._active.values())
        for active in waiting:
            active.on_event(Failed("engine", message))

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        self._check_ready()
        rows, matcher = self._rows(request), self._matcher(request)
        with self._changed:
            self._check_ready()
            active = _Active(request, on_event, rows, self._adapter(request), matcher)
            if request.id in self._active:
                raise ValueError(f"a request with the id {request.id!r} is running; ids are unique")
            waiting = sum(not each.is_admitted for each in self._active.values())
            free = max(0, self.options.max_slots - len(self._scheduler.running))
            if waiting >= self.options.queue_limit + free:
                seconds = self._request_seconds * (1 + waiting / self.options.max_slots)
                raise QueueFullError(
                    f"{waiting} requests wait, as many as may (queue_limit); try again in "
                    f"{math.ceil(seconds)} seconds",
                    seconds,
                )
            self._active[request.id] = active
            self._inbox.append(lambda: self._enqueue(active))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._active:
                self._inbox.append(lambda: self._cancel(request_id))
                self._changed.notify_all()

    def embed(self, prompt_token_ids: tuple[int, ...]) -> list[float]:
        tokens = self._generator.encode(prompt_token_ids, chat=False)
        future: Future[list[float]] = Future()
        self._wish(lambda: self._jobs.append(self._embed(tokens, future)))
        return self._outcome(future)

    def add_adapter(self, name: str, folder: str) -> None:
        stack = self._runner.adapters
        if stack is None:
            raise ValueError("this engine serves no adapters; start it with max_adapters above 0")
        factors = stack.read(folder)
        done: Future[None] = Future()

        def load() -> None:
            taken = {adapter.place for adapter in self._adapters.values()} | self._leaving
            free = [place for place in range(stack.count) if place not in taken]
            if name in self._adapters:
                done.set_exception(ValueError(f"an adapter {name!r} is loaded; remove it first"))
            elif not free:
                message = f"{stack.count} adapters are loaded, as many as may (max_adapters)"
                done.set_exception(ValueError(message))
            else:
                stack.put(free[0], factors)
                self._runner.use_adapters()
                identity = f"{name} {next(self._serials)}"
                self._adapters[name] = _Adapter(free[0], identity)
                done.set_result(None)

        self._wish(load)
        self._outcome(done)

    def remove_adapter(self, name: str) -> None:
        stack = self._runner.adapters
        with self._changed:
            self._check_ready()
            adapter = self._adapters.pop(name, None)
            if adapter is None or stack is None:
                raise ValueError(f"no adapter {name!r} is loaded; {self._loaded()}")
            self._leaving.add(adapter.place)
            self._changed.wait_for(
                lambda: (
                    self._has_ended
                    or not any(each.adapter is adapter for each in self._active.values())
                )
            )
        done: Future[None] = Future()

        def unload() -> None:
            stack.put(adapter.place, {})
            self._leaving.discard(adapter.place)
            done.set_result(None)

        self._wish(unload)
        self._outcome(done)

    def _wish(self, wish: Callable[[], None]) -> None:
        """Something to do in the thread, between two turns."""
        with self._changed:
            self._check_ready()
            self._inbox.append(wish)
            self._changed.notify_all()

    def _outcome(self, future: "Future[_Result]") -> "_Result":
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if self._has_ended:
                    raise NotReadyError(f"the engine is {self._state}") from None

    def _loaded(self) -> str:
        names = ", ".join(map(repr, sorted(self._adapters)))
        return f"loaded are {names}" if names else "none is loaded"

    def _adapter(self, request: Request) -> _Adapter | None:
        if request.adapter is None:
            return None
        if request.adapter not in self._adapters:
            raise ValueError(f"there is no adapter {request.adapter!r}; {self._loaded()}")
        return self._adapters[request.adapter]

    def _matcher(self, request: Request) -> TextMatcher | None:
        if request.structure is None:
            return None
        if self._grammars is None:
            raise ValueError("structure needs a tokenizer; this model has none")
        if request.params.ignore_eos or request.params.min_tokens:
            raise ValueError("structure decides where a text ends: leave ignore_eos and min_tokens")
        return self._grammars.compile(request.structure)

    def statistics(self) -> Mapping[str, float]:
        with self._changed:
            running = {id(c.request) for c in self._scheduler.running}
            return {
                "requests_waiting": sum(not each.is_admitted for each in self._active.values()),
                "requests_running": len(running),
                "blocks_total": self._blocks.num_blocks,
                "blocks_free": self._blocks.num_free,
                "preemptions_total": self._scheduler.num_preemptions,
                **{name: self._counts[name] for name in _COUNTERS},
            }

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise NotReadyError(f"the engine is {self._state} and takes no requests")

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
            self._first_compilation = compilations_here()
            with self.model.context():
                while self._hear():
                    self._turn()
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
            while not (self._inbox or self._active or self._jobs or self._is_over):
                self._changed.wait()
            wishes, self._inbox = self._inbox, deque()
            if self._is_over:
                return False
        for wish in wishes:
            wish()
        return True

    def _fail_all(self, reason: Literal["engine", "drained"], message: str) -> None:
        with self._changed:
            failed = list(self._active)
            jobs, self._jobs = self._jobs, deque()
        for request_id in failed:
            self._end(self._active[request_id], Failed(reason, message))
        for job in jobs:
            job.close()

    def _turn(self) -> None:
        with self._changed:
            admitted = self._scheduler.admit()
        for choice in admitted:
            self._place(choice)
        ready = any(choice.is_read for choice in self._scheduler.running)
        has_read = False
        if not ready or self._owed_seconds <= 0:
            has_read = self._read_a_piece(stalls_others=ready)
        if not has_read or self._owed_seconds > 0:
            self._decode()

    def _place(self, choice: Choice) -> None:
        """What a choice brings along goes into its slot."""
        assert choice.slot is not None
        active = self._active[choice.request.id]
        if not active.is_admitted:
            active.is_admitted = True
            active.queued_seconds = time.monotonic() - active.submitted
        if choice.saved is not None:
            self._runner.put_back(choice)
            return
        size = self._blocks.block_size
        if choice.use_cache:
            self._counts["prefix_query_tokens_total"] += choice.prompt_tokens
            self._counts["prefix_hit_tokens_total"] += choice.cached
        if choice.cached:
            self._runner.load_blocks(choice.slot, choice.blocks[: choice.cached // size])

    def _read_a_piece(self, *, stalls_others: bool) -> bool:
        """Whether there was one. Those who wait for it meanwhile are owed time."""
        began = time.perf_counter()
        share = self._scheduler.reading_share(self.options.prefill_share)
        found = self._scheduler.next_piece()
        if found is not None:
            self._read(*found)
        elif self._jobs:
            job = self._jobs[0]
            if next(job, self) is self:
                self._jobs.popleft()
        elif not self._guesser.catch_up(self._scheduler.running):
            self._owed_seconds = 0.0
            return False
        if stalls_others:
            self._owed_seconds += (time.perf_counter() - began) * (1 - share) / share
        return True

    def _read(self, choice: Choice, piece: Piece) -> None:
        assert choice.slot is not None
        row = choice.row
        tokens = row.prompt_token_ids[piece.begin : piece.end]
        self._runner.read(
            choice.slot, choice.blocks, tokens, piece.begin, piece.shape, choice.adapter
        )
        self._counts["prompt_tokens_total"] += len(tokens)
        with self._changed:
            begin, end = self._scheduler.piece_done(choice, piece)
        if self.options.prefix_cache and begin < end:
            self._runner.save_blocks(choice.slot, choice.blocks, begin, end)
            self._scheduler.name_blocks(choice, begin, end)
        if row.wants_prompt_logprobs and row.index == 0:
            self._score(row, piece)
        if choice.is_read:
            self._answer_begins(choice, piece.end - 1 - piece.begin)

    def _score(self, row: Row, piece: Piece) -> None:
        following = row.prompt_token_ids[piece.begin + 1 : piece.end + 1]
        logprobs, top, ids = self._runner.score(following)
        if row.prompt_logprobs is None:
            row.prompt_logprobs = [None]
        for place, token in enumerate(following):
            row.prompt_logprobs.append(row.scored(token, logprobs[place], top[place], ids[place]))

    def _answer_begins(self, choice: Choice, place: int) -> None:
        active, row = self._active[choice.request.id], choice.row
        sampled = None
        if row.limit > 0:
            masks = self._masks([choice])
            if choice.request.id not in self._active:
                return
            assert choice.slot is not None
            sampled = self._runner.first_token(place, choice, masks.get(choice.slot))
        if row.index == 0:
            active.cached_tokens = choice.cached
            self._tell(active, Started(choice.cached, row.prompt_logprobs, active.queued_seconds))
            later, active.later = active.later, []
            for each in later:
                self._add(active, each)
        for text in row.start():
            self._tell(active, text)
        if sampled is None:
            self._choice_ended(active, choice)
        else:
            self._give(active, choice, sampled, 0)

    def _decode(self) -> None:
        """A token of every choice that can take one. Where the next step is clear as soon as the
        tokens are there, it begins before clients hear of them."""
        began = time.perf_counter()
        step, self._ahead = self._ahead, None
        if step is None or not step.is_wanted:
            step = self._begin_step()
        if step is None:
            return
        sampled = step.read()
        self._ahead = self._begin_ahead(step, sampled)
        for member in step.members:
            if member.is_there:
                self._give_all(member, sampled, member.slot * step.length)
                self._guesser.took(member.choice)
        self._owed_seconds -= time.perf_counter() - began

    def _begin_step(self) -> Step | None:
        with self._changed:
            choices = self._scheduler.decodable()
        if not choices:
            return None
        self._close_hole()
        masks = self._masks(choices)
        choices = [choice for choice in choices if choice.request.id in self._active]
        if not choices:
            return None
        drafts = self._guesser.guess(choices, self._scheduler)
        self._counts["draft_tokens_total"] += sum(map(len, drafts.values()))
        return self._runner.begin_step(choices, masks, drafts)

    def _masks(self, choices: list[Choice]) -> dict[int, np.ndarray]:
        """What their structures allow next, by slot. A request whose structure fails is ended."""
        masks: dict[int, np.ndarray] = {}
        for choice in choices:
            active = self._active.get(choice.request.id)
            if active is not None and choice.matcher is not None:
                assert choice.slot is not None
                try:
                    masks[choice.slot] = choice.matcher.mask()
                except StructureError as error:
                    self._end(active, Failed("request", str(error)))
        return masks

    def _begin_ahead(self, step: Step, sampled: Sampled) -> Step | None:
        """The step after this one, if all who run are in it, nothing else waits to be done, no
        move makes it smaller, and what a choice may take does not depend on the tokens' text.
        Some may turn out to have ended with their token: what they take is dropped."""
        members = [member for member in step.members if member.is_there]
        choices = [member.choice for member in members]
        waiting = self._inbox or self._jobs or self._scheduler.waiting
        if waiting or len(choices) < len(self._scheduler.running):
            return None
        if self._guesser.is_worth_it(choices) or any(choice.matcher for choice in choices):
            return None
        if self._closable_hole() is not None:
            return None
        going = [c for c in choices if len(c.row.token_ids) + 1 < c.row.limit]
        if not going:
            return None
        with self._changed:
            if not self._scheduler.hold_ahead(going):
                return None
        newest = {member.slot: int(sampled.tokens[member.slot * step.length]) for member in members}
        return self._runner.begin_step(going, {}, {}, newest)

    def _give_all(self, member: Member, sampled: Sampled, place: int) -> None:
        """A choice's new tokens: one, and one more for each guess that turned out right."""
        choice, draft = member.choice, member.draft
        active = self._active.get(choice.request.id)
        for number in range(len(draft) + 1):
            if active is None or choice.row.finish_reason is not None:
                return
            self._give(active, choice, sampled, place + number)
            if number == len(draft) or choice.row.token_ids[-1] != draft[number]:
                return
            self._counts["accepted_tokens_total"] += 1

    def _close_hole(self) -> None:
        """Moves the choice in the highest slot down where that makes the step smaller."""
        found = self._closable_hole()
        if found is not None:
            choice, free = found
            self._runner.move(choice, free)
            self._guesser.move(choice, free)
            choice.slot = free

    def _closable_hole(self) -> tuple[Choice, int] | None:
        """The choice that should move, and where to."""
        found = self._scheduler.hole()
        if found is None:
            return None
        highest = found[0].slot
        assert highest is not None
        rows = self._runner.shapes.rows
        needed = next(each for each in rows if each >= len(self._scheduler.running))
        return found if highest >= needed else None

    def _give(self, active: _Active, choice: Choice, sampled: Sampled, place: int) -> None:
        """A choice's new token, which may be its last."""
        row, token = choice.row, int(sampled.tokens[place])
        if token == NO_TOKEN:
            assert choice.slot is not None
            self._runner.clear(choice.slot)
            self._end(active, self._no_token(choice))
            return
        if choice.matcher is not None:
            try:
                choice.matcher.push(token)
            except StructureError as error:
                self._end(active, Failed("request", str(error)))
                return
        piece = row.push(token, row.logprob_of(sampled, place))
        self._counts["generated_tokens_total"] += 1
        self._scheduler.took(choice, 1)
        self._tell(active, piece)
        if row.finish_reason is not None:
            self._choice_ended(active, choice)

    def _no_token(self, choice: Choice) -> Failed:
        row = choice.row
        begin = f"no token can be chosen after {len(row.token_ids)} new tokens, because"
        if choice.matcher is not None and any(v <= -100 for v in row.params.logit_bias.values()):
            return Failed(
                "request",
                f"{begin} logit_bias forbids what response_format asks for; allow one of the two",
            )
        return Failed(
            "engine",
            f"{begin} logits are NaN or infinite, or every token is forbidden; check logit_bias, "
            f"the weights and compute.dtype ({self.model.compute.dtype})",
        )

    # Beginnings and ends, in the thread

    def _enqueue(self, active: _Active) -> None:
        first, *later = active.rows
        if first.limit == 0 and not first.wants_prompt_logprobs:
            active.is_admitted = True
            self._tell(active, Started(0))
            for row in active.rows:
                for text in row.start():
                    self._tell(active, text)
            self._finish(active)
            return
        active.later = later
        self._add(active, first)

    def _add(self, active: _Active, row: Row) -> None:
        use_cache = self.options.prefix_cache
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

    def _cancel(self, request_id: str) -> None:
        active = self._active.get(request_id)
        if active is not None:
            self._counts["aborts_total"] += 1
            self._end(active, Failed("cancelled", "the request was cancelled"))

    def _choice_ended(self, active: _Active, choice: Choice) -> None:
        with self._changed:
            self._remove(choice)
        active.choices.remove(choice)
        active.num_ended += 1
        if active.num_ended == len(active.rows):
            seconds = time.monotonic() - active.submitted
            self._request_seconds += 0.2 * (seconds - self._request_seconds)
            self._finish(active)

    def _finish(self, active: _Active) -> None:
        tokens = sum(len(row.token_ids) for row in active.rows)
        prompt_tokens = len(active.request.prompt_token_ids)
        self._end(active, Finished(prompt_tokens, tokens, active.cached_tokens))

    def _end(self, active: _Active, event: Finished | Failed) -> None:
        """Everything it held is free before it hears of it."""
        with self._changed:
            for choice in active.choices:
                self._remove(choice)
            active.choices, active.later = [], []
            del self._active[active.request.id]
            self._counts["compilations_total"] = compilations_here() - self._first_compilation
            self._changed.notify_all()
        self._tell(active, event)

    def _tell(self, active: _Active, event: Event | TextPiece) -> None:
        try:
            active.on_event(event)
        except Exception:
            # What one client's callback does must not end the others' requests.
            log.exception("the callback of request %s failed; it is cancelled", active.request.id)
            with self._changed:
                self._inbox.append(lambda: self._cancel(active.request.id))

    def _remove(self, choice: Choice) -> None:
        self._scheduler.remove(choice)
        self._runner.forget(choice)

    def _save(self, choice: Choice) -> Any:
        return self._runner.read_out(choice)

    def _embed(
        self, tokens: list[int], future: "Future[list[float]]"
    ) -> Generator[None, None, None]:
        """Reads a prompt in the scratch slot, a piece a turn."""
        total = np.zeros(self.model.config.hidden_size, np.float32)
        runner = self._runner
        held: list[int] | None = None
        try:
            while held is None:
                with contextlib.suppress(OutOfBlocksError), self._changed:
                    held = self._blocks.hold([], runner.num_scratch_blocks(len(tokens)))
                if held is None:
                    yield  # until others have ended
            for piece in plan_pieces(len(tokens), runner.shapes.pieces):
                part = tokens[piece.begin : piece.end]
                total += runner.read(runner.scratch_slot, held, part, piece.begin, piece.shape)
                yield
            future.set_result((total / np.float32(len(tokens))).tolist())
        finally:
            with self._changed:
                self._blocks.release(held or [])
            if not future.done():
                future.set_exception(NotReadyError("the engine ended before the prompt was read"))


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
