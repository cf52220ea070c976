"""The start check: does a model of this config, cut into layers, compute what it computes whole?

It is tried on a small model of the user's own config with random weights. What does not pass is
refused, so that no run trains another model than it exports.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ds_local.errors import UnsupportedModel
from ds_local.model import anatomy
from ds_local.model.blocks import Block, Context, Embedding, Readout
from ds_local.model.config_file import last_line
from ds_local.model.hf_layers import State, from_hf, to_hf
from ds_local.model.routers import routers_of, without_logits
from ds_local.model.seeds import seeded
from ds_local.model.small_models import NoPrefix, prefix, shrunk
from ds_local.model.state import HIDDEN

_SEQUENCES, _TOKENS = 2, 12  # more tokens than a small model's windows are long


def check_family(config: PretrainedConfig) -> None:
    """Compare the cut model with the whole one.

    Raises:
        UnsupportedModel: saying what differs.
    """
    with seeded(0, "family check"):
        small = shrunk(config, tried)
        try:
            reason = fault_of(small)
        except Exception as error:  # of the library's code: a layer that does not run by itself
            raise UnsupportedModel(f"its layers fail one by one: {last_line(error)}") from error
    if reason is not None:
        raise UnsupportedModel(reason)


def tried(config: PretrainedConfig) -> tuple[Any, Tensor, Tensor]:
    """(the whole model of a small config with random weights, ids, its logits)."""
    return _tried(anatomy.config_json(config))


@functools.lru_cache(maxsize=2)
def _tried(config_json: str) -> tuple[Any, Tensor, Tensor]:
    config = anatomy.config_of(config_json)
    with seeded(0, "small model"), torch.no_grad():
        whole = random_model(config)
        length = min(_TOKENS, anatomy.num_positions(config))
        ids = torch.randint(0, config.vocab_size, (_SEQUENCES, length))
        return whole, ids, _logits(whole, ids)


def fault_of(config: PretrainedConfig) -> str | None:
    """What is wrong with the layers of a small model; None: nothing."""
    return _fault_of(anatomy.config_json(config))


@functools.lru_cache(maxsize=64)
def _fault_of(config_json: str) -> str | None:
    whole, ids, expected = _tried(config_json)
    config = whole.config
    layers = layers_of(whole)
    with torch.no_grad():
        if not expected.isfinite().all():
            return "its logits are not finite"
        found, router_loss = _run(layers, config, ids)
        if not _close(found, expected):
            return "its logits are not those of its layers one after the other"
        if (fault := _router_fault(whole, config, ids, router_loss)) is not None:
            return fault
        middle = ids.shape[1] // 2
        changed = ids.clone()
        changed[:, middle] = (changed[:, middle] + 1) % config.vocab_size
        if not _close(_logits(whole, changed)[:, :middle], expected[:, :middle]):
            return "its logits depend on later tokens"
        return _prefix_fault(config, layers, ids)


def _prefix_fault(config: PretrainedConfig, layers: list[nn.Module], ids: Tensor) -> str | None:
    """Of models of the first blocks, as exports are."""
    depth = anatomy.num_blocks(config)
    for shorter in {1, depth - 1} - {0, depth}:
        try:
            first = prefix(config, shorter)
        except NoPrefix:  # where a run is cut is looked at again
            continue
        model = AutoModelForCausalLM.from_config(first).eval()
        parts = [*layers[: shorter + 1], layers[-1]]
        model.load_state_dict(state_of(first, parts))
        if not _close(_run(parts, config, ids)[0], _logits(model, ids)):
            return f"its first {shorter} blocks give other logits in a model by themselves"
    return None


def random_model(config: PretrainedConfig) -> Any:
    """A whole model in evaluation mode with weights far from their initial values, norms too."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def layers_of(whole: Any) -> list[nn.Module]:
    """Pipeline layers with the weights of a whole model."""
    config, states = whole.config, from_hf(whole.config, whole.state_dict())
    layers: list[nn.Module] = [
        Embedding(config, 0),
        *(Block(config, index, 0) for index in range(anatomy.num_blocks(config))),
        Readout(config, 0),
    ]
    for layer, state in zip(layers, states.values(), strict=True):
        if isinstance(layer, Block):
            layer.context = Context(config)  # as on a stage of its own
        layer.load_state_dict(state)
    return [layer.eval() for layer in layers]


def state_of(config: PretrainedConfig, layers: Sequence[nn.Module]) -> State:
    """The state dict of the whole model that layers make."""
    return to_hf(config, {number: layer.state_dict() for number, layer in enumerate(layers)})


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _run(
    layers: Sequence[nn.Module], config: PretrainedConfig, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(logits, router loss); other ids first, so that nothing is kept of these."""
    for inputs in (ids.flip(0, 1), ids):
        state: Any = inputs
        for layer in layers[:-1]:
            state = layer(state)
        state, router_loss = without_logits(state, routers_of(config))
    hidden = state[HIDDEN] if isinstance(state, dict) else state
    return layers[-1](hidden), router_loss


def _close(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding: a wrong computation is off by far more, with random weights."""
    if found.shape != expected.shape or not expected.numel():
        return found.shape == expected.shape
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _router_fault(
    whole: Any, config: PretrainedConfig, ids: Tensor, router_loss: Tensor | None
) -> str | None:
    routers = routers_of(config)
    if routers is None:
        return None
    theirs = whole(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
    if router_loss is None or not torch.allclose(router_loss, theirs, rtol=1e-4):
        return f"its router loss is {theirs}, that of its layers {router_loss}"
    return None
