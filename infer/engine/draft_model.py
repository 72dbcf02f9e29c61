"""A second, smaller model that guesses tokens for the first, with keys and values of its own.

It draws with the random numbers of the request it guesses for, so its guess is the large model's
token wherever the two believe alike, sampled or greedy; a guess counts only where it is that token.
So the answers, and their distribution, are those of the large model alone.

What it has read of a slot is counted here and nowhere else. It falls behind when a choice comes,
goes, or is not guessed for, and catches up piece by piece, between the steps of the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from infer.batch import Runnable
from infer.engine import steps
from infer.engine.options import EngineOptions
from infer.engine.scheduler import Choice
from infer.engine.shapes import draft_slots, drafted_shapes
from infer.sampling import Needs, Rows
from infer.steps import Rules
from llama_jax.config import ModelConfig
from llama_jax.mesh.sharding import replicated
from llama_jax.model.cache import NEVER

_SHOWN = 3

# What can be guessed for: rows whose logits nothing edits.
VARIANTS = (
    Needs(sample=False, edit=False, top_logprobs=None),
    Needs(sample=True, edit=False, top_logprobs=None),
)


def check_draft(
    config: ModelConfig, tokenizer: Any, draft: ModelConfig, draft_tokenizer: Any
) -> None:
    """Raises ValueError for a model whose ids mean other tokens."""
    if (tokenizer is None) != (draft_tokenizer is None):
        lacking = "the draft model" if draft_tokenizer is None else "the model"
        raise ValueError(
            f"{lacking} has no tokenizer, so it cannot be told whether a draft model's ids mean "
            f"what the model's do; put the tokenizer's files into its folder"
        )
    if tokenizer is None:
        if config.vocab_size != draft.vocab_size:
            raise ValueError(
                f"the draft model has {draft.vocab_size} ids and the model {config.vocab_size}; a "
                f"draft model has the same vocabulary"
            )
        return
    ours, theirs = (
        {index: token for token, index in each.backend.get_vocab(with_added_tokens=True).items()}
        for each in (tokenizer, draft_tokenizer)
    )
    different = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    if different:
        shown = ", ".join(
            f"{i} is {ours.get(i)!r} to the model and {theirs.get(i)!r} to the draft model"
            for i in different[:_SHOWN]
        )
        raise ValueError(
            f"the draft model has another tokenizer than the model: {len(different)} ids differ "
            f"({shown}); choose a smaller model of the same family, or leave the draft model out"
        )


class DraftModel:
    """Only the engine's thread calls it, in the context of its model, whose devices may be some of
    the large one's.

    model: the small one. longest: tokens that it can read. vocab_size: of the large one, whose
    rules say which ids stand for tokens. shapes: pieces in which texts are read, as the large
    model's.
    """

    def __init__(
        self,
        model: Runnable,
        options: EngineOptions,
        *,
        longest: int,
        capacity: int,
        shapes: Sequence[int],
        vocab_size: int,
    ):
        self.model, self.options = model, options
        self._longest, self._capacity, self._num_slots = longest, capacity, draft_slots(options)
        self._shapes, self._vocab_size = list(shapes), vocab_size
        self._shared: dict[str, Any] = {"compute": model.compute}

    def reset(self, rules: Rules) -> None:
        """Allocates everything, empty. rules: of the large model."""
        cache = steps.new_cache(
            self.model.config,
            num_slots=self._num_slots,
            capacity=self._capacity,
            dtype=self.model.compute.held_dtype,
        )
        place = None if self.model.mesh is None else replicated(self.model.mesh)
        self._cache, self._rules = jax.device_put((cache, rules), place)
        # By slot: whose tokens are in it, by arrival, and how many.
        self._read: dict[int, tuple[int, int]] = {}

    def warm_up(self, columns: Callable[[Sequence[Choice], int, int], Rows]) -> None:
        """Runs every step in every shape once. columns: as `Columns.of`."""
        scratch = self._num_slots - 1
        for shape in self._shapes:
            self._read_piece(scratch, [0] * shape, 0, shape)
        for rows in drafted_shapes(self.options):
            for needs in VARIANTS:
                self._propose(rows, {}, columns([], rows, 1), needs)
        self._cache = steps.copy_slot(self._cache, np.int32(scratch), np.int32(scratch))
        self._cache = steps.clear_slot(self._cache, np.int32(scratch))

    def num_read(self, choice: Choice) -> int:
        """Tokens of a choice that are in its slot here, less those that turned out wrong."""
        assert choice.slot is not None
        owner, count = self._read.get(choice.slot, (-1, 0))
        return count if owner == choice.arrival else 0

    def can_guess(self, choice: Choice) -> bool:
        """Whether all but its last two tokens are there, and its text is not too long."""
        longest = choice.num_tokens + self.options.draft_tokens
        return self.num_read(choice) >= choice.num_tokens - 2 and longest <= self._longest

    def catch_up(self, choice: Choice) -> bool:
        """Reads a piece of a choice's tokens that are not there; False when it need not."""
        begin, end = self.num_read(choice), choice.num_tokens - 1
        if begin >= end - 1 or end >= self._longest:
            return False
        end = min(end, begin + self._shapes[-1])
        shape = min(shape for shape in self._shapes if shape >= end - begin)
        tokens = choice.tokens[begin:end]
        assert choice.slot is not None
        self._read_piece(choice.slot, tokens, begin, shape)
        self._read[choice.slot] = choice.arrival, end
        return True

    def _read_piece(self, slot: int, tokens: Sequence[int], begin: int, shape: int) -> None:
        padded = np.zeros(shape, np.int32)
        padded[: len(tokens)] = np.minimum(tokens, self.model.config.vocab_size - 1)
        self._cache, *_ = steps.read_piece(
            self.model.config,
            self.model.params,
            self._cache,
            padded,
            np.int32(slot),
            np.int32(begin),
            np.int32(len(tokens)),
            np.int32(-1),
            **self._shared,
        )

    def guess(self, choices: Sequence[Choice], rows: int, columns: Rows) -> dict[int, list[int]]:
        """Guessed tokens by slot, for choices that `can_guess`, in a step of so many rows.

        columns: of all rows, each choice's in its slot.
        """
        needs = VARIANTS[any(not choice.row.params.is_greedy for choice in choices)]
        placed = {}
        for choice in choices:
            assert choice.slot is not None
            placed[choice.slot] = choice
        guesses = self._propose(rows, placed, columns, needs)
        drafts = {}
        for slot, choice in placed.items():
            ids = guesses[slot].tolist()
            if min(ids) < 0:
                # Numbers that are not finite would reach whoever comes next.
                ids = ids[: next(n for n, token in enumerate(ids) if token < 0)]
                self._cache = steps.clear_slot(self._cache, np.int32(slot))
                self._read.pop(slot, None)
            else:
                self._read[slot] = choice.arrival, choice.num_tokens + len(ids) - 1
            drafts[slot] = ids
        return drafts

    def _propose(
        self, rows: int, placed: dict[int, Choice], columns: Rows, needs: Needs
    ) -> np.ndarray:
        """[rows, N]"""
        tokens = np.zeros((rows, 2), np.int32)
        positions = np.full((rows, 2), NEVER, np.int32)
        step = np.zeros(rows, np.int32)
        visible = 1
        for slot, choice in placed.items():
            last = choice.row.prompt_token_ids[-1:] + choice.row.token_ids
            tokens[slot] = last[-2:]
            positions[slot] = choice.num_tokens - 2, choice.num_tokens - 1
            step[slot] = len(choice.row.token_ids)
            visible = max(visible, choice.num_tokens)
        self._cache, guesses = steps.propose(
            self.model.config,
            self.model.params,
            self._cache,
            tokens,
            positions,
            np.int32(visible),
            columns,
            self._rules,
            step,
            num=self.options.draft_tokens,
            needs=needs,
            vocab_size=self._vocab_size,
            **self._shared,
        )
        return np.asarray(jax.device_get(guesses))

    def took(self, choice: Choice) -> None:
        """A choice has new tokens: guesses from the first wrong one on do not count as read."""
        assert choice.slot is not None
        if self.num_read(choice):
            count = min(self.num_read(choice), choice.num_tokens - 1)
            self._read[choice.slot] = choice.arrival, count

    def move(self, choice: Choice, target: int) -> None:
        """Copies what it has of a choice to another slot."""
        count = self.num_read(choice)
        if count:
            assert choice.slot is not None
            self._cache = steps.copy_slot(self._cache, np.int32(choice.slot), np.int32(target))
            self._read[target] = choice.arrival, count
