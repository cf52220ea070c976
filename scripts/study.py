"""`ds-local study`, from a checkout."""

from ds_local.cli.ending import run
from ds_local.cli.study import main

if __name__ == "__main__":
    run(main)
