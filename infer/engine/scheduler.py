"""Who is computed next: waiting choices, slots, blocks, fairness, preemption. No JAX here.

The engine asks in each turn: `admit` for choices that get a slot, `next_piece` for a piece of a
prompt to read, `decodable` for the choices that take a token. Everything the answers depend on is
in this file, so it is tested without a model.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer.completion import Row
from infer.engine.blocks import BlockManager, CacheScope, OutOfBlocksError, block_keys
from infer.engine.request import Request
from infer.engine.structure import TextMatcher


@dataclass(frozen=True)
class Piece:
    """Prompt tokens begin to end - 1, read in one step that is padded to `shape`."""

    begin: int
    end: int
    shape: int


def plan_pieces(num_tokens: int, shapes: Sequence[int]) -> list[Piece]:
    """How a prompt is read: in pieces of the largest shape, the rest in the smallest that holds it.

    The plan follows from the length alone, so that a prompt's numbers do too.
    """
    largest = shapes[-1]
    pieces = [
        Piece(begin, begin + largest, largest)
        for begin in range(0, num_tokens - largest + 1, largest)
    ]
    done = len(pieces) * largest
    if done < num_tokens:
        shape = min(shape for shape in shapes if shape >= num_tokens - done)
        pieces.append(Piece(done, num_tokens, shape))
    return pieces


@dataclass(eq=False)
class Choice:
    """One choice of a request on its way.

    keys: of its prompt's whole blocks. blocks: held, in the order of its tokens. slot: None while
    it waits. computed: prompt tokens that are in the slot. cached: how many of those came from the
    prefix cache. saved: the slot's content while it is preempted after its prompt was read.
    adapter: its number, -1 for none. matcher: how far its text is in the structure it must have.
    admissions: how often it was given a slot.
    """

    request: Request
    row: Row
    arrival: int
    keys: list[bytes]
    pieces: list[Piece]
    use_cache: bool = True
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    cached: int = 0
    named: int = 0
    saved: Any = None
    adapter: int = -1
    matcher: TextMatcher | None = None
    admissions: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.row.prompt_token_ids)

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.row.prompt_token_ids, *self.row.token_ids]

    @property
    def is_plain(self) -> bool:
        """Whether no token changes what the next one may be."""
        return self.matcher is None and not self.row.params.edits_logits

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt has been computed."""
        return self.computed >= self.prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + len(self.row.token_ids)

    @property
    def most_tokens(self) -> int:
        """That the slot can come to hold: the last token of an answer is never computed."""
        return self.prompt_tokens + max(self.row.limit - 1, 0)

    @property
    def order(self) -> tuple[int, int]:
        """The smaller, the sooner it is served and the later it is preempted."""
        return self.request.priority, self.arrival


