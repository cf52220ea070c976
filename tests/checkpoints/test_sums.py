"""Sizes and checksums of a checkpoint's files, by one process."""

import hashlib

import pytest
from test_folder import save

from ds_local.checkpoints.sums import check_file, checksums, verify
from ds_local.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path, "one", 4)
    return tmp_path / "one"


def test_a_sum_is_size_and_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    assert checksums(tmp_path) == {"a": (3, hashlib.sha256(b"abc").hexdigest())}
    assert checksums(tmp_path, []) == {}


def test_a_whole_checkpoint_gives_its_facts(checkpoint):
    facts = verify(checkpoint)
    assert facts["step"] == 4
    for name in ("a.pt", "b.pt"):
        check_file(checkpoint, facts, name)
        assert tuple(facts["files"][name]) == checksums(checkpoint, [name])[name]


def test_a_changed_file_is_named(checkpoint):
    facts = verify(checkpoint)
    (checkpoint / "a.pt").write_text("a.pt of step 5")  # as long as before
    with pytest.raises(CheckpointError, match=r"is damaged: a\.pt changed .* use another"):
        verify(checkpoint)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
        check_file(checkpoint, facts, "a.pt")
    check_file(checkpoint, facts, "b.pt")


def test_a_missing_file_is_named(checkpoint):
    facts = verify(checkpoint)
    (checkpoint / "b.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is missing b\.pt; use another checkpoint"):
        verify(checkpoint)
    for name in ("b.pt", "c.pt"):
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            check_file(checkpoint, facts, name)


def test_what_others_put_beside_it_is_no_damage(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    assert "notes.txt" not in verify(checkpoint)["files"]
