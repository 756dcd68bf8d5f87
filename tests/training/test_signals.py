"""A signal is noted at once, told if the step takes long, and a second Ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import time

import pytest

from varcli.training import signals
from varcli.training.signals import StopRequest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself signals")


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.name is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_leaves_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGTERM"


def test_a_signal_during_a_long_step_is_told_once_and_one_during_a_short_step_is_not(monkeypatch):
    monkeypatch.setattr(signals, "_TOLD_AFTER", 0.05)
    said: list[str] = []
    with StopRequest(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert said == []
    with StopRequest(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    (told,) = said
    assert told.startswith("SIGTERM: the run stops after this step") and "Ctrl-C now leaves at once" in told
