"""Write a run as an ordinary Hugging Face folder.

python scripts/export_hf.py runs/nano --output out/nano
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--segment", type=int, help="the prefix up to this segment, with its head, as a smaller model")
    args = parser.parse_args()
    from ds_local.checkpoint import CheckpointError
    from ds_local.hf import ExportError, export

    try:
        print(export(args.run, args.output, args.segment))
    except (ExportError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
