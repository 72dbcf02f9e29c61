"""What processes agree on, with a thread for each of two."""

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from infer.engine import agreement
from infer.engine.agreement import STUCK_SECONDS, Agreement, ElsewhereError
from infer.engine.following import BUILD, Following
from infer.engine.hosts import LEAVE
from llama_jax.mesh.distributed import EXCHANGE_SECONDS, ProcessError


@pytest.fixture
def in_two(monkeypatch):
    """Runs work in "processes" 0 and 1; what it gives or raises in each."""
    number, told, meeting = threading.local(), {}, threading.Barrier(2, timeout=10)

    def exchange(name, value="", timeout_seconds=0):
        told[name, number.value] = value
        meeting.wait()
        return [told[name, 0], told[name, 1]]

    monkeypatch.setattr(agreement, "exchange", exchange)
    index = types.SimpleNamespace(process_index=lambda: number.value)
    monkeypatch.setattr(agreement, "jax", index)

    def outcome(work, process):
        number.value = process
        try:
            return work(process)
        except Exception as error:  # noqa: BLE001  shown by the test
            return error

    def run(work):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda process: outcome(work, process), (0, 1)))

    return run


def test_all_hear_what_each_says(in_two):
    def work(process):
        own = Agreement("engine 1")
        with own.in_all():
            return own.exchange(f"of {process}"), own.least(7 - process)

    assert in_two(work) == [(["of 0", "of 1"], 6)] * 2


@pytest.mark.parametrize("turns_before", [0, 1, 2])
def test_one_that_fails_anywhere_fails_all(in_two, turns_before):
    """It says so in its next turn, whatever the others are about to say there."""

    def work(process):
        own = Agreement("engine 1")
        with own.in_all():
            for turn in range(2):
                if process == 1 and turn == turns_before:
                    raise OSError("no such file")
                own.least(turn)
            if process == 1:
                raise OSError("no such file")

    first, second = in_two(work)
    assert isinstance(first, ElsewhereError) and str(first) == "process 1: no such file"
    assert isinstance(second, OSError) and str(second) == "no such file"


def test_who_fails_too_says_its_own_reason(in_two):
    def work(process):
        with Agreement("engine 1").in_all():
            raise MemoryError if process else ValueError("wrong")

    first, second = in_two(work)
    assert str(first) == "wrong" and isinstance(second, MemoryError)


@pytest.mark.parametrize("fails_at", ["build", "reset", "compile_steps"])
def test_an_engine_that_fails_here_is_left_out_and_the_others_stay(in_two, fails_at):
    class Runner:
        def __init__(self, number, fails):
            self.number, self._fails = number, fails
            self.model = types.SimpleNamespace(context=threading.Lock)

        def reset(self):
            self._fail("reset")

        def compile_steps(self):
            self._fail("compile_steps")

        def _fail(self, where):
            if self._fails and where == fails_at:
                raise MemoryError("no room for the cache")

    def build(own, name, version):
        if version == "2" and fails_at == "build":
            raise MemoryError("no room for the weights")
        return Runner(name, version == "2")

    def work(process):
        if process == 0:
            for number in (1, 2):
                own = Agreement(f"engine {number}")
                for _ in ("build", "reset", "compile_steps"):
                    own.exchange()
            return None
        following = Following(build)
        for number in (1, 2):
            following._do(number, BUILD, ["m", str(number), False])
            if number not in following._runners:
                break
            following._do(number, "reset", [])
            if number not in following._runners:
                break
            # Apart, as it is told, but in this thread.
            following._try(
                number,
                lambda number=number: following._agreed(
                    number, following._runners[number].compile_steps
                ),
                apart=False,
            )
        following._do(2, LEAVE, [])
        return list(following._runners)

    first, second = in_two(work)
    assert isinstance(first, ElsewhereError) and str(first).startswith("process 1: no room for the")
    assert second == [1]


@pytest.mark.parametrize("apart, patience", [(True, EXCHANGE_SECONDS), (False, STUCK_SECONDS)])
def test_who_fails_while_others_wait_on_the_devices_ends(monkeypatch, apart, patience):
    """They do not come to hear of it; where all read apart from each other, they will."""
    waited = []

    def exchange(name, value="", timeout_seconds=0):
        waited.append(timeout_seconds)
        raise ProcessError("other processes did not reach it")

    def build(*_):
        raise MemoryError

    monkeypatch.setattr(agreement, "exchange", exchange)
    following = Following(build)
    following._agreements[1] = Agreement("engine 1")
    with pytest.raises(ProcessError, match="did not reach"):
        following._try(1, lambda: following._make(1, "m", "1", apart), apart=False)
    assert waited == [patience]
