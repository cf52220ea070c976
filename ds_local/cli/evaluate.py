"""Validation loss, perplexity and bits per byte of a model and of each of its exits, by plain
transformers.

python scripts/evaluate.py runs/nano --data data/python-stdlib
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_local.cli.arguments import Parser, output_file, whole
from ds_local.cli.exits import add_model, exits_of
from ds_local.config import strict_json

if TYPE_CHECKING:
    from ds_local.data.dataset import TokenData


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="folder written by scripts/prepare_data.py; its validation split is used",
    )
    parser.add_argument(
        "--sequences",
        type=whole(1),
        help="validation sequences to use, evenly spaced; default all",
    )
    parser.add_argument("--batch-size", type=whole(1), default=16, help="sequences at a time")
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="also with data, or a tokenizer, that the model was not trained with",
    )
    parser.add_argument("--json", type=output_file('"bits_per_byte"'), help="file for the figures")
    args = parser.parse_args(arguments)

    found = evaluate_all(args)
    print("exit  blocks   parameters      loss  perplexity  bits per byte")
    for segment, row in found.items():
        print(
            f"{segment:>4}  {row['blocks']:>6}  {row['parameters']:>11,}  {row['loss']:>8.4f}  "
            f"{row['perplexity']:>10.2f}  {row['bits_per_byte']:>13.4f}"
        )
    for said in dict.fromkeys(row["data"] for row in found.values()):
        print(f"data: {said}")
    return 0


def evaluate_all(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Figures of every exit. Raises DataError, WeightsError, ExportError, ..."""
    from ds_local.data.dataset import TokenData, evenly_spaced
    from ds_local.outputs import write_file

    data = TokenData(args.data)
    indices = evenly_spaced(data.num_sequences("validation"), args.sequences)
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            segment: {
                "data": relation(folder, data, args.allow_other_data),
                **evaluate(folder, data, indices, args.batch_size),
            }
            for segment, folder in exits_of(args.model, scratch).items()
        }
    if args.json:
        write_file(args.json, strict_json.dumps(found, indent=1) + "\n")
    return found


def relation(folder: Path, data: TokenData, allowed: bool) -> str:
    """How the data is related to what the model was trained on.

    Raises:
        DataError: when it is other data, or made with another tokenizer, and that is not allowed.
    """
    from ds_local.checkpoints.hf_export import origin_of
    from ds_local.data.tokenizers import difference, has_tokenizer, load_tokenizer
    from ds_local.errors import DataError

    trained_on = origin_of(folder).get("data")
    if trained_on == data.facts["fingerprint"]:
        return "what the model was trained on, its validation split"
    other = ""
    if has_tokenizer(folder):
        other = difference(load_tokenizer(data.tokenizer_folder), load_tokenizer(folder))
    said = "not known to be what the model was trained on"
    if trained_on:
        own = data.facts["fingerprint"]
        said = (
            f"other than the model was trained on (fingerprint {trained_on[:12]}, not {own[:12]})"
        )
    if other:
        said += f", made with another tokenizer than the model's: {other}"
    if (trained_on or other) and not allowed:
        raise DataError(f"{data.folder} is {said}; add --allow-other-data to evaluate on it")
    return said


def evaluate(folder: Path, data: TokenData, indices: list[int], batch_size: int) -> dict[str, Any]:
    """Figures of one model. The loss is in nats per predicted token; bits per byte = loss / ln 2 x
    tokens / bytes of the text.

    Raises:
        DataError: when the model has too few tokens or positions for the data.
        WeightsError: when its weights are missing, damaged, of another model, or give no number.
    """
    import torch
    from torch.nn import functional as F

    from ds_local.checkpoints.metrics_file import perplexity
    from ds_local.data.dataset import micro_batch_of
    from ds_local.data.tokenizers import load_tokenizer
    from ds_local.errors import DataError, WeightsError
    from ds_local.model.heads import IGNORE
    from ds_local.model.pretrained import whole_model

    model = whole_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    positions = getattr(model.config, "max_position_embeddings", None) or data.seq_len
    if data.vocab_size > model.config.vocab_size or data.seq_len > positions:
        raise DataError(
            f"{data.folder} has sequences of {data.seq_len} from {data.vocab_size} tokens, but "
            f"{folder} takes at most {positions} from {model.config.vocab_size}"
        )
    tokenizer = load_tokenizer(data.tokenizer_folder)
    total, counted, num_bytes = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(indices), batch_size):
            ids_BT = data.sequences("validation", indices[start : start + batch_size])
            inputs, labels_BT = micro_batch_of(data, ids_BT, ids_BT)
            given = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
            given = {name: tensor.to(model.device) for name, tensor in given.items()}
            logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            targets = labels_BT[:, 1:].flatten().to(model.device)
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            counted += int((targets != IGNORE).sum())
            text = tokenizer.decode(ids_BT.flatten(), skip_special_tokens=True)
            num_bytes += len(text.encode())
    if not math.isfinite(total):
        raise WeightsError(
            f"{folder} gives a loss of {total}: its weights are not those of a model"
        )
    loss = total / max(1, counted)
    return {
        "blocks": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * len(indices) * data.seq_len / max(1, num_bytes),
        "sequences": len(indices),
    }
