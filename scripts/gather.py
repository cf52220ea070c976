"""`ds-local gather`, from a checkout."""

from ds_local.cli.ending import run
from ds_local.cli.gather import main

if __name__ == "__main__":
    run(main)
