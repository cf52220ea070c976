"""`ds-local summarize`, from a checkout."""

import sys

from ds_local.cli.summarize import main

if __name__ == "__main__":
    sys.exit(main())
