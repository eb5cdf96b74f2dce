"""Signals are noted in a block and put back after it, whoever trains in it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fastdml.train import TrainingStopped
from fastdml.train.stopping import STOPPING, Stop, listening


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_and_leads_out_when_asked(number):
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        pytest.skip("this process ignores it")
    with listening() as stop:
        stop.leave_if_asked(lambda: pytest.fail("nobody asked"))
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert signal.getsignal(number) is before  # a second one acts as ever
        with pytest.raises(TrainingStopped) as stopped:
            stop.leave_if_asked(lambda: "after 3 of 9 steps")
    assert stopped.value.code == 128 + number
    assert str(stopped.value) == f"stopped by {number.name} after 3 of 9 steps"
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_hears_nothing():
    found: list[Stop] = []

    def train():
        with listening() as stop:
            found.append(stop)

    before = [signal.getsignal(number) for number in STOPPING]
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0].signal is None
    assert [signal.getsignal(number) for number in STOPPING] == before
