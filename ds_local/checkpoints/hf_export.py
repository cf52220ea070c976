"""Checkpoints -> ordinary Hugging Face folders. Plain state dicts in, plain state dicts out; no
DeepSpeed, no processes, no GPU.

The full stack, or any prefix of it with its segment's head, comes out as a model that
`from_pretrained` loads: private blocks of the head become the last blocks, its bottleneck and
temperature are multiplied into its readout. No file is unpickled beyond plain tensors, and a file
whose checksum is not that of the checkpoint is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from ds_local.checkpoints.facts import FACTS, read_facts
from ds_local.checkpoints.folder import HEAD_FILE, check_file, latest_tag, locate
from ds_local.checkpoints.metrics_file import MetricsFile
from ds_local.checkpoints.model_card import model_card
from ds_local.data.tokenizers import fingerprint, load_tokenizer, save_tokenizer
from ds_local.errors import DataError, ExportError, first_line
from ds_local.model import families
from ds_local.model.pretrained import HEADS_FILE
from ds_local.outputs import new_folder, read_list
from ds_local.replicas.cuts import scale_outputs

State = dict[str, Tensor]
KIND = "exported model"


def to_hf(config: PretrainedConfig, layers: Mapping[int, State]) -> State:
    """Pipeline layers -> the state dict of the Hugging Face model.

    Args:
        layers: layer number -> its state dict, all layers of the model.

    Raises:
        ExportError: when a tensor is missing, unknown or of the wrong shape.
    """
    state: State = {}
    for number in range(families.num_blocks(config) + 2):
        check_layer(config, number, layers.get(number, {}), f"layer {number}")
        state |= {
            name: layers[number][own] for own, name in families.tensor_names(config, number).items()
        }
    return state


def from_hf(config: PretrainedConfig, state: Mapping[str, Tensor]) -> dict[int, State]:
    """The inverse of `to_hf`. A tied readout is taken from the embedding.

    Raises:
        ExportError: when a tensor of the model is missing or of the wrong shape.
    """
    family = families.family_of(config)
    readout, tokens = f"{family.readout}.weight", f"{family.tokens}.weight"
    if readout not in state and tokens in state:
        state = {**state, readout: state[tokens]}
    layers: dict[int, State] = {}
    for number in range(families.num_blocks(config) + 2):
        names = families.tensor_names(config, number)
        layers[number] = {own: state[name] for own, name in names.items() if name in state}
        check_layer(config, number, layers[number], f"the model, layer {number}")
    return layers


def check_layer(
    config: PretrainedConfig, number: int, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raises ExportError when the tensors of pipeline layer `number` are not what the config says;
    `where` is for its message."""
    names, whole = families.tensor_names(config, number), families.skeleton(config).state_dict()
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


