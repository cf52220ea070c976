"""Validation loss, perplexity and bits per byte of a model and of each of its exits, by plain
transformers.

python scripts/evaluate.py runs/nano --data data/python
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import exits_of


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        help="a Hugging Face folder or name, a folder of all exits, a run folder or a checkpoint folder",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="folder written by scripts/prepare_data.py; its validation split is used",
    )
    parser.add_argument("--sequences", type=int, help="validation sequences to use; default all")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at a time")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found = {
                segment: evaluate(folder, args)
                for segment, folder in exits_of(args.model, scratch).items()
            }
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print("exit  blocks   parameters      loss  perplexity  bits per byte")
    for segment, row in found.items():
        print(
            f"{segment:>4}  {row['blocks']:>6}  {row['parameters']:>11,}  {row['loss']:>8.4f}  {row['perplexity']:>10.2f}  "
            f"{row['bits_per_byte']:>13.4f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model. The loss is in nats per predicted token; bits per byte = loss / ln 2 x
    tokens / bytes of the text."""
    import datasets
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    split = datasets.load_from_disk(args.data)["validation"].with_format("numpy")
    ids_NT = torch.from_numpy(split[: args.sequences or len(split)]["input_ids"].astype("int64"))
    if ids_NT.max() >= model.config.vocab_size:
        raise ValueError(
            f"{args.data} has token ids up to {ids_NT.max()}, {folder} has {model.config.vocab_size} tokens"
        )
    total = 0.0
    with torch.no_grad():
        for ids_BT in ids_NT.split(args.batch_size):
            logits = model(input_ids=ids_BT.to(model.device)).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(
                logits, ids_BT[:, 1:].flatten().to(model.device), reduction="sum"
            ).item()
    loss = total / ids_NT[:, 1:].numel()
    text = AutoTokenizer.from_pretrained(Path(args.data, "tokenizer")).decode(
        ids_NT.flatten(), skip_special_tokens=True
    )
    return {
        "blocks": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * ids_NT.numel() / len(text.encode()),
        "sequences": len(ids_NT),
    }


if __name__ == "__main__":
    sys.exit(main())
