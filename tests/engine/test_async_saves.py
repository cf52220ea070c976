"""What an asynchronous save copies, and what becomes of its failures. No ranks: see
tests/dist/test_saving.py."""

import threading
from collections import OrderedDict

import pytest
import torch

from ds_local.engine.async_saves import AsyncSaves, KeptFiles
from ds_local.errors import SaveError


class Written:
    """A checkpoint engine that keeps what it is given."""

    def __init__(self):
        self.files = {}

    def save(self, state_dict, path):
        self.files[path] = state_dict

    def makedirs(self, path, exist_ok=False):
        self.files[path] = None

    def create(self, info):
        return f"create {info}"


def state():
    moments = {"exp_avg": torch.ones(2, 3), "step": torch.tensor(4.0)}
    return OrderedDict(optimizer={0: moments}, rates=[0.1, 0.2], shape=(2, 3), text="a")


def test_copies_do_not_follow_what_training_does():
    saves, inner = AsyncSaves(None), Written()
    kept = KeptFiles(inner, saves)
    own = state()
    kept.makedirs("/x", exist_ok=True)
    kept.save(own, "/x/mp_rank_00_model_states.pt")
    assert inner.files == {}
    assert kept.create(1) == "create 1"
    own["optimizer"][0]["exp_avg"].mul_(7.0)
    own["optimizer"][0]["step"] += 1
    own["rates"][0] = 9.0
    kept.write(inner)
    written = inner.files["/x/mp_rank_00_model_states.pt"]
    assert list(inner.files) == ["/x", "/x/mp_rank_00_model_states.pt"]
    assert type(written) is OrderedDict
    assert torch.equal(written["optimizer"][0]["exp_avg"], torch.ones(2, 3))
    assert written["optimizer"][0]["step"].item() == 4.0
    assert (written["rates"], written["shape"], written["text"]) == ([0.1, 0.2], (2, 3), "a")


def test_layers_and_heads_are_copies_already():
    saves, inner = AsyncSaves(None), Written()
    kept, weight = KeptFiles(inner, saves), torch.ones(3)
    kept.save({"w": weight}, "/x/layer_00-model_states.pt")
    kept.write(inner)
    assert inner.files["/x/layer_00-model_states.pt"]["w"] is weight


def test_the_memory_of_a_save_is_used_again_by_the_next():
    saves = AsyncSaves(None)
    places = []
    for _ in range(3):
        found = saves.copied(state(), "a.pt")["optimizer"][0]["exp_avg"]
        places.append(found.data_ptr())
        other = saves.copied(torch.zeros(6), "b.pt")  # as large, at the same time
        assert other.data_ptr() != found.data_ptr()
        saves.start(lambda: None)
        saves.wait()
    assert len(set(places)) <= 2


def test_a_save_goes_on_beside_and_is_waited_for():
    saves, go_on, done = AsyncSaves(None), threading.Event(), []
    saves.start(lambda: (go_on.wait(10), done.append(1)))
    assert not done
    go_on.set()
    saves.wait()
    assert done == [1]
    saves.wait()  # there is none


def fail(error):
    raise error


def test_a_failure_is_told_at_once_and_raised_once():
    saves, told = AsyncSaves(None), []
    saves.tell = lambda error: told.append(str(error))
    saves.start(lambda: fail(SaveError("the disk is full")))
    with pytest.raises(SaveError, match="the disk is full"):
        saves.wait()
    saves.wait()
    assert told == ["the disk is full"]
    saves.start(lambda: fail(SaveError("again")))
    saves.settle()  # it has been told
    saves.start(lambda: fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        saves.settle()
    assert told == ["the disk is full", "again"]
