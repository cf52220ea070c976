"""The model card of an exported model: what it is, how it was trained, what came of it. Text from
facts, nothing else.

No torch, no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_local.checkpoints.facts import classes_of
from ds_local.checkpoints.metrics_file import perplexity
from ds_local.config.deepspeed import precision_of
from ds_local.errors import counted


def model_card(
    checkpoint: Mapping[str, Any],
    run: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    segment: int,
    num_blocks: int,
    num_parameters: int,
) -> str:
    """README.md of a model folder, in the form the Hugging Face hub reads.

    Args:
        checkpoint: its ds_local.json.
        run: run.json, {} when there is none.
        metrics: rows of metrics.jsonl.
        segment: the exit that was exported.
        num_blocks, num_parameters: of the exported model.
    """
    name = checkpoint["model"]["model_type"]
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {name}",
        "- ds_local",
        "---",
    ]
    body = [
        "",
        f"# {name}, {num_blocks} blocks, {num_parameters:,} parameters",
        "",
        f"Trained with ds_local for {checkpoint['step']:,} optimizer steps. "
        f"{_what(checkpoint, segment, num_blocks)}",
        "The readout is a matrix of its own (`tie_word_embeddings` is false).",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), '
        'AutoTokenizer.from_pretrained(".")',
        "```",
    ]
    sections = {
        "Losses": _losses(checkpoint, metrics, segment),
        "Training": _training(checkpoint, run),
        "Data": _data(run),
        "Versions": [
            f"- {package} {version}" for package, version in run.get("versions", {}).items()
        ],
    }
    for title, lines in sections.items():
        if lines:
            body += ["", f"## {title}", "", *lines]
    return "\n".join(front + body) + "\n"


def _what(checkpoint: Mapping[str, Any], segment: int, num_blocks: int) -> str:
    parts = checkpoint["segment_parts"]
    if segment == len(parts) - 2:
        return f"It is the full model, trained as {len(parts) - 1} segments."
    head = checkpoint.get("local_parallel", {}).get("head", {})
    own = parts[segment + 1] - 1  # blocks of the larger model
    made = "norm and readout are those of the segment's auxiliary head"
    if num_blocks > own:
        made += f", whose {num_blocks - own} private blocks follow as the last ones"
    factors = [f"a bottleneck of width {head.get('rank')}"] * bool(head.get("rank"))
    factors += ["a learned factor on the logits"] * bool(head.get("temperature"))
    if factors:
        made += f"; the readout is multiplied out with {' and '.join(factors)}"
    return (
        f"It is the first {own} blocks (up to segment {segment} of {len(parts) - 1}) of a larger "
        f"model; {made}."
    )


def _losses(
    checkpoint: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], segment: int
) -> list[str]:
    """The last validation of every exit up to the checkpoint's step."""
    rows = [
        row
        for row in metrics
        if row["split"] == "validation"
        and row["step"] <= checkpoint["step"]
        and row["loss"] is not None
    ]
    top = len(checkpoint["segment_parts"]) - 2  # there may have been more before
    last = {row["segment"]: row for row in rows if row["segment"] <= top}
    if not last:
        return []
    table = [
        f"| {'**' if s == segment else ''}{s}{' (this model)**' if s == segment else ''} | "
        f"{row['step']} | {row['loss']:.4f} | {perplexity(row['loss']):.2f} |"
        for s, row in sorted(last.items())
    ]
    header = [
        "| exit after segment | step | validation loss (nats per token) | perplexity |",
        "| --- | --- | --- | --- |",
    ]
    if classes := classes_of(checkpoint):
        told = f"Exits before the last tell {classes:,} tokens apart and have one class for all "
        table += ["", f"{told}others: their losses are lower for that."]
    return [*header, *table]


def _training(checkpoint: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    config = run.get("config", {})
    scheme = config.get("local_parallel", checkpoint.get("local_parallel", {}))
    lines = [f"- scheme: `{json.dumps(scheme)}`"]
    for key in ("optimizer", "scheduler"):
        if key in config:
            lines.append(
                f"- {key}: {config[key]['type']} `{json.dumps(config[key].get('params', {}))}`"
            )
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        if key in config:
            lines.append(f"- {key}: {config[key]}")
    lines.append(f"- precision: {precision_of(config)}")
    lines.append(
        f"- layout: {counted(checkpoint['num_stages'], 'stage')}, "
        f"{counted(checkpoint['num_replicas'], 'replica')}, "
        f"segments cut at layers {checkpoint['segment_parts']}"
    )
    if run.get("weights"):
        lines.append(f"- started from the weights of {run['weights']}")
    return lines


def _data(run: Mapping[str, Any]) -> list[str]:
    data = run.get("data", {})
    if not data:
        return []
    sources = [
        source if source.startswith("hub:") else Path(source).name
        for source in data.get("sources", [])
    ]
    tokenizer = str(data["tokenizer"])
    return [
        f"- sources: {', '.join(sources)}",
        f"- tokenizer: {tokenizer if ':' in tokenizer else Path(tokenizer).name}, "
        f"{data['vocab_size']:,} tokens",
        f"- {data['tokens']:,} tokens in sequences of {data['seq_len']}",
        f"- fingerprint: {data['fingerprint']}",
    ]
