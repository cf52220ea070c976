"""The kinds of change that a start may make are those that a run is compared by."""

from ds_local.cli.arguments import kinds_of_change
from ds_local.config.changes import CHANGES
from ds_local.training.differences import by_kind


def test_every_kind_that_is_compared_can_be_allowed():
    compared = by_kind({}).keys() - {"settings"}  # which are said, and need no leave
    assert compared <= CHANGES.keys()
    assert CHANGES.keys() - compared == {"optimizer", "scheduler"}  # of the checkpoint


def test_the_command_line_takes_each_of_them():
    assert kinds_of_change(",".join(CHANGES)) == list(CHANGES)
    assert kinds_of_change("data, layout") == ["data", "optimizer"]  # its name of a release ago
    assert all(len(meaning.split()) > 1 for meaning in CHANGES.values())
