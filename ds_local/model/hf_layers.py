"""Pipeline layers and the state dict of a Hugging Face model, made of each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PretrainedConfig

from ds_local.errors import ExportError
from ds_local.model.anatomy import family_of, num_blocks, skeleton, tensor_names

State = dict[str, Tensor]


def to_hf(config: PretrainedConfig, layers: Mapping[int, State]) -> State:
    """Pipeline layers -> the state dict of the Hugging Face model.

    Args:
        layers: layer number -> its state dict, all layers of the model.

    Raises:
        ExportError: when a tensor is missing, unknown or of the wrong shape.
    """
    state: State = {}
    for number in range(num_blocks(config) + 2):
        check_layer(config, number, layers.get(number, {}), f"layer {number}")
        state |= {name: layers[number][own] for own, name in tensor_names(config, number).items()}
    return state


def from_hf(config: PretrainedConfig, state: Mapping[str, Tensor]) -> dict[int, State]:
    """The inverse of `to_hf`. A tied readout is taken from the embedding.

    Raises:
        ExportError: when a tensor of the model is missing or of the wrong shape.
    """
    family = family_of(config)
    readout, tokens = f"{family.readout}.weight", f"{family.tokens}.weight"
    if readout not in state and tokens in state:
        state = {**state, readout: state[tokens]}
    layers: dict[int, State] = {}
    for number in range(num_blocks(config) + 2):
        names = tensor_names(config, number)
        layers[number] = {own: state[name] for own, name in names.items() if name in state}
        check_layer(config, number, layers[number], f"the model, layer {number}")
    return layers


def check_layer(
    config: PretrainedConfig, number: int, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raises ExportError when the tensors of pipeline layer `number` are not what the config says;
    `where` is for its message."""
    names, whole = tensor_names(config, number), skeleton(config).state_dict()
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        raise ExportError(
            f"{where}: tensors missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'}"
        )
    for name, tensor in tensors.items():
        wanted = whole[names[name]].shape
        if tensor.shape != wanted:
            raise ExportError(
                f"{where}: tensor {name} has shape {list(tensor.shape)}, the model needs "
                f"{list(wanted)}"
            )
