"""Scratch names: whose they are, and which are left over."""

import os

from ds_local.outputs.processes import Process
from ds_local.outputs.scratch import leftovers, remove, scratch_name

GONE = 2**22 + 1  # above the highest process number


def name_of(name="a.txt", host=None, pid=None, started=None):
    own = Process.own()
    return f".{name}.partial-{host or own.host}-{pid or own.pid}-{started or own.started}-0"


def test_a_name_is_used_once_and_keeps_the_suffix():
    names = {scratch_name("a.pt", ".pt") for _ in range(10)}
    assert len(names) == 10
    assert all(name.startswith(".a.pt.partial-") and name.endswith(".pt") for name in names)
    assert str(os.getpid()) in names.pop()


def test_only_what_an_ended_process_left_is_left_over(tmp_path):
    dead = name_of(pid=GONE)
    again = name_of(started="1.0")  # our number, but another process had it
    for name in (dead, again, scratch_name("a.txt"), name_of(host="elsewhere", pid=GONE), ".other"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".mine.partial-notes").write_text("x")
    assert {path.name for path in leftovers(tmp_path)} == {dead, again}


def test_a_lock_makes_those_of_other_hosts_left_over_too(tmp_path):
    theirs, own = name_of(host="else-where", pid=7), scratch_name("a.txt")
    for name in (theirs, own):
        (tmp_path / name).write_text("x")
    assert [path.name for path in leftovers(tmp_path, all_of_them=True)] == [theirs]


def test_those_of_one_file_can_be_asked_for(tmp_path):
    one, other = name_of("a.txt", pid=GONE), name_of("b.txt", pid=GONE) + ".txt"
    for name in (one, other):
        (tmp_path / name).write_text("x")
    assert [path.name for path in leftovers(tmp_path, name="b.txt")] == [other]


def test_files_folders_and_links_are_removed_and_no_more(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_text("x")
    for name in ("folder", "link", "file", "gone"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "a").exists()
