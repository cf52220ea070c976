"""What a pipeline module is asked for, without a module."""

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology
from sentences import assert_one_sentence
from torch import nn

from ds_local.config.files import local_parallel
from ds_local.engine.module_checks import (
    check_arguments,
    check_batches,
    check_layers,
    stages_of,
    world_size,
)
from ds_local.errors import ConfigError


def section(**keys):
    return local_parallel({"local_parallel": {"mode": "backprop", **keys}})


def refused(call, *words):
    with pytest.raises(ConfigError) as error:
        call()
    assert_one_sentence(error.value, *words)


def test_functions_are_functions():
    check_arguments(None, lambda segment: None, 0)
    refused(lambda: check_arguments("loss", None, 0), "loss_fn is a str; pass a function")
    refused(lambda: check_arguments(None, 3, 0), "head is a int")
    check_arguments(nn.CrossEntropyLoss(weight=torch.ones(3)), None, 0)
    check_arguments(nn.Linear(2, 2).requires_grad_(False), None, 0)
    refused(lambda: check_arguments(nn.Linear(2, 2), None, 0), "loss_fn has weights", "bias")
    refused(lambda: check_arguments(None, None, -1), "activation_checkpoint_interval", "-1")


def test_the_launcher_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size() == 6
    assert stages_of(section(), 3, None) == 3
    assert stages_of(section(), None, None) == 6
    topology = ProcessTopology(axes=["data", "pipe"], dims=[3, 2])
    assert stages_of(section(), None, topology) == 2
    refused(lambda: stages_of(section(), 4, None), "cannot be divided", "6", "4")
    three = PipeModelDataParallelTopology(1, 1, 6)
    refused(lambda: stages_of(section(), None, three), "topology has the axes", "'model'")


def test_a_step_of_the_config_fits_the_scheme():
    check_batches({}, section(), 2, 1)
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    check_batches(sizes, section(), 1, 1)
    mix = local_parallel({"local_parallel": {"mix": [{"micro_batches": 3}, {}]}})
    refused(lambda: check_batches(sizes, mix, 1, 1), "mix names 3 micro-batches")


def layers(count=4):
    return [nn.Linear(2, 2) for _ in range(count)]


def test_there_is_a_layer_for_every_segment():
    check_layers(layers(), 2, section(segments_per_stage=2), None, False)
    refused(
        lambda: check_layers(layers(3), 2, section(segments_per_stage=2), None, False),
        "2 stages x 2 segments need at least 4 layers, the model has 3",
    )


def test_boundaries_rise_from_the_first_layer_to_the_last():
    check_layers(layers(), 2, section(), [0, 1, 4], False)
    for parts in ([0, 4], [1, 2, 4], [0, 2, 3], [0, 2, 2, 4], [0, 4, 4]):
        refused(
            lambda parts=parts: check_layers(layers(), 2, section(), parts, False),
            f"local_parallel.parts is {parts}",
            "3 increasing numbers from 0 to the number of layers, 4",
        )


def test_weights_that_stages_would_share_are_refused():
    shared = layers(3)
    shared.append(shared[1])
    check_layers(shared, 1, section(), None, False)
    refused(lambda: check_layers(shared, 2, section(), None, False), "layers 1 and 3 share weights")
    tied = [*layers(1), TiedLayerSpec("embed", nn.Linear, 2, 2), LayerSpec(nn.Linear, 2, 2)]
    for stages in (1, 2):
        refused(
            lambda n=stages: check_layers(tied, n, section(), None, False),
            "layer 1 is a TiedLayerSpec",
        )


def test_losses_inside_need_heads():
    local = local_parallel({"local_parallel": {"mode": "local"}})
    check_layers(layers(), 2, local, None, True)
    refused(lambda: check_layers(layers(), 2, local, None, False), "pass head=make_head")


def test_options_of_language_models_are_none_of_other_layers():
    check_layers(layers(), 2, section(head={"every": 2}), None, False)
    for options in ({"head": {"token_fraction": 0.5}}, {"partition": "uniform"}):
        found = section(**options)
        refused(
            lambda found=found: check_layers(layers(), 2, found, None, False),
            "is for the language models that causal_lm makes",
        )
