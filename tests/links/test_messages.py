"""What travels between segments comes out as it went in."""

import pytest
import torch

from ds_local.config.sections import LinkConfig
from ds_local.links.messages import (
    activation_message,
    combine,
    gradient_message,
    parts_of_activation,
    parts_of_gradient,
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
