"""Make a data folder: text -> tokens -> fixed-length sequences, with a tokenizer.

    python scripts/prepare_data.py --source python-stdlib --tokenizer sentencepiece:4096 \\
        --seq-len 128 --output data/python
"""

from __future__ import annotations

import argparse

from ds_local.cli.arguments import Parser, number, whole


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        nargs="+",
        default=["python-stdlib"],
        help="python-stdlib, hub:NAME[:CONFIG], files or folders: .jsonl, .ndjson and .json with a "
        '"text" field, .parquet with a "text" column, anything else is plain text',
    )
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece:4096",
        help="sentencepiece:SIZE to train one, or a folder or hub name",
    )
    parser.add_argument("--seq-len", type=whole(2), default=128, help="tokens in a sequence")
    parser.add_argument(
        "--validation-share", type=number(), default=0.02, help="share of the documents held out"
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="files in folders to leave out, as in '*.csv' 'build/*'",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="folder to write; an earlier data folder there is replaced, anything else is not",
    )
    args = parser.parse_args(arguments)
    from ds_local.data.corpus import prepare
    from ds_local.data.readers import Skipped

    facts = prepare(
        args.source,
        args.tokenizer,
        args.seq_len,
        args.output,
        args.validation_share,
        skip=args.skip,
    )
    counts = ", ".join(f"{number:,} {split}" for split, number in facts["sequences"].items())
    print(
        f"{facts['documents']:,} documents, {facts['tokens']:,} tokens -> {counts} sequences of "
        f"{args.seq_len} in {args.output}"
    )
    if facts["skipped"]:
        print(f"left out: {Skipped(facts['skipped'], facts['skipped_names'])}")
    return 0
