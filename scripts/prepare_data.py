"""Make a data folder: text -> tokens -> fixed-length sequences, with a tokenizer.

    python scripts/prepare_data.py --source python-stdlib --tokenizer sentencepiece:4096 \\
        --seq-len 128 --output data/python
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=["python-stdlib"],
        help="python-stdlib, files or folders, or hub:NAME[:CONFIG]",
    )
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece:4096",
        help="sentencepiece:SIZE to train one, or a folder or hub name",
    )
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in a sequence")
    parser.add_argument(
        "--validation-share", type=float, default=0.02, help="share of the documents held out"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()
    from ds_local.data.corpus import prepare
    from ds_local.errors import DataError

    try:
        facts = prepare(
            args.source, args.tokenizer, args.seq_len, args.output, args.validation_share
        )
    except DataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{number:,} {split}" for split, number in facts["sequences"].items())
    print(
        f"{facts['documents']:,} documents, {facts['tokens']:,} tokens -> {counts} sequences of {args.seq_len} in {args.output}"
    )
    if facts["skipped"]:
        print(
            "skipped: "
            + ", ".join(f"{number} {reason}" for reason, number in facts["skipped"].items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
