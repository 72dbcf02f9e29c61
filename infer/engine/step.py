"""A step on its way through the device: which choices take tokens in it, and what they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from infer.engine.scheduler import Choice
from infer.sampling import Sampled


@dataclass(frozen=True)
class Member:
    """A choice as it was when the step began. draft: its guessed tokens."""

    choice: Choice
    slot: int
    admissions: int
    draft: Sequence[int]

    @property
    def is_there(self) -> bool:
        """Whether it is still where it was: it has neither ended nor been preempted since."""
        return self.choice.slot == self.slot and self.choice.admissions == self.admissions


class Step:
    """length: tokens a row. What a member's slot b takes after its token j is number
    b * length + j of what `read` gives."""

    def __init__(
        self,
        choices: Sequence[Choice],
        drafts: Mapping[int, Sequence[int]],
        sampled: Sampled,
        length: int,
    ):
        self.members = []
        for choice in choices:
            assert choice.slot is not None
            draft = drafts.get(choice.slot, ())
            self.members.append(Member(choice, choice.slot, choice.admissions, draft))
        self._sampled, self.length = sampled, length

    @property
    def is_wanted(self) -> bool:
        return any(member.is_there for member in self.members)

    def read(self) -> Sampled:
        """Waits for it."""
        result: Any = jax.device_get(self._sampled)
        self._sampled = result
        return result
