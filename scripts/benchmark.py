"""`ds-local benchmark`, from a checkout."""

import sys

from ds_local.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
