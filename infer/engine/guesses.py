"""Where guessed tokens come from: the text before, or a second model. The engine asks for them
before a step, and says afterwards what became of each row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from infer.batch import Runnable
from infer.engine.draft_model import DraftModel, check_draft
from infer.engine.drafts import look_up
from infer.engine.options import EngineOptions
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice, Scheduler
from infer.generate import Generator, parts_of
from infer.layers import Layers
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import replicated


def small_model(
    draft: Any,
    options: EngineOptions,
    *,
    config: ModelConfig,
    tokenizer: Any,
    compute: Compute,
    mesh: Mesh | None,
) -> Runnable:
    """A draft model made ready, whole on every device of a mesh. Raises ValueError for one that
    cannot guess for a model of this config and tokenizer."""
    if not options.draft_tokens:
        raise ValueError(
            "a draft model is given and draft_tokens is 0; say how many tokens it guesses at a "
            "time, such as 3"
        )
    small_config, small_params, small_tokenizer = parts_of(draft)
    check_draft(config, tokenizer, small_config, small_tokenizer)
    layers: Layers = "unrolled" if isinstance(small_params["layers"], dict) else "auto"
    if mesh is not None:
        small_params = jax.device_put(small_params, replicated(mesh))
        compute = undivided(compute)
    return Generator(
        small_config, small_params, small_tokenizer, compute=compute, mesh=mesh, layers=layers
    ).model


def undivided(compute: Compute) -> Compute:
    """How a draft model computes on a mesh: it is small, and so its steps need no word from other
    devices."""
    return replace(compute, rules=tuple((name, None) for name, _ in compute.rules))


class Guesser:
    """Only the engine's thread calls it. model: a draft model, None to look in the text."""

    def __init__(self, options: EngineOptions, runner: Runner, draft: DraftModel | None):
        self._options, self._runner, self._draft = options, runner, draft

    def start(self) -> None:
        """Allocates and compiles, after the runner did."""
        if self._draft is not None:
            with self._draft.model.context():
                self._draft.reset(self._runner.model.rules)
                self._draft.warm_up(self._runner.columns.of)

    def guess(self, choices: Sequence[Choice], scheduler: Scheduler) -> dict[int, list[int]]:
        """Guessed tokens by slot. None where a token changes what the next one may be."""
        if not self.is_worth_it(choices):
            return {}
        rooms: dict[int, int] = {}
        guessing = []
        for choice in choices:
            room = min(scheduler.room_for_draft(choice), self._options.draft_tokens)
            if choice.is_plain and room and choice.slot is not None:
                rooms[choice.slot] = room
                guessing.append(choice)
        if self._draft is None:
            found = {
                c.slot: look_up(c.tokens, rooms[c.slot]) for c in guessing if c.slot is not None
            }
        else:
            guessing = [choice for choice in guessing if self._draft.can_guess(choice)]
            rows = self._runner.rows_for(choices)
            columns = self._runner.columns.of(choices, rows, 1)
            with self._draft.model.context():
                found = self._draft.guess(guessing, rows, columns) if guessing else {}
        return {slot: tokens[: rooms[slot]] for slot, tokens in found.items() if tokens}

    def catch_up(self, running: Sequence[Choice]) -> bool:
        """Reads a piece of a text that the draft model lags behind with, if there is one."""
        choices = [choice for choice in running if choice.is_read]
        if self._draft is None or not self.is_worth_it(choices):
            return False
        with self._draft.model.context():
            return any(self._draft.catch_up(choice) for choice in choices if choice.is_plain)

    def took(self, choice: Choice) -> None:
        """A choice has new tokens."""
        if self._draft is not None and choice.slot is not None:
            self._draft.took(choice)

    def move(self, choice: Choice, target: int) -> None:
        """A choice goes to another slot."""
        if self._draft is not None:
            with self._draft.model.context():
                self._draft.move(choice, target)

    def is_worth_it(self, choices: Sequence[Choice]) -> bool:
        """Whether a step of these choices has room for guesses."""
        rows = self._runner.rows_for(choices) if choices else 0
        return 0 < rows <= self._options.max_drafted_rows
