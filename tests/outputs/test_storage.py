"""Storage that refuses: full, read-only, broken disks are said in one sentence."""

import os
from pathlib import Path

import pytest
from sentences import one_sentence
from small_disks import remount, small_disk
from written import KIND, make, tree

from ds_local.errors import DataError, OutputError
from ds_local.outputs import new_folder, write_file


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        ("size=64k", "x" * 200, ("no space left on device", "bytes free", "after ")),
        ("size=1m,nr_inodes=10", "x", ("no space left on device", "no inodes free")),
    ],
)
def test_a_full_disk_is_said_and_the_old_folder_is_whole(tmp_path, options, text, said):
    with small_disk(tmp_path / "disk", options) as disk:
        with new_folder(disk / "place", KIND) as new:
            (new / "a.txt").write_text("old")
        before = tree(disk)
        with one_sentence(f"cannot write {disk}/place", *said, error=DataError):
            make(disk / "place", text)
        assert tree(disk) == before
        with one_sentence(f"cannot write {disk}/", "no space left", error=OutputError):
            for number in range(20):
                write_file(disk / f"{number}.json", "x" * 20_000)


def test_errors_that_do_not_say_so_on_a_full_disk(tmp_path):
    """As torch's: "[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0"."""
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        with one_sentence("no space left on device"), new_folder(disk / "place", KIND):
            raise RuntimeError("unexpected pos 128 vs 0")
        with pytest.raises(KeyError), new_folder(disk / "place", KIND):
            raise KeyError("something else")
    with pytest.raises(RuntimeError, match="pos 128"), new_folder(tmp_path / "place", KIND):
        raise RuntimeError("unexpected pos 128 vs 0")
    with one_sentence("no space left on device"), new_folder(tmp_path / "place", KIND):
        raise Exception("I/O error: No space left on device (os error 28)")


def test_a_disk_that_cannot_be_written(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        make(disk / "place")
        remount(disk, "ro")
        before = tree(disk)
        with one_sentence(f"cannot write {disk}/place", "read-only file system", error=DataError):
            make(disk / "place")
        with one_sentence(f"cannot write {disk}/a.json", "read-only file system"):
            write_file(disk / "a.json", "x")
        assert tree(disk) == before


def test_a_place_that_is_a_disk_of_its_own(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m") as disk, one_sentence("busy"):
        make(disk)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with one_sentence(f"cannot write {tmp_path}/place", "permission denied"):
        make(tmp_path / "place")
    tmp_path.chmod(0o700)


def test_errors_about_something_else_pass(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "place", KIND):
        Path("/nowhere/at/all").read_text()
