"""Steps that are compiled before they first run, several at once.

Compiling, and loading what the compilation cache holds, leaves Python's lock free: at the start of
an engine the programs of all shapes are made side by side.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A jitted function and what it is called with."""

    step: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        return self.step(*self.arguments, **self.options)

    def compile(self) -> None:
        """After this, `run` compiles nothing: jit finds what was lowered for the same shapes."""
        self.step.lower(*self.arguments, **self.options).compile()


class Compiler(AbstractContextManager["Compiler"]):
    """Compiles calls in threads of its own while the caller goes on. At its end what has not begun
    is dropped: wait for what `begin` gives.

    context: of a mesh; such belong to one thread.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]):
        self._context = context
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def begin(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls in their order, each as soon as it is compiled. They may run then, also those
        whose arguments were given away in the meantime: only their shapes are looked at here."""
        begun = [(call, self._pool.submit(self._compile, call)) for call in calls]

        def finished() -> Iterator[Call]:
            for call, compiled in begun:
                compiled.result()
                yield call

        return finished()

    def _compile(self, call: Call) -> None:
        with self._context():
            call.compile()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
