"""DeepSpeed's files, read without running what is in them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from sentences import assert_one_sentence

from ds_local.engine.safe_files import SafeCheckpointEngine, unloadable
from ds_local.errors import CheckpointError


class Harmful:
    def __reduce__(self):
        return os.mkdir, (str(self.place),)

    def __init__(self, place):
        self.place = place


@pytest.fixture
def files():
    return SafeCheckpointEngine()


def test_what_deepspeed_saves_comes_back(tmp_path, files):
    state = {"w": torch.arange(3), "step": 4, "scaler": LossScaler(scale=2.0), "none": None}
    path = str(tmp_path / "a.pt")
    files.save(state, path)
    for found in (files.load(path), files.look(path)):
        assert torch.equal(found["w"], state["w"])
        assert (found["step"], found["none"]) == (4, None)
        assert found["scaler"].cur_scale == 2.0


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, files, zipped):
    path, place = str(tmp_path / "a.pt"), tmp_path / "made"
    torch.save({"x": Harmful(place)}, path, _use_new_zipfile_serialization=zipped)
    for read in (files.load, files.look):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert_one_sentence(error.value, f"cannot read {path}: Trying", "mkdir")
        assert "weights_only" not in str(error.value)  # no advice to read it all the same
    assert not place.exists()


def test_a_damaged_file_is_named(tmp_path, files):
    path = str(tmp_path / "a.pt")
    files.save({"w": torch.zeros(100)}, path)
    Path(path).write_bytes(Path(path).read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"cannot read {path}"):
        files.load(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        files.look(str(tmp_path / "gone.pt"))


def test_what_could_not_be_read_again_is_found_inside():
    assert unloadable({"a": [1, torch.zeros(2)], "b": {"c": "text"}}, "client_state") is None
    odd = {"fine": 1, "a": [1, {"b": Path("x")}]}
    found = unloadable(odd, "client_state")
    assert found.startswith("client_state['a'][1]['b'] is a pathlib.")
    assert unloadable({Path("x"): 1}, "s").startswith("the key ")


def test_what_cannot_even_be_saved_is_found():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(lambda: 0)
    assert unloadable({"f": lambda: 0}, "s") == "s['f'] is a builtins.function"
