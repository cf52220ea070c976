"""Write a run as an ordinary Hugging Face folder.

python scripts/export_hf.py runs/nano --output out/nano
python scripts/export_hf.py runs/nano --output out/nano --all-segments
"""

from __future__ import annotations

from ds_local.cli.arguments import Parser, whole


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument(
        "--output",
        required=True,
        help="folder to write; an earlier export there is replaced, anything else is not",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--segment",
        type=whole(),
        help="the prefix up to this segment, with its head, as a smaller model",
    )
    which.add_argument(
        "--all-segments", action="store_true", help="a model for every exit, as OUTPUT/segment_I"
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="auxiliary heads into a second file beside the full model, to train on with them",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the running averages of the weights, of a run with local_parallel.ema",
    )
    args = parser.parse_args(arguments)
    from ds_local.checkpoints.hf_export import export, export_all

    if args.all_segments:
        print("\n".join(map(str, export_all(args.run, args.output, args.heads, args.ema).values())))
    else:
        print(export(args.run, args.output, args.segment, args.heads, args.ema))
    return 0
