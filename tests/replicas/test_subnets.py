"""Dealing out a model's blocks: the deal, the cut, and what is refused."""

import pytest
import torch
from reference import MODELS

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.files import local_parallel
from ds_local.config.sections import ReplicasConfig
from ds_local.errors import ConfigError
from ds_local.model import families
from ds_local.replicas import subnets
from ds_local.replicas.cuts import CUTS, check_cut, deal, put, scale_outputs, take

NEOX = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_dropout": 0.0,
}


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


def hf_block(model):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).eval()
    block = {"gpt2": "transformer.h.0", "llama": "model.layers.0", "gpt_neox": "gpt_neox.layers.0"}[
        model["model_type"]
    ]
    block = whole.get_submodule(block)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return config, whole, block


@pytest.mark.parametrize("kind", ["attention_heads", "mlp"])
@pytest.mark.parametrize(
    "model",
    [
        MODELS["gpt2"],
        MODELS["llama"],
        {**MODELS["llama"], "attention_bias": True, "mlp_bias": True},
        NEOX,
    ],
    ids=["gpt2", "llama with grouped queries", "llama with biases", "gpt_neox"],
)
def test_shares_of_hugging_faces_modules_add_up_to_the_whole(model, kind):
    """Each share runs in Hugging Face's own module on smaller weights; but for the shared output
    bias their outputs add up."""
    config, whole, block = hf_block(model)
    cut = CUTS[config.model_type][kind]
    units = cut.units(config)
    outputs = []
    module = block.get_submodule(
        cut.output.split(".")[0]
    )  # in the first block its input is the same every time
    module.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    parameters = dict(block.named_parameters())
    full = {name: parameters[name].data for name in cut.parameters if name in parameters}
    sizes = {path: subnets._attribute(block, path) for path in cut.sizes}
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        whole(input_ids=ids)
        for share in deal(0, 0, 1, kind, units, 2):
            for name, tensor in full.items():
                parameters[name].data = take(
                    tensor, *cut.parameters[name], torch.arange(units), share
                )
                assert parameters[name].numel() == tensor.numel() // 2
            for path, size in sizes.items():
                owner, _, name = path.rpartition(".")
                setattr(block.get_submodule(owner), name, size // 2)
            whole(input_ids=ids)
    bias = block.get_submodule(cut.output).bias
    complete, first, second = outputs
    torch.testing.assert_close(
        first + second - (0 if bias is None else bias), complete, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(first, second)


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


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        ({"sync": "subnet"}, "local_parallel.replicas.sync"),
        ({"snyc": "subnets"}, "did you mean 'sync'?"),
        ({"sync": "subnets", "every": 0}, "local_parallel.replicas.every"),
        ({"every": 5}, "every means nothing with sync 'gradients'"),
        (
            {"sync": "periodic", "scale": "train"},
            "scale means nothing with sync 'periodic'; remove it, or set sync to subnets",
        ),
        ({"sync": "subnets", "outer_lr": 1}, "outer_lr means nothing with sync 'subnets'"),
        ({"sync": "subnets", "partition": []}, "partition must name"),
        ({"sync": "subnets", "partition": ["mlp", "mlp"]}, "partition must name"),
        ({"sync": "periodic", "outer_momentum": 1.0}, "local_parallel.replicas.outer_momentum"),
    ],
)
def test_mistakes_in_the_replicas_section(replicas, words):
    with pytest.raises(ConfigError) as error:
        local_parallel({"local_parallel": {"replicas": replicas}})
    assert words in str(error.value)


def test_heads_that_follow_whole_blocks_are_refused():
    with pytest.raises(ConfigError, match="use 'next' or 'new'"):
        local_parallel(
            {
                "local_parallel": {
                    "replicas": {"sync": "subnets"},
                    "head": {"blocks": 1, "blocks_from": "next_tracked"},
                }
            }
        )


@pytest.mark.parametrize(
    "sharded", [{"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}]
)
@pytest.mark.parametrize("sync", ["subnets", "periodic"])
def test_optimizers_that_shard_over_replicas_are_refused(sharded, sync):
    with pytest.raises(
        ConfigError, match="shard their state over the very replicas that train apart"
    ):
        check_deepspeed({**sharded, "local_parallel": {"replicas": {"sync": sync}}})


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
