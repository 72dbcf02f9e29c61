"""Runs what the scheduler decides: holds the arrays of an engine and calls its compiled steps."""

import collections
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.batch import Runnable
from infer.engine import steps
from infer.engine.adapters import AdapterStack, Factors
from infer.engine.ahead import Call, Compiler
from infer.engine.chooser import Chooser
from infer.engine.columns import VARIANTS, Columns, equal_columns, variant
from infer.engine.options import EngineOptions
from infer.engine.plan import Placed, Plan
from infer.engine.scheduler import Choice
from infer.engine.shapes import FEWEST_TOKENS, Shapes
from infer.engine.step import Step
from infer.engine.trial import Trial
from infer.params import MAX_TOP_LOGPROBS
from infer.sampling import Needs, Rows, Sampled
from llama_jax.model.layout import summing_alike

log = logging.getLogger(__name__)

# What `_piece` makes of a piece of a prompt.
Piece = tuple[np.ndarray, np.int32, np.int32, np.int32]


class Runner(ABC):
    """The arrays and the steps. Only the engine's thread calls it. Where keys and values lie is
    said by `SlotRunner` and `PagedRunner`."""

    least_tokens: int  # that a step has, filled up or not

    def __init__(self, model: Runnable, options: EngineOptions, *, capacity: int, num_blocks: int):
        self.shapes = Shapes(options, least_tokens=self.least_tokens)
        if options.exact:
            drafted = options.max_drafted_rows * (1 + options.draft_tokens)
            # Tokens of a step; the last is more than any that is filled up to `FEWEST_TOKENS` has.
            most = max(self.shapes.rows[-1], drafted, 2 * FEWEST_TOKENS)
            model = dataclasses.replace(model, params=summing_alike(model.params, rows=most))
        self.model, self.options = model, options
        # A padded piece may reach past the longest row.
        self.capacity = capacity + self.shapes.pieces[-1]
        self._num_blocks = num_blocks
        self._shared: dict[str, Any] = {"compute": model.compute}
        self._dtype = model.compute.held_dtype
        self.scratch_slot = self.shapes.rows[-1]  # for work that belongs to no choice
        self.scratch_blocks: Sequence[int] = ()
        self.columns = Columns(model.config.vocab_size)
        self.chooser = Chooser(model, num_slots=self.scratch_slot + 1, capacity=self.capacity)
        self._cache: Any = None
        self.hidden: Any = None  # the states of the piece that was read last [T, D]
        self.adapters: AdapterStack | None = None
        if options.max_adapters:
            self.adapters = AdapterStack(
                model.config,
                model.params,
                count=options.max_adapters,
                rank=options.max_lora_rank,
                dtype=model.compute.dtype,
                mesh=model.mesh,
                rules=model.compute.rules,
            )
        self.use_adapters()

    def use_adapters(self) -> None:
        """From here on steps use the adapters that the stack holds now."""
        self.params = self.model.params if self.adapters is None else self.adapters.params()

    def put_adapter(self, place: int, factors: Factors) -> None:
        """From here on steps have an adapter at a place of the stack."""
        assert self.adapters is not None
        self.adapters.put(place, factors)
        self.use_adapters()

    def take_adapter(self, place: int) -> None:
        """Nobody uses the adapter at a place any more, so what steps hold there may stay."""
        assert self.adapters is not None
        self.adapters.put(place, {})

    def take_adapters(self) -> None:
        """From here on steps have none, if there is room for any."""
        if self.adapters is not None:
            for place in range(self.adapters.count):
                self.adapters.put(place, {})
            self.use_adapters()

    @abstractmethod
    def num_scratch_blocks(self, num_tokens: int) -> int:
        """Blocks that must be held to read so many tokens in the scratch slot."""

    def reset(self) -> None:
        """Allocates everything, empty."""
        self.shapes.reset()
        self._allocate(self.scratch_slot + 1)
        self.chooser.reset()
        self.columns = Columns(self.model.config.vocab_size)

    @abstractmethod
    def _allocate(self, num_slots: int) -> None:
        """Room for keys and values, empty."""

    def warm_up(self) -> None:
        """Compiles every step in every shape, and runs it once, on nothing that matters.

        Nothing here waits for a result before the last has begun: steps run while others are
        compiled.
        """
        slot, blocks, shapes = self.scratch_slot, self.scratch_blocks, self.shapes.steps()
        pieces = self._idle_pieces()
        with Compiler(self.model.context) as compiler:
            steps_made = compiler.begin(self._calls_of_nobody())
            calls: list[Call] = []
            for piece, _ in zip(pieces, steps_made, strict=False):
                self._run_piece(slot, blocks, piece)
                calls += [self._score_call(piece[0]), self._logits_at_call(0)]
            after_pieces = compiler.begin(calls)
            all_logits = [
                self._logits(*shape, {}, [-1] * shape[0])
                for shape, _ in zip(shapes, steps_made, strict=False)
            ]
            all_logits.append([call.run() for call in after_pieces][-1])
            chooser = self.chooser
            choosing = [chooser.idle(logits, needs) for logits in all_logits for needs in VARIANTS]
            chosen = compiler.begin([chooser.take_call(*each) for each in choosing])
            taken = [chooser.take(*each) for each, _ in zip(choosing, chosen, strict=True)]
            collections.deque(steps_made, maxlen=0)
        self._warm_up_store()
        self.remember_tokens(slot, [0], 1, {})
        jax.block_until_ready(taken)

    def compile_steps(self) -> None:
        """What takes longest in `warm_up`, without a step: the programs of the model's own."""
        with Compiler(self.model.context) as compiler:
            collections.deque(compiler.begin(self._calls_of_nobody()), maxlen=0)

    def _calls_of_nobody(self) -> list[Call]:
        """The model's steps in every shape, and what moves keys, values and memory."""
        slot, blocks = self.scratch_slot, self.scratch_blocks
        return [
            *(self._piece_call(slot, blocks, *piece) for piece in self._idle_pieces()),
            *(self._tokens_call(*shape, {}, [-1] * shape[0]) for shape in self.shapes.steps()),
            *self._store_calls(),
            *self.chooser.memory_calls(slot),
        ]

    def _idle_pieces(self) -> list[Piece]:
        return [_piece([0] * shape, 0, shape) for shape in self.shapes.pieces]

    @abstractmethod
    def _store_calls(self) -> list[Call]:
        """What moves keys and values."""

    @abstractmethod
    def _warm_up_store(self) -> None:
        """Runs all that moves keys, values and memory once."""

    def drop_inexact_shapes(self) -> None:
        """Keeps only those numbers of rows whose results equal, bit for bit, the largest's: tried
        out with every slot holding the same few tokens."""
        if not self.options.exact:
            return
        shape = self.shapes.pieces[0]
        tokens = [(7 * n + 3) % self.model.config.vocab_size for n in range(shape)]
        self.read(self.scratch_slot, self.scratch_blocks, tokens, 0, shape)
        blocks = range(min(-(-len(tokens) // self.options.block_size), self._num_blocks))
        self.save_blocks(self.scratch_slot, blocks, 0, len(blocks))
        for slot in range(self.shapes.rows[-1]):
            self.load_blocks(slot, blocks)
        trial = Trial(
            self.shapes,
            run=lambda rows, length: self._trial(rows, length, len(tokens)),
            fill=self._fill,
        )
        kept = trial.alike()
        for rows in [each for each in self.shapes.rows if each not in kept]:
            log.warning(
                "steps of %d rows are left out: they sum in another order on this machine than "
                "those of %d",
                rows,
                self.shapes.rows[-1],
            )
        self.shapes.rows = kept

    def _fill(self, rows: int) -> bool:
        """`Shapes.fill`, and compiles the longer steps."""
        if not self.shapes.fill(rows):
            return False
        for length in self.shapes.lengths(rows):
            logits = self._logits(rows, length, {}, [-1] * rows)
            for needs in VARIANTS:
                self.chooser.take(*self.chooser.idle(logits, needs))
        return True

    def _trial(self, rows: int, length: int, begin: int) -> np.ndarray:
        """Logits after one token in each slot, [rows, V]."""
        placed = {slot: (begin, *self._trial_row(slot)) for slot in range(rows)}
        logits = self._logits(rows, length, placed, [-1] * rows)
        whole = np.asarray(jax.device_get(steps.gathered(logits)))
        return whole.reshape(rows, length, -1)[:, 0]

    @abstractmethod
    def _trial_row(self, slot: int) -> tuple[list[int], Sequence[int]]:
        """Its token, and its blocks."""

    # Prompts

    def read(
        self,
        slot: int,
        blocks: Sequence[int],
        tokens: Sequence[int],
        begin: int,
        shape: int,
        adapter: int = -1,
    ) -> np.ndarray:
        """Runs tokens of a slot, whose blocks are `blocks`, from position `begin` on; the sum of
        their states [D]. `score` and `first_token` are about the piece that was read last."""
        total = self.begin_read(slot, blocks, tokens, begin, shape, adapter)
        return np.asarray(jax.device_get(total))

    def begin_read(
        self,
        slot: int,
        blocks: Sequence[int],
        tokens: Sequence[int],
        begin: int,
        shape: int,
        adapter: int,
    ) -> jax.Array:
        """`read` that does not wait."""
        return self._run_piece(slot, blocks, _piece(tokens, begin, shape, adapter))

    def _run_piece(self, slot: int, blocks: Sequence[int], piece: Piece) -> jax.Array:
        self._cache, self.hidden, total = self._piece_call(slot, blocks, *piece).run()
        return total

    @abstractmethod
    def _piece_call(
        self, slot: int, blocks: Sequence[int], tokens: np.ndarray, *numbers: np.int32
    ) -> Call:
        """numbers: where the tokens begin, how many are real, and the adapter."""

    def score(self, following: Sequence[int]) -> list[np.ndarray]:
        """Log probability of `following[t]` after state t, and the most likely tokens' with ids."""
        return [np.asarray(each) for each in jax.device_get(self.begin_score(following))]

    def begin_score(self, following: Sequence[int]) -> Any:
        """`score` that does not wait."""
        return self._score_call(following).run()

    def _score_call(self, following: Sequence[int] | np.ndarray) -> Call:
        targets = np.zeros(self.hidden.shape[0], np.int32)
        targets[: len(following)] = following
        return Call(
            steps.score,
            (self.model.config, self.model.params, self.hidden, targets),
            {"num": MAX_TOP_LOGPROBS, **self._shared},
        )

    def first_token(self, place: int, choice: Choice, mask: np.ndarray | None) -> Sampled:
        """The first new token of a choice from the state at `place`; arrays of two equal rows."""
        self.remember(choice)
        columns = equal_columns(choice, 2, self.model.config.vocab_size)
        needs = variant([choice.row.params], structured=mask is not None)
        memory = self.chooser.slot_of(choice)
        result: Sampled = jax.device_get(self.run_first(place, memory, mask, columns, needs))
        return result

    def run_first(
        self, place: int, memory: int, mask: np.ndarray | None, columns: Rows, needs: Needs
    ) -> Sampled:
        """The step of `first_token`, as plain data; see `Plan`. Does not wait."""
        logits = self._logits_at_call(place).run()
        masks = None if mask is None else np.stack([mask, mask])
        slots = [memory, self.chooser.nowhere]
        return self.chooser.take(logits, slots, masks, columns, [0, 0], needs)

    def _logits_at_call(self, place: int) -> Call:
        return Call(
            steps.logits_at,
            (self.model.config, self.model.params, self.hidden, np.int32(place)),
            self._shared,
        )

    # Answers

    def rows_for(self, choices: Sequence[Choice]) -> int:
        """Rows of the step in which these choices take a token."""
        highest = max(choice.slot or 0 for choice in choices)
        return next(shape for shape in self.shapes.rows if shape > highest)

    def begin_step(
        self,
        choices: Sequence[Choice],
        masks: dict[int, np.ndarray],
        drafts: dict[int, list[int]],
        newest: dict[int, int] | None = None,
    ) -> Step:
        """Runs the newest token of each choice, and its guessed ones, and takes a token after
        each; does not wait.

        masks, drafts: by slot, the tokens that its structure allows, and the guessed ones. newest:
        by slot, a token that a choice has taken and that is not in its row yet.
        """
        plan = self._plan(choices, masks, drafts, newest)
        return Step(choices, drafts, self.run(plan), plan.length)

    def _plan(
        self,
        choices: Sequence[Choice],
        masks: dict[int, np.ndarray],
        drafts: dict[int, list[int]],
        newest: dict[int, int] | None,
    ) -> Plan:
        rows = self.rows_for(choices)
        length = self.shapes.lengths(rows)[-1 if drafts else 0]
        adapters = [-1] * rows
        placed: dict[int, Placed] = {}
        slots, taken = [self.chooser.nowhere] * (rows * length), [0] * (rows * length)
        for choice in choices:
            assert choice.slot is not None
            slot, count = choice.slot, len(choice.row.token_ids)
            begin = choice.num_tokens - 1
            if newest is None:
                ids = [choice.row.token_ids[-1], *drafts.get(slot, [])]
            else:
                ids, count, begin = [newest[slot]], count + 1, begin + 1
            adapters[slot] = choice.adapter
            placed[slot] = (begin, ids, choice.blocks)
            slots[slot * length] = self.chooser.slot_of(choice)
            taken[slot * length : (slot + 1) * length] = range(count, count + length)
        return Plan(
            rows,
            length,
            placed,
            adapters,
            slots,
            {slot * length: mask for slot, mask in masks.items()},
            self.columns.of(choices, rows, length),
            taken,
            variant([choice.row.params for choice in choices], structured=bool(masks)),
        )

    def run(self, plan: Plan) -> Sampled:
        """Does not wait."""
        logits = self._logits(plan.rows, plan.length, plan.placed, plan.adapters)
        bits = None
        if plan.masks:
            bits = self.chooser.no_masks(plan.rows * plan.length)
            for place, mask in plan.masks.items():
                bits[place] = mask
        return self.chooser.take(logits, plan.memory, bits, plan.columns, plan.taken, plan.needs)

    def _logits(
        self,
        rows: int,
        length: int,
        placed: Mapping[int, Placed],
        adapters: Sequence[int],
    ) -> jax.Array:
        """[rows * length, V], after tokens that begin at a position, by slot."""
        self._cache, logits = self._tokens_call(rows, length, placed, adapters).run()
        return logits

    @abstractmethod
    def _tokens_call(
        self,
        rows: int,
        length: int,
        placed: Mapping[int, Placed],
        adapters: Sequence[int],
    ) -> Call:
        """The step of `_logits`."""

    # Slots and blocks

    @abstractmethod
    def load_blocks(self, slot: int, ids: Sequence[int]) -> None:
        """Fills the beginning of a slot."""

    @abstractmethod
    def save_blocks(self, slot: int, ids: Sequence[int], begin: int, end: int) -> None:
        """Keeps blocks number begin to end - 1 of a slot, whose blocks are `ids`."""

    def move(self, choice: Choice, target: int) -> None:
        """Copies what a choice has in its slot to another one."""
        assert choice.slot is not None
        self.move_slot(choice.slot, target, choice.row.params.edits_logits)

    @abstractmethod
    def move_slot(self, source: int, target: int, with_memory: bool) -> None:
        """with_memory: what it remembers of its tokens, too."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """After numbers that are not finite: those must not reach whoever comes next."""

    @abstractmethod
    def read_out(self, choice: Choice) -> Any:
        """What a choice has computed goes to the host; gives what `put_back` finds it by."""

    @abstractmethod
    def put_back(self, choice: Choice) -> None:
        """What a preempted choice had goes into its new slot."""

    @abstractmethod
    def forget(self, choice: Choice) -> None:
        """It is wanted no more: nor is what it has on the host."""

    def remember(self, choice: Choice) -> None:
        """Begins or renews what a slot remembers of its tokens, where that matters."""
        if choice.row.params.edits_logits:
            assert choice.slot is not None
            biases = choice.row.params.logit_bias
            self.remember_tokens(choice.slot, choice.tokens, choice.prompt_tokens, biases)

    def remember_tokens(
        self, slot: int, tokens: Sequence[int], num_prompt: int, biases: Mapping[int, float]
    ) -> None:
        """Begins a slot's memory with a prompt's tokens and those of its answer so far."""
        self.chooser.remember(slot, tokens, num_prompt, biases)


def _piece(tokens: Sequence[int], begin: int, shape: int, adapter: int = -1) -> Piece:
    """Tokens filled up to `shape`, where they begin, how many are real, and their adapter."""
    padded = np.zeros(shape, np.int32)
    padded[: len(tokens)] = tokens
    return padded, np.int32(begin), np.int32(len(tokens)), np.int32(adapter)
