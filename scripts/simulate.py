"""`ds-local simulate`, from a checkout."""

import sys

from ds_local.cli.simulate import main

if __name__ == "__main__":
    sys.exit(main())
