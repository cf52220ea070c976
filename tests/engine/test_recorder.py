"""Instructions with their times, the newest ones."""

import pytest
import torch

from ds_local.engine import recorder
from ds_local.engine.recorder import Recorder


def test_an_instruction_is_kept_with_its_step_and_its_time(monkeypatch):
    times = iter([10.0, 12.5])
    monkeypatch.setattr("time.time", lambda: next(times))
    recording, done = Recorder(torch.device("cpu")), []
    recording.record("ForwardPass", 3, lambda: done.append(1))
    assert done == [1]
    assert list(recording.events) == [("ForwardPass", 3, 10.0, 12.5)]


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(recorder, "KEPT", 2)
    recording = Recorder(torch.device("cpu"))
    for step in range(5):
        recording.record("SendGrad", step, lambda: None)
    assert [step for _, step, *_ in recording.events] == [3, 4]


def test_an_error_passes_and_is_no_event():
    recording = Recorder(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        recording.record("ForwardPass", 0, lambda: 1 // 0)
    assert not recording.events
