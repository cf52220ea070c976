"""Files are replaced whole or not at all, and only those of the same command."""

import json
import os
import subprocess
import sys

import pytest
from sentences import one_sentence
from written import tree

from ds_local.errors import OutputError
from ds_local.outputs import check_file, files, new_file, write_file, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "deep" / "a.json"
    write_file(place, "old")
    with pytest.raises(ZeroDivisionError), new_file(place) as scratch:  # noqa: PT012
        scratch.write_text("ne")
        _ = 1 / 0
    assert place.read_text() == "old"
    (tmp_path / "link").symlink_to(place)
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["a.json"]
    write_file("/dev/null", "x")


def test_a_secret_is_at_no_time_for_others_to_read(tmp_path, monkeypatch):
    place, modes, put = tmp_path / "card.json", [], files._put

    def look(scratch, path):
        modes.append(scratch.stat().st_mode & 0o777)
        put(scratch, path)

    monkeypatch.setattr(files, "_put", look)
    write_whole(place, "old")
    write_whole(place, "new", secret=True)
    assert [modes[1], place.stat().st_mode & 0o777] == [0o600, 0o600]
    assert modes[0] & 0o44


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda p: p.write_text("my thesis"), "was not written by this command"),
        (lambda p: p.write_text('{"train_batch_size": 8}'), "was not written by this command"),
        (lambda p: p.write_bytes(b"\x89PNG" + bytes(100)), "was not written by this command"),
        (lambda p: p.mkdir(), "is a folder"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path, build, said):
    build(tmp_path / "a.json")
    before = tree(tmp_path)
    with one_sentence(f"{tmp_path}/a.json", said, error=OutputError):
        check_file(tmp_path / "a.json", '"makespan"')
    assert tree(tmp_path) == before


def test_files_that_may_be_written(tmp_path):
    for content in ("", "[]\n", json.dumps([{"makespan": 3}])):
        (tmp_path / "a.json").write_text(content)
        assert check_file(tmp_path / "a.json", '"makespan"') == tmp_path / "a.json"
    assert check_file(tmp_path / "new" / "b.json", "x")
    with one_sentence("no folder that can be written to"):
        check_file(tmp_path / "a.json" / "b.json", "x")


def test_two_that_write_at_once_do_not_meet(tmp_path):
    place = tmp_path / "a.json"
    with new_file(place) as first, new_file(place) as second:
        assert first.suffix == second.suffix == ".json"  # by which libraries choose a format
        first.write_text("first")
        second.write_text("second")
    assert place.read_text() == "first"  # closed last
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("write", [write_file, write_whole])
def test_what_a_killed_writer_left_is_cleared_for_its_own_name_alone(tmp_path, write):
    code = (
        "import os, sys; from pathlib import Path; from ds_local.outputs import new_file\n"
        "with new_file(sys.argv[1]) as scratch: scratch.write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("a.json", "b.json"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    left = {path.name[:7] for path in tmp_path.iterdir()}
    assert left == {".a.json", ".b.json"}
    write(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"
    write_file(tmp_path / "a.json", "whole")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0].startswith(".b.json.partial-")
    assert names[1] == "a.json"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a.json", "x")
    assert os.listdir(tmp_path) == ["a.json"]
