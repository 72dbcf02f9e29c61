"""Programs made before they run, in several threads."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.engine.ahead import Call, Compiler


def test_what_was_compiled_ahead_is_not_compiled_again():
    compiled = []
    step = jax.jit(lambda x, y: x * 2 + y)
    calls = [Call(step, (jnp.zeros(size), np.float32(0))) for size in (3, 5, 7)]
    with Compiler(contextlib.nullcontext) as compiler:
        assert list(compiler.begin(calls)) == calls

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    others = [jnp.full(size, 4.0, jnp.float32) for size in (3, 5, 7)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    results = [step(x, np.float32(1)) for x in others]
    before = len(compiled)
    step(jnp.zeros(9), np.float32(1)).block_until_ready()
    assert before == 0 < len(compiled)
    assert [float(each[0]) for each in results] == [9, 9, 9]


def test_every_thread_has_the_context():
    here = threading.local()

    @contextlib.contextmanager
    def context():
        here.inside = True
        yield
        here.inside = False

    class Step:
        def lower(self, *_, **__):
            assert here.inside
            return self

        def compile(self):
            assert here.inside

    with Compiler(context) as compiler:
        assert len(list(compiler.begin([Call(Step(), ())] * 4))) == 4


def test_a_call_is_compiled_whose_argument_was_given_away():
    give = jax.jit(lambda x: x + 1, donate_argnums=0)
    twice = jax.jit(lambda x: x * 2)
    x = jnp.arange(3.0)
    call = Call(twice, (x,))
    y = give(x)
    assert x.is_deleted()
    with Compiler(contextlib.nullcontext) as compiler:
        assert list(compiler.begin([call])) == [call]
    np.testing.assert_array_equal(twice(y), [2, 4, 6])


def test_an_error_reaches_the_caller():
    call = Call(jax.jit(jnp.add), (jnp.zeros(2), jnp.zeros(3)))
    with Compiler(contextlib.nullcontext) as compiler, pytest.raises(TypeError, match="shapes"):
        list(compiler.begin([call]))
