"""Weights that a stage uses or trains, and does not hold alone."""

import pytest
import torch
from deepspeed.pipe import LayerSpec
from sentences import one_sentence
from torch import nn
from torch.nn import functional as F

from ds_local.engine.foreign_weights import ForeignWeights, check_untied
from ds_local.errors import ConfigError

AROUND = nn.Linear(4, 4)


def look(outputs, *layers):
    ForeignWeights(nn.ModuleList(layers)).look("the layers", 1, outputs)


def test_weights_of_a_function_are_found():
    own, x = nn.Linear(4, 4), torch.zeros(2, 4)
    look((own(x), None, {"mask": x}), own)
    with one_sentence("the layers of segment 1", "[4, 4], [4]", error=ConfigError):
        look([x, AROUND(own(x))], own)
    look(AROUND(own(x)), own, AROUND)  # a layer of the same stage
    tied = torch.utils.checkpoint.checkpoint(
        lambda h: F.linear(h, AROUND.weight), own(x), use_reentrant=False
    )
    with one_sentence("of shape [4, 4] that", error=ConfigError):
        look(tied, own)


def test_what_cannot_learn_is_nobodys_business():
    own, x = nn.Linear(4, 4), torch.zeros(2, 4)
    with torch.no_grad():
        look(AROUND(x), own)
    look(own(AROUND(x).detach()), own)
    look(own(torch.zeros(2, 4, requires_grad=True)), own)  # what came from below


@pytest.mark.parametrize("where", ["layer", "head"])
def test_a_stage_shares_no_weights_with_a_layer_of_another(where):
    layers = [nn.Linear(4, 4), LayerSpec(nn.Linear, 4, 4), nn.Linear(4, 4), torch.tanh]
    own = {1: nn.Linear(4, 4), 2: layers[2], 3: torch.tanh}
    check_untied(layers, own, {"1": nn.Sequential(layers[2])})
    tied = nn.Sequential(layers[0])
    if where == "layer":
        own[1] = tied
    heads = {"1": tied} if where == "head" else {}
    name = {"layer": "layer 1", "head": "the head of segment 1"}[where]
    with one_sentence(f"{name} shares weights with layer 0", error=ConfigError):
        check_untied(layers, own, heads)
