"""What is in a value comes back out of a message as it was; what cannot is named."""

import math
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ds_local.config.sections import LinkConfig
from ds_local.errors import TransportError
from ds_local.links.buffers import Tag
from ds_local.links.messages import (
    activation_message,
    combine,
    gradient_message,
    pack,
    parts_of_activation,
    parts_of_gradient,
    unpack,
)
from ds_local.links.transport import MemoryLink
from ds_local.links.trees import CannotTravel, Tree, map_tensors


class Pair(NamedTuple):
    first: object
    second: object


VALUES = [
    (),
    [],
    {},
    ((),),
    [None, "tensor", "number", "a | b = c", ""],
    (True, 1, 1.0, False, 0, 0.0, -(2**63), 2**63 - 1),
    (math.inf, -0.0, 1 + 2j),
    {"a": 1, 2: {"b": (3,)}},
    OrderedDict(b=1, a=2),
    Pair(1, [2]),
    torch.Size([2, 3]),
]


def through_json(value):
    """As between processes: of the names, only their text is left."""
    message = {str(name): tensor for name, tensor in pack("hidden", Tree.of(value)).items()}
    return unpack("hidden", message).value()


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back(value):
    back = through_json(value)
    assert type(back) is type(value)
    assert repr(back) == repr(value)  # 1, 1.0 and True are equal, and not the same


def test_nan_comes_back():
    assert math.isnan(through_json((math.nan,))[0])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_come_back(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    one, (two, nothing) = through_json([tensor, (tensor, None)])
    assert nothing is None
    for back in (through_json(tensor), one, two):
        assert back.dtype == dtype
        assert torch.equal(
            back.float() if dtype.itemsize == 1 else back,
            one.float() if dtype.itemsize == 1 else one,
        )
        assert back.shape == shape


def test_a_named_tuple_that_this_process_does_not_know_keeps_name_and_fields():
    from ds_local.links import trees

    value = namedtuple("Local", "x y")(1, "two")
    message = pack("hidden", Tree.of(value))
    trees._named_tuples.clear()
    back = unpack("hidden", message).value()
    assert (type(back).__name__, back.x, back.y) == ("Local", 1, "two")
    assert type(through_json(Pair(1, 2))) is Pair


@dataclass
class Data:
    x: int


REFUSED = [
    ({1, 2}, "a set"),
    (Data(1), "test_trees.Data"),
    ([{"x": (np.float64(1.0),)}], "numpy.float64"),
    ((np.zeros(2),), "a numpy.ndarray"),
    (defaultdict(int), "a collections.defaultdict"),
    ({(1, 2): 3}, r"a dict with the key \(1, 2\)"),
    ({True: 3}, "a dict with the key True"),
    ((2**63,), "the number 9223372036854775808, which takes more than 64 bits"),
    (torch.max(torch.ones(2, 2), 0), r"torch.return_types.max"),
    (torch.eye(2).to_sparse(), r"a tensor that is not dense \(torch.sparse_coo\)"),
    (lambda x: x, "a function"),
]


@pytest.mark.parametrize(("value", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_travel_is_named(value, words):
    with pytest.raises(CannotTravel, match=words):
        Tree.of(value)


def test_any_value_can_be_looked_through_for_tensors():
    odd = Data(1)
    doubled, (same, number) = map_tensors([torch.ones(1), (odd, 2)], lambda t: t * 2)
    assert doubled.item() == 2.0
    assert same is odd
    assert number == 2


def test_a_codec_wants_to_know_which_tensor_it_is_for():
    link, figures = LinkConfig(codec="int8"), torch.zeros(2, 3)
    hidden, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    message = activation_message(Tree.of((mask, 0.5, hidden)), Tree.of(None), figures, link, 0)
    back = parts_of_activation(message).hidden.value()
    assert back[1] == 0.5
    assert torch.allclose(back[2], hidden, atol=0.05)
    assert not torch.equal(back[2], hidden)
    with pytest.raises(
        CannotTravel, match=r"2 floating-point tensors, of which link\.codec 'int8'"
    ):
        activation_message(Tree.of((hidden, hidden)), Tree.of(None), figures, link, 0)


def test_gradients_have_a_place_each_and_absent_ones_stay_absent():
    slots = [torch.zeros(2), torch.zeros(3), torch.zeros(())]
    message = gradient_message([None, torch.ones(3), None], slots)
    assert [tuple(message[str(i)].shape) for i in range(3)] == [(2,), (3,), ()]
    none, ones, nothing = parts_of_gradient(message)
    assert none is None
    assert nothing is None
    both = combine([([ones, None, None], 2.0), ([ones, ones, None], 0.5)])
    assert [g if g is None else g.tolist() for g in both] == [[2.5] * 3, [0.5] * 3, None]


def test_within_a_stage_nobody_sees_what_another_does_in_place():
    link, sent = MemoryLink(), torch.ones(2, 3).t()
    link.send(Tag(0, 0), {"x": sent})
    got = link.receive(Tag(0, 0))[1]["x"]
    sent.zero_()
    assert got.is_contiguous()
    assert got.sum() == 6
    with pytest.raises(TransportError, match="no message for step 0, micro-batch 0"):
        link.receive(Tag(0, 0))
