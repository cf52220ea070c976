"""`python -m ds_local VERB ...`, the same as `ds-local VERB ...`."""

from ds_local.cli import command

command()
