"""Signals: what they leave time for, and the code that a process ends with."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.train.command import ROOT
from train.interrupt import EXIT_CODE, PreemptedError, make_vote, stop_on_signals

pytestmark = pytest.mark.compiled_quickly


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


# In a callback of the garbage collector, of which Python drops the exceptions.
EARLY = """
import gc, logging, os, signal
from train.interrupt import stop_on_signals
logging.basicConfig()
with stop_on_signals():
    gc.callbacks.append(lambda phase, info: os.kill(os.getpid(), signal.SIGTERM))
    gc.collect()
    print("goes on")
"""


def test_before_there_is_anything_to_save_the_process_ends_at_once():
    ended = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == EXIT_CODE == PreemptedError.exit_code == 75
    assert "before the first step" in ended.stderr and ended.stdout == ""
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        send(signal.SIGINT)


def test_ctrl_c_that_was_dropped_counts_before_the_first_step():
    with stop_on_signals() as request:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            request.begin()
    with stop_on_signals() as request:
        request.begin()
        send(signal.SIGINT)
        assert request.came == signal.SIGINT


def test_later_a_signal_is_a_wish():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as request:
        request.noted = True
        assert request.came is None
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert request.came == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        request.noted = True
        send(signal.SIGINT)
        assert request.came == signal.SIGINT
        send(signal.SIGINT)


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def work():
        with stop_on_signals(1.0) as request:
            seen.append((signal.getsignal(signal.SIGTERM), request.came))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), None)]


def test_one_process_sees_a_signal_at_once():
    with stop_on_signals() as request:
        request.noted = True
        ballot = make_vote(None)(request)
        assert ballot() == 0
        send(signal.SIGTERM)
        assert ballot() == signal.SIGTERM


GRACE = """
import logging, os, signal, sys, time
from train.interrupt import stop_on_signals
logging.basicConfig()
with stop_on_signals(0.5) as request:
    request.noted = True
    os.kill(os.getpid(), signal.SIGTERM)
    begin = time.monotonic()
    while time.monotonic() < begin + float(sys.argv[1]):
        pass  # as a save that takes its time
time.sleep(0.8)
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("work_seconds", "code", "message"),
    [("60", 75, "0.5 seconds ago (train.grace_seconds)"), ("0.1", 3, "")],
)
def test_the_process_is_gone_when_the_grace_is_over(work_seconds, code, message):
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", GRACE, work_seconds],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == code and message in ended.stderr
    assert time.monotonic() - begin < 40