# --- reading a checkpoint -------------------------------------------------------------------------


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint folder meant by a run folder, its `checkpoints` folder, or a checkpoint folder
    itself.

    Raises:
        CheckpointError: when there is none.
    """
    folder = Path(folder)
    if (folder / FACTS).is_file():
        return folder
    if not folder.exists():  # a tag that is just being replaced is beside its place
        return locate(folder.parent, folder.name)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return locate(checkpoints, latest_tag(checkpoints))


class Checkpoint:
    """A checkpoint of a Hugging Face model, read file by file.

    Args:
        source: a run folder (its latest checkpoint) or a checkpoint folder.

    Raises:
        ExportError, CheckpointError: when there is none, or it is of another model.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = find_checkpoint(source)
        self.facts = read_facts(self.folder)
        try:
            self.parts: list[int] = list(self.facts["segment_parts"])
            fields = dict(self.facts["model"] or {})
            self._files = set(self.facts["files"])
        except (KeyError, TypeError) as error:
            raise ExportError(
                f"{self.folder}/ds_local.json lacks {error}: it was written by something else"
            ) from error
        if not fields:
            raise ExportError(
                f"{self.folder} is not of a Hugging Face model, so it has no folder form"
            )
        try:
            self.config = families.load_model_config(fields)
            layers = families.num_blocks(self.config) + 2
        except Exception as error:  # a foreign config can fail in many ways
            raise ExportError(
                f"{self.folder}/{FACTS}: no model has this config: {first_line(error)}"
            ) from error
        if self.parts[-1] != layers:
            raise ExportError(
                f"{self.folder}/{FACTS}: segments are cut at {self.parts}, the model has {layers} "
                "layers"
            )
        # stages cannot share a matrix, so the readout is one of its own
        self.config.tie_word_embeddings = False

        self.run_facts = _run_facts(self.run)
        data = self.run_facts.get("data")
        told = data if isinstance(data, dict) else {}
        self.origin = {
            "data": told.get("fingerprint"),
            "tokenizer": told.get("tokenizer_fingerprint"),
            "step": self.facts.get("step"),
        }

    @property
    def last_segment(self) -> int:
        return len(self.parts) - 2

    @property
    def exits(self) -> list[int]:
        """Segments that can be exported: those with a head, and the last."""
        return [s for s in range(self.last_segment) if HEAD_FILE.format(s) in self._files] + [
            self.last_segment
        ]

    @property
    def run(self) -> Path:
        """The run folder, where there is one."""
        return self.folder.resolve().parents[1]

    def layer(self, number: int) -> State:
        """The tensors of a pipeline layer, by their names in it."""
        name = f"layer_{number:02d}-model_states.pt"
        state = self._load(name)
        check_layer(self.config, number, state, str(self.folder / name))
        scale_outputs(self.config, {number: state}, self.facts)
        return state

    def head(self, segment: int) -> State:
        """The tensors of a segment's auxiliary head.

        Raises:
            ExportError: when the segment does not exist or has no head.
        """
        if not 0 <= segment < self.last_segment:
            raise ExportError(
                f"segment {segment} does not exist; the run has segments 0 to {self.last_segment}"
            )
        if segment not in self.exits:
            raise ExportError(
                f"segment {segment} has no head in {self.folder}: its loss trains no segment in "
                f"this run; there are exits after the segments {', '.join(map(str, self.exits))}"
            )
        return self._load(HEAD_FILE.format(segment))

    def model(self, segment: int) -> tuple[PretrainedConfig, State]:
        """The blocks up to and including a segment's, with its exit, as a Hugging Face model:
        config and state dict."""
        if segment == self.last_segment:
            return self.config, to_hf(
                self.config, {n: self.layer(n) for n in range(families.num_blocks(self.config) + 2)}
            )
        head = self.head(segment)
        depth = self.parts[segment + 1]
        config, layers = _prefix_with(
            self.config, depth, head, str(self.folder / HEAD_FILE.format(segment))
        )
        return config, to_hf(config, {n: self.layer(n) for n in range(depth)} | layers)

    def _load(self, name: str) -> State:
        path = self.folder / name
        check_file(self.folder, self.facts, name)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a foreign file can fail in many ways
            raise ExportError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        if not isinstance(state, dict) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise ExportError(f"{path} holds something else than tensors")
        wrecked = next((name for name, value in state.items() if not _is_finite(value)), None)
        if wrecked is not None:
            raise ExportError(
                f"{path}: tensor {wrecked} holds NaN or infinity; export an earlier checkpoint"
            )
        return state


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _prefix_with(
    config: PretrainedConfig, depth: int, head: State, where: str
) -> tuple[PretrainedConfig, dict[int, State]]:
    """A head as the last layers of a smaller model: that model's config, and those layers, the
    first being number `depth`."""
    layers: dict[int, State] = {}
    for name, tensor in head.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            layers.setdefault(depth + int(index), {})[rest] = tensor
    folded = ("blocks.", "down.weight", "log_temperature", "readout.weight")
    readout = {name: tensor for name, tensor in head.items() if not name.startswith(folded)}
    if "readout.weight" in head:
        weight = head["readout.weight"].float()  # [V, D], or [V, rank]
        if "down.weight" in head:
            weight = weight @ head["down.weight"].float()
        if "log_temperature" in head:
            weight = weight * head["log_temperature"].float().exp()
        readout["readout.weight"] = weight.to(head["readout.weight"].dtype)
    layers[depth + len(layers)] = readout
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth + len(layers) - 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    for number, tensors in layers.items():
        private = number <= config.num_hidden_layers
        check_layer(
            config, number, tensors, f"{where}, blocks.{number - depth}" if private else where
        )
    return config, layers


# --- writing a folder -----------------------------------------------------------------------------


