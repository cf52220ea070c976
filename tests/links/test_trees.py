"""What is in a value comes back out of a message as it was; what cannot is named."""

import math
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ds_local.links.messages import (
    pack,
    unpack,
)
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
