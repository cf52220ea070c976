"""A small random model of every supported family, in the variants that differ in the code they run:
grouped-query attention, sliding windows on all or some layers, rotary variants, biases, tied and
untied, parallel and sequential residuals."""

from __future__ import annotations

from typing import Any

_COMMON = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_GPT2 = _COMMON | {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_ROTARY = _COMMON | {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}


_DRY = {"dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _rope(**parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


VARIANTS: dict[str, dict] = {
    "gpt2": _GPT2 | {"tie_word_embeddings": True},
    "gpt2 untied, scaled by layer": _GPT2
    | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    "llama": _ROTARY | {"model_type": "llama"},
    "llama tied, with biases": _ROTARY
    | {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama 3 rotary": _ROTARY
    | {"model_type": "llama"}
    | _rope(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    "llama yarn rotary": _ROTARY
    | {"model_type": "llama"}
    | _rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=8),
    "llama linear rotary": _ROTARY
    | {"model_type": "llama"}
    | _rope(rope_type="linear", factor=2.0),
    "mistral": _ROTARY | {"model_type": "mistral", "sliding_window": None},
    "mistral sliding": _ROTARY | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": _ROTARY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 half sliding": _ROTARY
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": _ROTARY | {"model_type": "qwen3", "head_dim": 16},
    "qwen3 half sliding, tied": _ROTARY
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {**_ROTARY, "model_type": "gpt_neox"},
    "gpt_neox sequential, no biases": _ROTARY
    | {"model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False}
    | _rope(rope_type="default", partial_rotary_factor=1.0),
    "olmo": _ROTARY | {"model_type": "olmo", "clip_qkv": 0.5},
    "olmo2": _ROTARY | {"model_type": "olmo2"},
    "phi, a readout with a bias": _ROTARY | {"model_type": "phi"} | _DRY,
    "gemma2, capped, every second sliding": _ROTARY
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 5,
        "final_logit_softcapping": 1.0,
        "attn_logit_softcapping": 1.0,
        "tie_word_embeddings": True,
    },
    "granite, with factors": _ROTARY
    | {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.2,
        "attention_multiplier": 0.1,
        "logits_scaling": 8.0,
    },
    "gptj, positions kept in its blocks": _GPT2 | {"model_type": "gptj", "rotary_dim": 4},
}

# experts: a state besides the hidden one, so not among the variants
MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "sliding_window": None,
}


def layers_of(config: Any, seed: int = 0) -> list[Any]:
    from ds_local.model import blocks, families

    depth = families.num_blocks(config)
    return [
        blocks.Embedding(config, seed),
        *(blocks.Block(config, i, seed) for i in range(depth)),
        blocks.Readout(config, seed),
    ]


def run(layers: list[Any], ids: Any) -> Any:
    hidden = ids
    for layer in layers:
        hidden = layer.eval()(hidden)
    return hidden


def check_no_look_into_the_future(config: Any, ids: Any) -> None:
    """Changing a token changes no logits before it, and those from it on."""
    import torch

    layers = layers_of(config)
    with torch.no_grad():
        before = run(layers, ids)
        for position in (1, 7, 15):
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 1) % 64
            after = run(layers, changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
            assert not torch.allclose(after[:, position:], before[:, position:])
            assert not torch.allclose(after[:, position], before[:, position])
