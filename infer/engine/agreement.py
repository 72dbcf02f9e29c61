"""What the processes of a group agree on about an engine, turn by turn, beside running steps."""

import contextlib
import itertools
import json
from collections.abc import Iterator

import jax

from llama_jax.mesh.distributed import EXCHANGE_SECONDS, exchange

# Where processes compute together, one that failed may leave the others waiting on the devices for
# what never comes: how long it waits for them to come and hear of it.
STUCK_SECONDS = 60.0


class ElsewhereError(RuntimeError):
    """Another process failed, and said so to all."""


class Agreement:
    """All processes take the same turns. One that fails says so in its next turn, in place of what
    it would say there, and so all of them fail then. name: new for each.

    A ProcessError, raised where others do not come, means that no more can be agreed on.
    """

    def __init__(self, name: str):
        self._name = name
        self._turns = itertools.count()

    def exchange(self, value: str = "") -> list[str]:
        """What each process says, in their order. Raises ElsewhereError."""
        return self._turn(value, None, EXCHANGE_SECONDS)

    def least(self, value: int) -> int:
        """The smallest value that a process has. Raises ElsewhereError."""
        return min(int(each) for each in self.exchange(str(value)))

    @contextlib.contextmanager
    def in_all(self, patience_seconds: float = EXCHANGE_SECONDS) -> Iterator[None]:
        """A block that succeeds in all processes or in none. Raises ElsewhereError, which names the
        process and its reason, where this one had no error. patience_seconds: how long one with an
        error waits for the others to come."""
        try:
            yield
        except ElsewhereError:
            raise
        except Exception as error:
            with contextlib.suppress(ElsewhereError):
                self._turn("", f"{error or type(error).__name__}", patience_seconds)
            raise
        self.exchange()

    def _turn(self, value: str, failure: str | None, patience_seconds: float) -> list[str]:
        name, message = f"{self._name}/{next(self._turns)}", json.dumps([value, failure])
        told = exchange(name, message, timeout_seconds=patience_seconds)
        answers = [json.loads(each) for each in told]
        for process, (_, reason) in enumerate(answers):
            if reason is not None and process != jax.process_index():
                raise ElsewhereError(f"process {process}: {reason}")
        return [each for each, _ in answers]
