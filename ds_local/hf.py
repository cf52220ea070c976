"""Checkpoints -> ordinary Hugging Face folders. Plain state dicts in, plain state dicts out; no DeepSpeed, no processes, no GPU.

The full stack, or any prefix of it with its segment's head, comes out as a model that `from_pretrained` loads.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ds_local import blocks
from ds_local.checkpoint import latest_tag, read_facts
from ds_local.subnets import scale_outputs

State = dict[str, Tensor]


class ExportError(ValueError):
    """A checkpoint that cannot be turned into a model; the message names the file or tensor."""


def to_hf(config: PretrainedConfig, layers: Mapping[int, State]) -> State:
    """Pipeline layers -> the state dict of the Hugging Face model.

    Args:
        layers: layer number -> its state dict, all layers of the model.

    Raises:
        ExportError: when a tensor is missing, unknown or of the wrong shape.
    """
    state: State = {}
    for number, tensors in layers.items():
        names = blocks.hf_names(config, number)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part not in names:
                raise ExportError(f"layer {number} has an unknown tensor {name!r}")
            state[f"{names[part]}.{rest}"] = tensor
    _check_against(config, state)
    return state


def from_hf(config: PretrainedConfig, state: Mapping[str, Tensor]) -> dict[int, State]:
    """The inverse of `to_hf`. A tied readout is taken from the embedding.

    Raises:
        ExportError: when a tensor of the model is missing.
    """
    family = blocks.family_of(config)
    state = dict(state)
    readout, tokens = f"{family.readout}.weight", f"{family.tokens}.weight"
    if readout not in state and tokens in state:
        state[readout] = state[tokens]
    expected = blocks.skeleton(config).state_dict()
    layers: dict[int, State] = {}
    for number in range(blocks.num_blocks(config) + 2):
        layers[number] = {}
        for part, prefix in blocks.hf_names(config, number).items():
            for name in expected:
                if name.startswith(prefix + "."):
                    if name not in state:
                        raise ExportError(f"the model has no tensor {name!r}")
                    layers[number][part + name.removeprefix(prefix)] = state[name]
    return layers


def _check_against(config: PretrainedConfig, state: State) -> None:
    expected = {name: tuple(t.shape) for name, t in blocks.skeleton(config).state_dict().items()}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        raise ExportError(f"tensors missing: {sorted(missing)[:3]}, unknown: {sorted(unknown)[:3]}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise ExportError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model needs {expected[name]}")


# --- reading a checkpoint -------------------------------------------------------------------------------------------------


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint folder meant by a run folder, its `checkpoints` folder, or a checkpoint folder itself.

    Raises:
        CheckpointError: when there is none.
    """
    folder = Path(folder)
    if (folder / "ds_local.json").is_file():
        return folder
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return checkpoints / latest_tag(checkpoints)


def _load(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in many ways
        raise ExportError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ExportError(f"{path} holds something else than tensors")
    return state


def model_config(facts: Mapping[str, Any], checkpoint: Path) -> PretrainedConfig:
    if not facts.get("model"):
        raise ExportError(f"{checkpoint} is not of a Hugging Face model, so it has no folder form")
    return blocks.load_model_config(dict(facts["model"]))


# --- writing a folder -----------------------------------------------------------------------------------------------------


def export(source: str | Path, output: str | Path, segment: int | None = None) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        source: a run folder (its latest checkpoint) or a checkpoint folder.
        output: the folder to write; it appears complete or not at all.
        segment: write the prefix of blocks up to this segment with its auxiliary head instead of the full model.

    Returns:
        `output`.

    Raises:
        ExportError, CheckpointError: naming the file or tensor that is wrong.
    """
    checkpoint = find_checkpoint(source)
    facts = read_facts(checkpoint)
    config = model_config(facts, checkpoint)
    last = len(facts["segment_parts"]) - 2
    if segment is not None and not 0 <= segment <= last:
        raise ExportError(f"segment {segment} does not exist; the run has segments 0 to {last}")
    whole = segment in (None, last)
    num_layers = blocks.num_blocks(config) + 1 if whole else facts["segment_parts"][(segment or 0) + 1]
    layers = {number: _load(checkpoint / f"layer_{number:02d}-model_states.pt") for number in range(num_layers)}
    if whole:
        layers[num_layers] = _load(checkpoint / f"layer_{num_layers:02d}-model_states.pt")
    else:
        config = _prefix_config(config, num_layers - 1)
        layers[num_layers] = _head_as_readout(checkpoint, segment or 0)
    scale_outputs(config, layers, facts)
    config.tie_word_embeddings = False  # stages cannot share a matrix, so the readout is one of its own
    _write(config, to_hf(config, layers), checkpoint, Path(output))
    return Path(output)


def _prefix_config(config: PretrainedConfig, num_blocks: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    return config


def _head_as_readout(checkpoint: Path, segment: int) -> State:
    path = checkpoint / f"head_{segment:02d}-model_states.pt"
    if not path.is_file():
        raise ExportError(f"segment {segment} has no head ({path} does not exist): its loss trains no segment in this run")
    return _load(path)


def _write(config: PretrainedConfig, state: State, checkpoint: Path, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        new = Path(scratch, "new")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(new, state_dict={name: tensor.contiguous() for name, tensor in state.items()})
        tokenizer = find_tokenizer(checkpoint)
        if tokenizer is not None:
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(new)
        if output.exists():
            shutil.rmtree(output)
        new.rename(output)


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer folder that belongs to a checkpoint: in it, or in a folder above it."""
    for folder in (checkpoint, *list(checkpoint.resolve().parents)[:2]):
        if (folder / "tokenizer" / "tokenizer_config.json").is_file():
            return folder / "tokenizer"
    return None


def run_facts(run: str | Path) -> dict[str, Any]:
    """run.json of a run folder, {} when there is none."""
    path = Path(run, "run.json")
    return json.loads(path.read_text()) if path.is_file() else {}
