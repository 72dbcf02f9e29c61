"""Steps that are compiled before they first run, several at once.

Compiling, and loading what the compilation cache holds, leaves Python's lock free: at the start of
an engine the programs of all shapes are made side by side.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A jitted function and what it is called with."""

    step: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> Any:
        return self.step(*self.arguments, **self.options)

    def compile(self) -> None:
        """After this, `run` compiles nothing: jit finds what was lowered for the same shapes."""
        self.step.lower(*self.arguments, **self.options).compile()


def compile_all(calls: Iterable[Call], context: Callable[[], AbstractContextManager[Any]]) -> None:
    """context: of a mesh; such belong to one thread."""

    def compile_one(call: Call) -> None:
        with context():
            call.compile()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, calls))
