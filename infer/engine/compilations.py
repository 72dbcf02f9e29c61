"""How often JAX compiled something, or loaded it from the persistent cache, by thread."""

import functools
import threading
from collections import Counter

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"

_counts: Counter[int] = Counter()


@functools.cache
def count_compilations() -> None:
    """Begins to count, once for the process. JAX knows no way to stop."""
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
        _counts[threading.get_ident()] += 1


def compilations_here() -> int:
    """In this thread since `count_compilations`."""
    return _counts[threading.get_ident()]
