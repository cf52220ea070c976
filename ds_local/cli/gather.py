"""One checkpoint of the whole pipeline from those of units that are jobs of their own, of the
newest step that all of them have. Units may go on meanwhile.

python scripts/gather.py runs/nano
python scripts/gather.py runs/nano --output runs/nano-whole
"""

from __future__ import annotations

from ds_local.cli.arguments import Parser


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="folder of the whole run, which holds a unit-N folder of each")
    parser.add_argument(
        "--output",
        help="run folder to write to, for one job to go on from; default RUN itself",
    )
    args = parser.parse_args(arguments)
    from ds_local.checkpoints.gathering import gather_units

    print(gather_units(args.run, args.output))
    return 0