class Scheduler:
    """max_slots choices have a slot at a time; their tokens and the prefix cache share blocks.

    save: called with a choice whose prompt has been read just before it loses its slot; what it
    gives is `saved` until the choice is admitted again.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_slots: int,
        shapes: Sequence[int],
        model_version: str,
        save: Callable[[Choice], Any],
    ):
        self.blocks, self.max_slots, self._save = blocks, max_slots, save
        self.shapes = sorted(shapes)
        self.model_version = model_version
        self.waiting: list[Choice] = []
        self.running: list[Choice] = []  # those with a slot
        self.num_preemptions = 0
        self._arrivals = itertools.count()
        self._served: defaultdict[str, float] = defaultdict(float)
        self._last_read = -1

    # Coming and going

    def make_choice(self, request: Request, row: Row, *, adapter: str, use_cache: bool) -> Choice:
        """adapter: what tells an adapter's content from every other's, empty for the base."""
        tokens, size = row.prompt_token_ids, self.blocks.block_size
        pieces = plan_pieces(len(tokens), self.shapes)
        shapes = [self._shape_at(pieces, number * size) for number in range(len(tokens) // size)]
        scope = CacheScope(self.model_version, adapter, request.tenant)
        keys = block_keys(scope, tokens, shapes, size)
        return Choice(request, row, next(self._arrivals), keys, pieces, use_cache)

    @staticmethod
    def _shape_at(pieces: Sequence[Piece], place: int) -> int:
        return next(piece.shape for piece in pieces if piece.begin <= place < piece.end)

    def add(self, choice: Choice) -> None:
        tenant = choice.request.tenant
        active = {c.request.tenant for c in itertools.chain(self.waiting, self.running)}
        if tenant not in active:
            # Who was away gets no credit for it.
            least = min((self._served[name] for name in active), default=0.0)
            self._served = defaultdict(float, {n: self._served[n] for n in {*active, tenant}})
            self._served[tenant] = max(self._served[tenant], least)
        self.waiting.append(choice)

    def remove(self, choice: Choice) -> None:
        """It has ended, or is wanted no more: slot and blocks are free."""
        if choice in self.waiting:
            self.waiting.remove(choice)
        self._leave(choice)

    def _leave(self, choice: Choice) -> None:
        if choice.slot is not None:
            self.running.remove(choice)
            choice.slot = None
        self.blocks.release(choice.blocks)
        choice.blocks = []

    # Turns

    def admit(self) -> list[Choice]:
        """Gives slots and blocks to those whose turn it is; they are now running.

        One of higher priority takes the place of one of lower priority.
        """
        admitted: list[Choice] = []
        while self.waiting:
            choice = self._next_waiting()
            if len(self.running) >= self.max_slots and not self._make_room(choice):
                break
            while not self._hold(choice):
                if not self._make_room(choice):
                    return admitted
            self.waiting.remove(choice)
            choice.slot = self._lowest_free_slot()
            choice.admissions += 1
            self.running.append(choice)
            admitted.append(choice)
        return admitted

    def _next_waiting(self) -> Choice:
        best = min(choice.request.priority for choice in self.waiting)
        urgent = [choice for choice in self.waiting if choice.request.priority == best]
        return min(urgent, key=lambda c: (self._served[c.request.tenant], c.arrival))

    def _make_room(self, choice: Choice) -> bool:
        """Preempts one that is less urgent than `choice`, if there is one."""
        victims = [c for c in self.running if c.request.priority > choice.request.priority]
        if not victims:
            return False
        self._preempt(max(victims, key=lambda c: c.order))
        return True

    def _preempt(self, choice: Choice) -> None:
        """Back to the queue. A prompt half read is read again; an answer goes on where it was."""
        self.num_preemptions += 1
        if choice.is_read:
            choice.saved = self._save(choice)
        else:
            choice.computed = choice.cached = 0
        self._leave(choice)
        self.waiting.append(choice)

    def _hold(self, choice: Choice) -> bool:
        shared: list[int] = []
        if choice.use_cache and choice.saved is None:
            # At least the last token is computed: its state gives the first new token.
            most = (choice.prompt_tokens - 1) // self.blocks.block_size
            shared = self.blocks.find(choice.keys[:most])
        # Room for the next token, too, so that none is admitted that cannot take one.
        wanted = self.blocks.blocks_for(min(choice.num_tokens + 1, choice.most_tokens))
        try:
            choice.blocks = self.blocks.hold(shared, wanted - len(shared))
        except OutOfBlocksError:
            return False
        choice.named = len(shared)
        if choice.saved is None:
            choice.computed = choice.cached = len(shared) * self.blocks.block_size
        return True

    def _lowest_free_slot(self) -> int:
        taken = {choice.slot for choice in self.running}
        return next(slot for slot in range(self.max_slots) if slot not in taken)

    def next_piece(self) -> tuple[Choice, Piece] | None:
        """The piece of a prompt to read next: prompts take turns, so that a short one need not
        wait for the end of a long one."""
        unread = [choice for choice in self.running if not choice.is_read]
        if not unread:
            return None
        later = [choice for choice in unread if choice.arrival > self._last_read]
        choice = min(later or unread, key=lambda c: c.arrival)
        self._last_read = choice.arrival
        piece = next(piece for piece in choice.pieces if piece.end > choice.computed)
        return choice, Piece(max(piece.begin, choice.computed), piece.end, piece.shape)

    def reading_share(self, least: float) -> float:
        """Of the time, how much goes to reading while others generate: `least`, and more where many
        prompts are one piece from their first token, in proportion to twice their number and that
        of the choices that generate. A step of few rows takes about as long as one of many, so they
        had better join soon."""
        ready = sum(choice.is_read for choice in self.running)
        nearly = sum(
            choice.pieces[-1].begin <= choice.computed
            for choice in self.running
            if not choice.is_read
        )
        return max(least, 2 * nearly / (2 * nearly + ready)) if nearly else least

    def piece_done(self, choice: Choice, piece: Piece) -> tuple[int, int]:
        """Counts a piece as read. Gives the numbers, from and to, of the whole blocks that are now
        computed and known to nobody yet: their content is to be kept."""
        choice.computed = piece.end
        self._served[choice.request.tenant] += piece.end - piece.begin
        return choice.named, min(piece.end // self.blocks.block_size, len(choice.keys))

    def name_blocks(self, choice: Choice, begin: int, end: int) -> None:
        """Blocks number begin to end - 1 of a choice hold what they should: others may share it."""
        for number in range(begin, end):
            self.blocks.name(choice.blocks[number], choice.keys[number])
        choice.named = end

    def decodable(self) -> list[Choice]:
        """Those that take a token now, each with blocks for it; the least urgent lose their slots
        when blocks run out. In the order of their slots."""
        for choice in sorted(self.running, key=lambda c: c.order):
            if choice.slot is None or not choice.is_read:
                continue
            missing = self.blocks.blocks_for(choice.num_tokens) - len(choice.blocks)
            while missing > 0 and choice.slot is not None:
                try:
                    choice.blocks += self.blocks.hold([], missing)
                    break
                except OutOfBlocksError:
                    self._preempt(max(self.running, key=lambda c: c.order))
        ready = [choice for choice in self.running if choice.is_read]
        return sorted(ready, key=lambda c: c.slot or 0)

    def hold_ahead(self, choices: Sequence[Choice]) -> bool:
        """Holds blocks for one token more than `decodable` did; False where they are not free."""
        for choice in choices:
            missing = self.blocks.blocks_for(choice.num_tokens + 1) - len(choice.blocks)
            if missing > 0:
                try:
                    choice.blocks += self.blocks.hold([], missing)
                except OutOfBlocksError:
                    return False
        return True

    def room_for_draft(self, choice: Choice) -> int:
        """Tokens beyond the next one that a choice may compute: within the blocks it has and the
        answer it may give."""
        room = len(choice.blocks) * self.blocks.block_size - choice.num_tokens
        return max(0, min(room, choice.most_tokens - choice.num_tokens))

    def took(self, choice: Choice, num_tokens: int) -> None:
        """A choice took tokens; its tenant is served less soon."""
        self._served[choice.request.tenant] += num_tokens

    def hole(self) -> tuple[Choice, int] | None:
        """The choice in the highest slot and the lowest free slot below it, if there is one."""
        if not self.running:
            return None
        highest = max(self.running, key=lambda c: c.slot or 0)
        assert highest.slot is not None
        free = self._lowest_free_slot() if len(self.running) < self.max_slots else self.max_slots
        return (highest, free) if free < highest.slot else None
