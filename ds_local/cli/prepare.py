"""Make a data folder: text -> tokens -> fixed-length sequences, with a tokenizer.

    python scripts/prepare_data.py --source python-stdlib --tokenizer sentencepiece:4096 \\
        --seq-len 128 --output data/python-stdlib
    python scripts/prepare_data.py --source web=shards/@0.7 code=code.parquet@0.3 \\
        --text-field content text --validation-source held-out.jsonl --tokenizer gpt2 \\
        --seq-len 1024 --workers 8 --output data/mixed
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_local.cli.arguments import Parser, number, whole

_SHOWN = 20  # sources


def parser() -> Parser:
    """What the command takes."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--source",
        nargs="+",
        default=["python-stdlib"],
        metavar="[NAME=]PLACE[@WEIGHT]",
        help="python-stdlib, hub:NAME[:CONFIG], files or folders: .jsonl, .ndjson, .json, .csv, "
        ".tsv and .parquet have a document in each row, anything else is plain text, each also in "
        ".gz, .zst, .bz2 or .xz; weights say how much of training each source gives",
    )
    parser.add_argument(
        "--validation-source",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="validation text; default: a share of the documents is held out",
    )
    parser.add_argument(
        "--text-field",
        nargs="+",
        default=["text"],
        metavar="FIELD",
        help="fields with the text of a row, of which the first that it has is taken; a.b is the "
        "field b in a; messages of a chat become text by the tokenizer's chat template",
    )
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece:4096",
        help="sentencepiece:SIZE to train one, a folder or hub name, or a folder with the "
        "vocab.json and merges.txt of a byte-level BPE",
    )
    _add_rest(parser)
    return parser


def _add_rest(parser: Parser) -> None:
    """What becomes of the text."""
    parser.add_argument("--seq-len", type=whole(2), default=128, help="tokens in a sequence")
    parser.add_argument(
        "--validation-share", type=number(), default=0.02, help="share of the documents held out"
    )
    parser.add_argument(
        "--document-mask",
        action="store_true",
        help="no document attends to another in its sequence, and none predicts the next",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="files in folders to leave out, as in '*.pdf' 'build/*'",
    )
    parser.add_argument(
        "--max-malformed",
        type=number(),
        default=0,
        metavar="N",
        help="rows that may be malformed, and are left out and shown; below 1 a share of all rows",
    )
    parser.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        help="processes that tokenize; any number gives the same folder",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="folder to write; an earlier data folder there is replaced, anything else is not",
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    taken = parser()
    args = taken.parse_args(arguments)
    if args.validation_source:
        why = "holds nothing out beside --validation-source; leave one of the two out"
        taken.refuse(args, ["--validation-share"], why)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    from ds_local.data.corpus import prepare
    from ds_local.data.left_out import Skipped

    facts = prepare(
        args.source,
        args.tokenizer,
        args.seq_len,
        args.output,
        args.validation_share,
        skip=args.skip,
        validation_sources=args.validation_source,
        text_fields=args.text_field,
        max_malformed=args.max_malformed,
        document_mask=args.document_mask,
        workers=args.workers,
    )
    counts = ", ".join(f"{number:,} {split}" for split, number in facts["sequences"].items())
    print(
        f"{facts['documents']:,} documents, {facts['tokens']:,} tokens -> {counts} sequences of "
        f"{args.seq_len} in {args.output}"
    )
    _show(facts["mixture"])
    if facts["skipped"]:
        print(f"left out: {Skipped(facts['skipped'], facts['skipped_names'])}")
    return 0


def _show(mixture: list[dict[str, Any]]) -> None:
    """The share of each source, where there are several."""
    if len(mixture) < 2:
        return
    width = max(len(one["name"]) for one in mixture[:_SHOWN])
    for one in mixture[:_SHOWN]:
        print(
            f"{one['name']:<{width}}  {one['share']:7.2%} of training: {one['tokens']:,} tokens in "
            f"{one['documents']:,} documents, {one['passes']:.2f} times a pass"
        )
    if len(mixture) > _SHOWN:
        print(f"and {len(mixture) - _SHOWN} more sources, see prepared.json")
