"""Random numbers that depend on their key alone."""

import torch

from ds_local.model.seeds import seed_for, seeded


def test_a_seed_is_of_its_key():
    assert seed_for("dropout", 3, 1) == seed_for("dropout", 3, 1)
    keys = [(1,), ("1",), (1, 2), (12,), (2, 1), ("a", "b"), ("ab",)]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_for(*key) < 2**63 for key in keys)


def test_what_was_drawn_before_does_not_count_and_goes_on_after():
    torch.manual_seed(0)
    undisturbed = torch.rand(4)
    torch.manual_seed(0)
    before = torch.rand(2)
    drawn = []
    for _ in range(2):
        with seeded("layer", 5):
            drawn.append(torch.rand(3))
    after = torch.rand(2)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.cat([before, after]), undisturbed)
    with seeded("layer", 6):
        assert not torch.equal(torch.rand(3), drawn[0])
