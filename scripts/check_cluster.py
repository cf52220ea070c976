"""`ds-local check`, from a checkout."""

from ds_local.cli.check import main
from ds_local.cli.ending import run

if __name__ == "__main__":
    run(main)
