"""`ds-local benchmark`, from a checkout."""

from ds_local.cli.benchmark import main
from ds_local.cli.ending import run

if __name__ == "__main__":
    run(main)
