"""Subnets of Hugging Face's modules add up to the whole; what does not go with them is refused."""

import pytest
import torch
from reference import MODELS

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError
from ds_local.replicas import subnets
from ds_local.replicas.cuts import CUTS, deal, take

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
