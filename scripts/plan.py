"""`ds-local plan`, from a checkout."""

import sys

from ds_local.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
