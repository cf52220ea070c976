"""Tensors of another model are named before any is loaded."""

import pytest
import torch
from torch import nn

from ds_local.checkpoints.tensors import check_tensors
from ds_local.errors import CheckpointError

OWN = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.zeros(2, 3)}, r"weight is \[2, 3\] there, \[3, 2\] in this run"),
        ({"bias": 7}, r"bias is no tensor there, \[3\] in this run"),
        ({"scale": torch.ones(1)}, "missing are none, unknown scale"),
        ({"bias": None}, "missing are bias, unknown none"),
    ],
    ids=["shape", "no tensor", "unknown", "missing"],
)
def test_what_does_not_fit_is_named(change, said):
    found = {name: value for name, value in (OWN | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=said) as raised:
        check_tensors(found, nn.Linear(2, 3), "layer.pt")
    assert str(raised.value).startswith("layer.pt is of another model: ")


def test_what_fits_passes_and_names_may_differ_where_asked():
    check_tensors(OWN, nn.Linear(2, 3), "layer.pt")
    check_tensors({"weight": OWN["weight"], "more": 1}, nn.Linear(2, 3), "layer.pt", strict=False)
    half = {name: tensor[:1] for name, tensor in OWN.items()}
    check_tensors(half, nn.Linear(2, 3), "x", shape_of=lambda tensor: tensor[:1].shape)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        check_tensors([*OWN.values()], nn.Linear(2, 3), "layer.pt")
