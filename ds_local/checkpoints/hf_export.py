"""Checkpoints -> ordinary Hugging Face folders. Plain state dicts in, plain state dicts out; no
DeepSpeed, no processes, no GPU.

The full stack, or any prefix of it with its segment's head, comes out as a model that
`from_pretrained` loads: private blocks of the head become the last blocks, its bottleneck and
temperature are multiplied into its readout. No file is unpickled beyond plain tensors, and a file
whose checksum is not that of the checkpoint is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from ds_local.checkpoints.gathering import whole_run
from ds_local.checkpoints.metrics_file import METRICS_FILE, MetricsFile
from ds_local.checkpoints.model_card import model_card
from ds_local.checkpoints.source import Checkpoint
from ds_local.data.tokenizers import fingerprint, load_tokenizer, save_tokenizer
from ds_local.errors import DataError, ExportError, first_line
from ds_local.model import families
from ds_local.model.pretrained import HEADS_FILE
from ds_local.outputs import new_folder, read_list

KIND = "exported model"


def export(
    source: str | Path,
    output: str | Path,
    segment: int | None = None,
    heads: bool = False,
    ema: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        source: a run folder (its latest checkpoint, or the newest that all its units have) or a
            checkpoint folder.
        output: the folder to write; it appears complete or not at all, and replaces an earlier
            export that nobody changed.
        segment: write the prefix of blocks up to this segment with its auxiliary head instead of
            the full model.
        heads: put the auxiliary heads, as they are, into a second safetensors file beside the full
            model.
        ema: the running averages of the weights, which a run keeps with "ema", instead of them.

    Returns:
        `output`.

    Raises:
        ExportError, CheckpointError: naming the file or tensor that is wrong.
    """
    with whole_run(source) as whole:
        checkpoint = Checkpoint(whole, ema)
        with new_folder(output, KIND, ExportError, exact=True, about=checkpoint.origin) as new:
            _write(checkpoint, checkpoint.last_segment if segment is None else segment, new, heads)
    return Path(output)


def export_all(
    source: str | Path, output: str | Path, heads: bool = False, ema: bool = False
) -> dict[int, Path]:
    """Write the model of every exit as `output/segment_I`; the last is the full model. Arguments
    and errors as for `export`."""
    with whole_run(source) as whole:
        checkpoint = Checkpoint(whole, ema)
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
            for s in checkpoint.heads
            for name, tensor in checkpoint.head(s).items()
        )
        tensors = {f"segment_{s}.{name}": tensor.contiguous() for s, name, tensor in named}
        if tensors:
            save_file(
                tensors,
                folder / HEADS_FILE,
                {"format": "pt", "segment_parts": json.dumps(checkpoint.parts)},
            )
    metrics = MetricsFile(checkpoint.run / METRICS_FILE).read()
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
