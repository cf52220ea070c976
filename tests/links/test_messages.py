"""What travels between segments comes out as it went in."""

import pytest
import torch

from ds_local.config.sections import LinkConfig
from ds_local.links.messages import (
    activation_message,
    combine,
    copied_to,
    gradient_message,
    pack,
    parts_of_activation,
    parts_of_gradient,
    unpack,
)
from ds_local.links.trees import CannotTravel, Tree


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


def test_a_value_comes_back_with_its_form():
    hidden = {"state": torch.ones(2, 3), "mask": torch.tensor([True]), "scale": 0.5}
    for value in (hidden["state"], hidden, (hidden["mask"], None), None):
        message = pack("hidden", Tree.of(value))
        assert all(name.startswith("hidden") for name in message)
        back = unpack("hidden", message).value()
        assert str(back) == str(value)
    assert list(pack("x", Tree.of(torch.ones(1)))) == ["x"]
    assert pack("x", Tree.of(None)) == {}


def test_an_activation_says_what_learns_and_what_it_counts():
    link, figures = LinkConfig(), torch.tensor([[1.5]])
    learns, fixed = torch.ones(2, requires_grad=True), torch.ones(2)
    message = activation_message(
        Tree.of((learns, fixed)), Tree.of(torch.tensor([3])), figures, link, 0, weight=0.75
    )
    came = parts_of_activation(message)
    assert (came.learns, came.weight, came.figures.item()) == ([True, False], 0.75, 1.5)
    assert came.labels.value().tolist() == [3]
    plain = parts_of_activation(activation_message(Tree.of(fixed), Tree.of(None), figures, link, 0))
    assert (plain.learns, plain.weight, plain.labels.value()) == ([True], 1.0, None)


def test_a_copy_may_be_changed_in_place():
    given = torch.zeros(2)
    copied = copied_to({"a": given}, torch.device("cpu")).value()
    copied["a"].add_(1)
    assert given.tolist() == [0, 0]


def test_one_whole_gradient_is_handed_on_as_it_is():
    gradient = torch.ones(2)
    assert combine([([gradient], 1.0)])[0] is gradient
    assert combine([([gradient], 0.5)])[0].tolist() == [0.5, 0.5]
