"""`python -m ds_local VERB ...`, the same as `ds-local VERB ...`."""

import sys

from ds_local.cli import main

sys.exit(main())