def export(
    source: str | Path, output: str | Path, segment: int | None = None, heads: bool = False
) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        source: a run folder (its latest checkpoint) or a checkpoint folder.
        output: the folder to write; it appears complete or not at all, and replaces an earlier
            export that nobody changed.
        segment: write the prefix of blocks up to this segment with its auxiliary head instead of
            the full model.
        heads: put the auxiliary heads, as they are, into a second safetensors file beside the full
            model.

    Returns:
        `output`.

    Raises:
        ExportError, CheckpointError: naming the file or tensor that is wrong.
    """
    checkpoint = Checkpoint(source)
    with new_folder(output, KIND, ExportError, exact=True, about=checkpoint.origin) as new:
        _write(checkpoint, checkpoint.last_segment if segment is None else segment, new, heads)
    return Path(output)


def export_all(source: str | Path, output: str | Path, heads: bool = False) -> dict[int, Path]:
    """Write the model of every exit as `output/segment_I`; the last is the full model. Arguments
    and errors as for `export`."""
    checkpoint = Checkpoint(source)
    with new_folder(output, KIND, ExportError, exact=True, about=checkpoint.origin) as new:
        for segment in checkpoint.exits:
            _write(checkpoint, segment, new / f"segment_{segment}", heads)
    return {segment: Path(output, f"segment_{segment}") for segment in checkpoint.exits}


def _write(checkpoint: Checkpoint, segment: int, folder: Path, heads: bool) -> None:
    config, state = checkpoint.model(segment)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    )
    model.save_pretrained(
        folder, state_dict={name: tensor.contiguous() for name, tensor in state.items()}
    )
    _write_tokenizer(checkpoint, folder)
    if heads and segment == checkpoint.last_segment:
        named = (
            (s, name, tensor)
            for s in checkpoint.exits[:-1]
            for name, tensor in checkpoint.head(s).items()
        )
        tensors = {f"segment_{s}.{name}": tensor.contiguous() for s, name, tensor in named}
        if tensors:
            save_file(
                tensors,
                folder / HEADS_FILE,
                {"format": "pt", "segment_parts": json.dumps(checkpoint.parts)},
            )
    metrics = MetricsFile(checkpoint.run / "metrics.jsonl").read()
    size = sum(tensor.numel() for tensor in state.values())
    try:
        card = model_card(
            checkpoint.facts,
            checkpoint.run_facts,
            metrics,
            segment,
            families.num_blocks(config),
            size,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"{checkpoint.run}/run.json or metrics.jsonl is not what training wrote "
            f"({type(error).__name__}: {first_line(error)}); move it away to export without it"
        ) from error
    (folder / "README.md").write_text(card)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer of the data, so that it gives the same ids beside this model."""
    source, known = find_tokenizer(checkpoint.folder), checkpoint.origin["tokenizer"]
    if source is None:
        if checkpoint.run_facts:
            raise ExportError(
                f"{checkpoint.folder.parent / 'tokenizer'} is missing; copy it from the data folder"
            )
        return
    try:
        tokenizer = load_tokenizer(source)
    except DataError as error:
        raise ExportError(str(error)) from error
    if known and fingerprint(tokenizer) != known:
        raise ExportError(
            f"{source} is not the tokenizer that the run was trained with; copy it from the data "
            "folder"
        )
    save_tokenizer(tokenizer, folder, ExportError)


def find_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer folder that belongs to a checkpoint: in it, or in a folder above it."""
    for folder in (checkpoint, *list(checkpoint.resolve().parents)[:2]):
        if (folder / "tokenizer" / "tokenizer_config.json").is_file():
            return folder / "tokenizer"
    return None


def origin_of(model: str | Path) -> dict[str, Any]:
    """What an exported model, or a model in a folder of all exits, was trained on: fingerprints of
    "data" and "tokenizer", None where they are not known; {} for folders of others."""
    for folder in (Path(model), Path(model).resolve().parent):
        listed = read_list(folder)
        if listed is not None and listed["kind"] == KIND:
            return listed["about"]
    return {}


def _run_facts(run: Path) -> dict[str, Any]:
    """run.json of a run folder, {} when there is none."""
    path = run / "run.json"
    try:
        facts = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} is damaged ({first_line(error)}); move it away to export without it"
        ) from error
    if not isinstance(facts, dict):
        raise ExportError(f"{path} is not what training wrote; move it away to export without it")
    return facts
