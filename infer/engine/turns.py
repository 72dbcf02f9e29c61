"""The turns of the engine's thread: each gives slots to who is next, reads one piece of one prompt,
and runs one token of every choice that has been read."""

import threading
import time
from collections import deque
from collections.abc import Generator

import numpy as np

from infer.completion import Row
from infer.engine.active import Active, ActiveRequests
from infer.engine.guesses import Guesser
from infer.engine.options import EngineOptions
from infer.engine.request import Failed, Started
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice, Piece, Scheduler
from infer.engine.step import Member, Step
from infer.engine.structure import StructureError
from infer.sampling import NO_TOKEN, Sampled


class Turns:
    """Only the engine's thread calls it. changed: the engine's lock, which guards the scheduler.

    jobs: prompts to embed; each goes on by a piece where no other prompt is to be read.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        scheduler: Scheduler,
        runner: Runner,
        guesser: Guesser,
        requests: ActiveRequests,
        changed: threading.Condition,
    ):
        self._options, self._scheduler = options, scheduler
        self._runner, self._guesser = runner, guesser
        self._requests, self._changed = requests, changed
        self.jobs: deque[Generator[None, None, None]] = deque()
        self._owed_seconds = 0.0
        self._ahead: Step | None = None  # begun, and not read

    def take(self) -> None:
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
        active = self._requests.by_id[choice.request.id]
        if not active.is_admitted:
            active.is_admitted = True
            active.queued_seconds = time.monotonic() - active.submitted
        if choice.saved is not None:
            self._runner.put_back(choice)
            return
        size = self._scheduler.blocks.block_size
        if choice.use_cache:
            self._requests.counts["prefix_query_tokens_total"] += choice.prompt_tokens
            self._requests.counts["prefix_hit_tokens_total"] += choice.cached
        if choice.cached:
            self._runner.load_blocks(choice.slot, choice.blocks[: choice.cached // size])

    # Reading

    def _read_a_piece(self, *, stalls_others: bool) -> bool:
        """Whether there was one. Those who wait for it meanwhile are owed time."""
        began = time.perf_counter()
        share = self._scheduler.reading_share(self._options.prefill_share)
        found = self._scheduler.next_piece()
        if found is not None:
            self._read(*found)
        elif self.jobs:
            job = self.jobs[0]
            if next(job, self) is self:
                self.jobs.popleft()
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
        self._requests.counts["prompt_tokens_total"] += len(tokens)
        with self._changed:
            begin, end = self._scheduler.piece_done(choice, piece)
        if self._options.prefix_cache and begin < end:
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
        active, row = self._requests.by_id[choice.request.id], choice.row
        sampled = None
        if row.limit > 0:
            masks = self._masks([choice])
            if choice.request.id not in self._requests.by_id:
                return
            assert choice.slot is not None
            sampled = self._runner.first_token(place, choice, masks.get(choice.slot))
        if row.index == 0:
            active.cached_tokens = choice.cached
            self._requests.tell(
                active, Started(choice.cached, row.prompt_logprobs, active.queued_seconds)
            )
            later, active.later = active.later, []
            for each in later:
                self._requests.add(active, each)
        for text in row.start():
            self._requests.tell(active, text)
        if sampled is None:
            self._requests.choice_ended(active, choice)
        else:
            self._give(active, choice, sampled, 0)

    # Decoding

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
        choices = [choice for choice in choices if choice.request.id in self._requests.by_id]
        if not choices:
            return None
        drafts = self._guesser.guess(choices, self._scheduler)
        self._requests.counts["draft_tokens_total"] += sum(map(len, drafts.values()))
        return self._runner.begin_step(choices, masks, drafts)

    def _masks(self, choices: list[Choice]) -> dict[int, np.ndarray]:
        """What their structures allow next, by slot. A request whose structure fails is ended."""
        masks: dict[int, np.ndarray] = {}
        for choice in choices:
            active = self._requests.by_id.get(choice.request.id)
            if active is not None and choice.matcher is not None:
                assert choice.slot is not None
                try:
                    masks[choice.slot] = choice.matcher.mask()
                except StructureError as error:
                    self._requests.end(active, Failed("request", str(error)))
        return masks

    def _begin_ahead(self, step: Step, sampled: Sampled) -> Step | None:
        """The step after this one, if all who run are in it, nothing else waits to be done, no
        move makes it smaller, and what a choice may take does not depend on the tokens' text.
        Some may turn out to have ended with their token: what they take is dropped."""
        members = [member for member in step.members if member.is_there]
        choices = [member.choice for member in members]
        waiting = self._requests.inbox or self.jobs or self._scheduler.waiting
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
        active = self._requests.by_id.get(choice.request.id)
        for number in range(len(draft) + 1):
            if active is None or choice.row.finish_reason is not None:
                return
            self._give(active, choice, sampled, place + number)
            if number == len(draft) or choice.row.token_ids[-1] != draft[number]:
                return
            self._requests.counts["accepted_tokens_total"] += 1

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

    def _give(self, active: Active, choice: Choice, sampled: Sampled, place: int) -> None:
        """A choice's new token, which may be its last."""
        row, token = choice.row, int(sampled.tokens[place])
        if token == NO_TOKEN:
            assert choice.slot is not None
            self._runner.clear(choice.slot)
            self._requests.end(active, self._no_token(choice))
            return
        if choice.matcher is not None:
            try:
                choice.matcher.push(token)
            except StructureError as error:
                self._requests.end(active, Failed("request", str(error)))
                return
        piece = row.push(token, row.logprob_of(sampled, place))
        self._requests.counts["generated_tokens_total"] += 1
        self._scheduler.took(choice, 1)
        self._requests.tell(active, piece)
        if row.finish_reason is not None:
            self._requests.choice_ended(active, choice)

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
            f"the weights and compute.dtype ({self._runner.model.compute.dtype})",
        )
