"""Continue a text with a trained model.

python scripts/generate.py runs/nano --prompt "def main("
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder, a run folder or a checkpoint folder")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from ds_local.checkpoint import CheckpointError
    from ds_local.hf import ExportError, export

    try:
        if Path(args.model, "config.json").is_file():
            print(continue_text(args.model, args))
        else:
            with tempfile.TemporaryDirectory() as folder:
                print(continue_text(str(export(args.model, Path(folder, "model"))), args))
    except (ExportError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def continue_text(folder: str, args: argparse.Namespace) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - prompt["input_ids"].shape[1]
    torch.manual_seed(args.seed)
    how = {"do_sample": True, "temperature": args.temperature, "top_k": 50} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=min(args.max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id, **how,
    )  # fmt: skip
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
