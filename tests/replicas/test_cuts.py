"""Dealing out a model's blocks: the deal, the slices, and models that cannot be dealt out."""

import pytest
import torch
from reference import MODELS

from ds_local.config.sections import ReplicasConfig
from ds_local.errors import ConfigError
from ds_local.model import families
from ds_local.replicas.cuts import check_cut, deal, put, scale_outputs, take


@pytest.mark.parametrize("units", [4, 8, 48])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_deal_is_disjoint_complete_and_equal_in_shares(units, replicas):
    for seed, round_, layer, kind in [
        (0, 0, 1, "mlp"),
        (1234, 7, 3, "attention_heads"),
        (5, 10_000, 12, "mlp"),
    ]:
        shares = deal(seed, round_, layer, kind, units, replicas)
        assert [len(share) for share in shares] == [units // replicas] * replicas
        assert torch.cat(shares).sort().values.tolist() == list(range(units))
        assert all(share.tolist() == sorted(share.tolist()) for share in shares)
        again = deal(seed, round_, layer, kind, units, replicas)
        assert all(torch.equal(a, b) for a, b in zip(shares, again, strict=True))


def test_deals_differ_between_rounds_layers_kinds_and_seeds():
    keys = [
        (s, r, layer, kind)
        for s in (1, 2)
        for r in range(5)
        for layer in range(1, 5)
        for kind in ("mlp", "attention_heads")
    ]
    dealt = {tuple(deal(*key, 48, 2)[0].tolist()) for key in keys}
    assert len(dealt) == len(keys)


def test_every_unit_visits_every_replica():
    seen = torch.zeros(2, 8, dtype=torch.int64)
    for round_ in range(40):
        for replica, share in enumerate(deal(1234, round_, 1, "mlp", 8, 2)):
            seen[replica, share] += 1
    assert (seen > 8).all()  # 20 on average; below 9 has a chance of 1 in 6000 for each


def test_a_slice_by_hand():
    # query, key and value of three heads of width 2, as columns: q0 q0 q1 q1 q2 q2 k0 ...
    weight = torch.arange(18.0).expand(2, 18)
    share = take(weight, 1, 3, torch.arange(3), torch.tensor([0, 2]))
    assert share[0].tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    smaller = take(share, 1, 3, torch.tensor([0, 2]), torch.tensor([2]))
    assert smaller[0].tolist() == [4, 5, 10, 11, 16, 17]
    empty = torch.zeros(2, 6)
    put(empty, 1, 3, torch.tensor([2]), torch.tensor([2]), smaller)
    assert torch.equal(empty, smaller)


def test_models_that_cannot_be_dealt_out():
    settings = ReplicasConfig(sync="subnets")
    config = families.load_model_config(MODELS["llama"])
    check_cut(config, settings, 2)
    with pytest.raises(
        ConfigError, match=r"4 replicas cannot share the 2 attention heads \(key-value groups\)"
    ):
        check_cut(config, settings, 4)
    check_cut(config, ReplicasConfig(sync="subnets", partition=["mlp"]), 4)
    with pytest.raises(ConfigError, match="5 replicas cannot share the 48 MLP hidden units"):
        check_cut(config, ReplicasConfig(sync="subnets", partition=["mlp"]), 5)
    with pytest.raises(ConfigError, match="use one of these, or sync 'periodic'"):
        check_cut(None, settings, 2)
    check_cut(None, ReplicasConfig(), 2)


def test_the_merged_factor_goes_into_exported_weights():
    config = families.load_model_config(MODELS["gpt2"])
    names = [
        "block.attn.c_proj.weight",
        "block.attn.c_proj.bias",
        "block.mlp.c_proj.weight",
        "block.mlp.c_fc.weight",
    ]
    state = {1: {name: torch.ones(2) for name in names}, 5: {"readout.weight": torch.ones(2)}}
    facts = {
        "num_replicas": 4,
        "local_parallel": {"replicas": ReplicasConfig(sync="subnets", scale="eval").model_dump()},
    }
    scale_outputs(config, state, facts)
    assert [state[1][name][0].item() for name in names] == [0.25, 1.0, 0.25, 1.0]
    assert state[5]["readout.weight"][0] == 1.0
    facts["local_parallel"]["replicas"]["scale"] = "train"
    scale_outputs(config, state, facts)
    assert state[1][names[0]][0] == 0.25
