"""Router losses: whose, and how much they count."""

import copy

import pytest
import torch
from families import MIXTRAL, layers_of

from ds_local.model import families
from ds_local.model.routers import routers_of, share_of, without_logits
from ds_local.model.state import HIDDEN, hidden_of
from ds_local.schedules.routes import make_routes


@pytest.fixture
def config():
    return families.load_model_config(MIXTRAL)


def test_the_loss_is_the_librarys_on_hand_worked_numbers(config):
    routers = routers_of(config)
    assert (routers.num_experts, routers.top_k, routers.coefficient) == (4, 2, 0.5)
    even = torch.zeros(6, 4)
    # every expert has probability 1/4; top 2 of 4, so shares of tokens add up to 2
    assert routers.loss([even, even]).item() == pytest.approx(2.0)
    sure = torch.tensor([[50.0, 40.0, 0.0, 0.0]] * 6)
    # experts 0 and 1 get every token, expert 0 has all of the probability: 4 * (1 * 1 + 1 * 0)
    assert routers.loss([sure]).item() == pytest.approx(4.0, rel=1e-3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    mixed = torch.where(mask.reshape(-1, 1) > 0, even, sure)
    assert routers.loss([mixed], mask).item() == pytest.approx(2.0)


def test_models_without_experts_have_none():
    llama = {key: value for key, value in MIXTRAL.items() if "expert" not in key}
    assert routers_of(families.load_model_config(llama | {"model_type": "llama"})) is None


def test_a_block_hands_on_its_routers_logits_and_a_copy_too(config):
    block = layers_of(config)[1]
    for one in (block, copy.deepcopy(block)):
        state = one(torch.zeros(2, 3, 32))
        assert {name: tuple(t.shape) for name, t in state.items()} == {
            HIDDEN: (2, 3, 32),
            "router_logits.0.0": (6, 4),
        }
        rest, loss = without_logits(state, routers_of(config))
        assert rest is hidden_of(state)
        assert loss.requires_grad
    mask = torch.ones(2, 3, dtype=torch.int64)
    rest, _ = without_logits(
        block({HIDDEN: torch.zeros(2, 3, 32), "attention_mask": mask}), routers_of(config)
    )
    assert rest.keys() == {HIDDEN, "attention_mask"}


PARTS = [0, 2, 4, 8]  # 1, 2 and 3 blocks


@pytest.mark.parametrize(
    ("mode", "window", "expected"),
    [
        ("local", None, [1, 1, 1]),
        ("backprop", None, [1 / 6, 2 / 6, 3 / 6]),
        ("chunked", 2, [1 / 3, 2 / 3, 1]),
        # segment 0 hears losses 0 and 1, segment 1 losses 1 and 2
        ("overlapping", 2, [1 + 1 / 3, 2 / 3 + 2 / 5, 3 / 5]),
        # one message has losses 1 and 2
        ("deep_supervision", None, [1 + 1 / 3 + 1 / 6, 2 / 3 + 2 / 6, 3 / 6]),
    ],
)
def test_shares_of_a_loss_are_dealt_out_among_the_blocks_it_trains(mode, window, expected):
    routes = make_routes(mode, 3, **({} if window is None else {"window": window}))
    found = [
        sum(
            share_of(routes, segment, which, PARTS)
            for which, one in enumerate(passes)
            if one.weights
        )
        for segment, passes in enumerate(routes.passes)
    ]
    assert found == pytest.approx(expected)


def test_a_pass_that_trains_nothing_hands_the_router_loss_of_its_loss_down():
    overlapping = make_routes("overlapping", 3, window=2)
    down, own = overlapping.passes[1]
    assert (down.weights, own.weights) == (False, True)
    assert share_of(overlapping, 1, 0, PARTS) == pytest.approx(2 / 3)
    through = make_routes("interlocking", 4, window=3)  # loss 2 trains segment 0 alone
    assert next(one.sends for one in through.passes[1]) == 2
    assert share_of(through, 1, 0, [0, 2, 3, 4, 6]) == 0
