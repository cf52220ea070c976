"""Running averages of weights, by hand."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from ds_local.config.files import local_parallel
from ds_local.engine.average import Average
from ds_local.errors import ConfigError


@pytest.fixture
def layer():
    made = nn.Linear(1, 1)
    set_to(made, 10.0)
    return made


def set_to(layer, value):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)


def values(average, layer):
    with average.in_place():
        return [parameter.item() for parameter in layer.parameters()]


def test_a_step_takes_its_share_and_early_ones_more(layer):
    average = Average({"a": layer}, 0.5)
    assert values(average, layer) == [10.0, 10.0]
    set_to(layer, 0.0)
    average.update(1)  # 1 / 10 stays
    assert values(average, layer) == pytest.approx([1.0, 1.0])
    average.update(3)  # 3 / 12
    assert values(average, layer) == pytest.approx([0.25, 0.25])
    set_to(layer, 1.0)
    average.update(100)  # a half, as asked for
    assert values(average, layer) == pytest.approx([0.625, 0.625])


def test_they_are_in_place_for_a_while(layer):
    average = Average({"a": layer}, 0.5)
    set_to(layer, 3.0)
    with suppress(KeyError), average.in_place():
        assert layer.weight.item() == 10.0
        raise KeyError
    assert layer.weight.item() == 3.0
    average.restart()
    assert values(average, layer) == [3.0, 3.0]


def test_averages_of_bf16_weights_are_fp32(layer):
    layer.bfloat16()
    average, kept = Average({"a": layer}, 0.999), {}
    set_to(layer, 11.0)
    average.update(10**6)
    average.save(lambda state, path: kept.update(state), "folder")
    assert kept["weight"].dtype == torch.float32
    assert kept["weight"].item() == pytest.approx(10.001)


def test_saved_ones_come_back_and_missing_ones_begin_with_the_weights(layer):
    average, files = Average({"a": layer, "b": nn.Linear(1, 1)}, 0.5), {}
    average.save(lambda state, path: files.update({path: state}), "folder")
    assert {path: [*state] for path, state in files.items()} == {
        "folder/a": ["weight", "bias"],
        "folder/b": ["weight", "bias"],
    }
    other, again = nn.Linear(1, 1), nn.Linear(2, 1)
    loaded = Average({"a": other, "b": again, "c": layer}, 0.5)
    assert loaded.load(lambda name: files[f"folder/{name}"], ["a", "b"]) == ["b", "c"]
    assert values(loaded, other) == [10.0, 10.0]


def test_nothing_is_averaged_unless_asked_for(layer):
    average = Average({"a": layer}, None)
    set_to(layer, 1.0)
    average.update(1)
    assert values(average, layer) == [1.0, 1.0]
    assert average.load(lambda name: {}, []) == []


def test_replicas_that_train_apart_have_no_average():
    section = {"ema": 0.9, "replicas": {"sync": "periodic", "every": 2}}
    with pytest.raises(ConfigError, match="the same weights on all replicas"):
        local_parallel({"local_parallel": section})
    for wrong in (1.0, -0.1, "0.9"):
        with pytest.raises(ConfigError, match=r"local_parallel\.ema"):
            local_parallel({"local_parallel": {"ema": wrong}})
