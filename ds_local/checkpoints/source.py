"""A checkpoint of a run, read to make a Hugging Face model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ds_local.checkpoints.facts import FACTS, classes_of, read_facts
from ds_local.checkpoints.folder import latest_tag, locate
from ds_local.checkpoints.run_file import RUN_FILE, run_facts
from ds_local.checkpoints.sums import check_file
from ds_local.errors import ExportError, first_line
from ds_local.model import families
from ds_local.model.hf_layers import State, check_layer, to_hf
from ds_local.model.small_models import prefix
from ds_local.outputs.checkpoint_names import AVERAGE_FILE, AVERAGE_HEAD_FILE, HEAD_FILE, LAYER_FILE
from ds_local.replicas.cuts import scale_outputs


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
        ema: read the running averages of the weights instead of the weights.

    Raises:
        ExportError, CheckpointError: when there is none, or it is of another model.
    """

    def __init__(self, source: str | Path, ema: bool = False) -> None:
        self.folder, self._ema = find_checkpoint(source), ema
        self.facts = read_facts(self.folder)
        if self.facts["unit"] is not None:
            raise ExportError(
                f"{self.folder} is of unit {self.facts['unit']} alone; give the run folder of the "
                f"whole pipeline, {self.run.parent}"
            )
        try:
            self.parts: list[int] = list(self.facts["segment_parts"])
            fields = dict(self.facts["model"] or {})
            self._files = set(self.facts["files"])
        except (KeyError, TypeError) as error:
            raise ExportError(
                f"{self.folder}/ds_local.json lacks {error}: it was written by something else"
            ) from error
        if ema and AVERAGE_FILE.format(0) not in self._files:
            raise ExportError(
                f"{self.folder} holds no averages of weights; train with local_parallel.ema, or "
                "leave --ema out"
            )
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

        self.run_facts = sound_run_facts(self.run)
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
    def heads(self) -> list[int]:
        """Segments with an auxiliary head."""
        return [s for s in range(self.last_segment) if HEAD_FILE.format(s) in self._files]

    @property
    def exits(self) -> list[int]:
        """Segments that can be exported: those with a head for the whole vocabulary, and the
        last."""
        return [*([] if classes_of(self.facts) else self.heads), self.last_segment]

    @property
    def run(self) -> Path:
        """The run folder, where there is one."""
        return self.folder.resolve().parents[1]

    def layer(self, number: int) -> State:
        """The tensors of a pipeline layer, by their names in it."""
        name = (AVERAGE_FILE if self._ema else LAYER_FILE).format(number)
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
        if segment not in self.heads:
            raise ExportError(
                f"segment {segment} has no head in {self.folder}: its loss trains no segment in "
                f"this run; there are exits after the segments {', '.join(map(str, self.exits))}"
            )
        own = AVERAGE_HEAD_FILE.format(self.parts[segment + 1])
        return self._load(own if self._ema else HEAD_FILE.format(segment))

    def model(self, segment: int) -> tuple[PretrainedConfig, State]:
        """The blocks up to and including a segment's, with its exit, as a Hugging Face model:
        config and state dict."""
        if segment == self.last_segment:
            return self.config, to_hf(
                self.config, {n: self.layer(n) for n in range(families.num_blocks(self.config) + 2)}
            )
        head = self.head(segment)
        if classes := classes_of(self.facts):
            raise ExportError(
                f"the head of segment {segment} tells {classes} tokens apart and has one "
                "class for all others (head.vocabulary), so it is no language model; export the "
                "full model"
            )
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
    others = ("blocks.", "down.weight", "log_temperature", "readout.weight", "companion.")
    readout = {name: tensor for name, tensor in head.items() if not name.startswith(others)}
    if "readout.weight" in head:
        weight = head["readout.weight"].float()  # [V, D], or [V, rank]
        if "down.weight" in head:
            weight = weight @ head["down.weight"].float()
        if "log_temperature" in head:
            weight = weight * head["log_temperature"].float().exp()
        readout["readout.weight"] = weight.to(head["readout.weight"].dtype)
    layers[depth + len(layers)] = readout
    config = prefix(config, depth + len(layers) - 2)
    for number, tensors in layers.items():
        private = number <= config.num_hidden_layers
        check_layer(
            config, number, tensors, f"{where}, blocks.{number - depth}" if private else where
        )
    return config, layers


def sound_run_facts(run: Path) -> dict[str, Any]:
    """run.json of a run folder, {} when there is none.

    Raises:
        ExportError: when it is damaged.
    """
    facts, path = run_facts(run), run / RUN_FILE
    if not facts and path.exists():
        raise ExportError(f"{path} is damaged; move it away to export without it")
    return facts
