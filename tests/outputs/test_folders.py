"""Folders appear whole or not at all, and only over what we made."""

import os
import signal
import subprocess
import sys
import time

import pytest
from sentences import one_sentence
from written import KIND, make, tree

from ds_local.errors import DataError, ExportError
from ds_local.outputs import FILES, damage, exchange, new_folder, read_list


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new" / "place", tmp_path / "empty"):
        make(place, about={"seed": 3})
        make(place, "new", about={"seed": 4})
        assert (place / "a.txt").read_text() == "new"
        assert read_list(place)["about"] == {"seed": 4}
        assert [path.name for path in place.parent.iterdir() if path.name[0] == "."] == []
        assert place.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def a_set(place):
    import datasets

    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(place)


# what stands at the place, and what is said of it
FOREIGN = {
    "files": (lambda p: p.mkdir() or (p / "thesis.tex").write_text("x"), "is no folder of words"),
    "folders": (lambda p: (p / "deep").mkdir(parents=True), "is no folder of words"),
    "a file": (lambda p: p.write_text("x"), "is not a folder"),
    "an empty file": (lambda p: p.touch(), "is not a folder"),
    "a pipe": (os.mkfifo, "is not a folder"),
    "a link": (
        lambda p: p.parent.joinpath("other").mkdir() or p.symlink_to("other"),
        "is a symbolic link",
    ),
    "a link to ours": (
        lambda p: make(p.parent / "other") or p.symlink_to("other"),
        "is a symbolic link",
    ),
    "a broken link": (lambda p: p.symlink_to("nowhere"), "is a symbolic link"),
    "a link to itself": (lambda p: p.symlink_to(p), "is a symbolic link"),
    "another set": (a_set, "is no folder of words"),
    "ours and a file": (lambda p: make(p) or (p / "notes.md").write_text("x"), "holds notes.md"),
    "ours and a deep file": (
        lambda p: make(p) or (p / "deep" / "n").write_text("x"),
        "holds deep/n",
    ),
    "ours and a link": (lambda p: make(p) or (p / "l").symlink_to("a.txt"), "holds l"),
    "ours without its list": (lambda p: make(p) or (p / FILES).unlink(), "is no folder of words"),
    "ours with half a list": (
        lambda p: make(p) or (p / FILES).write_text("{"),
        "is no folder of words",
    ),
    "a list of another make": (
        lambda p: p.mkdir() or (p / FILES).write_text('{"files": [1]}'),
        "is no folder",
    ),
    "an empty list": (
        lambda p: p.mkdir() or (p / FILES).write_text('{"kind": "", "about": {}, "files": {}}'),
        "is no folder of words",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_we_did_not_make_is_left_alone(tmp_path, what):
    build, said = FOREIGN[what]
    build(tmp_path / "place")
    before = tree(tmp_path)
    with one_sentence(f"{tmp_path}/place", said, "is left alone", error=DataError):
        make(tmp_path / "place")
    assert tree(tmp_path) == before


def test_a_folder_of_another_kind_or_one_that_was_changed(tmp_path):
    make(tmp_path / "place")
    with one_sentence("no model, but the folder of words"), new_folder(tmp_path / "place", "model"):
        pass
    (tmp_path / "place" / "a.txt").write_text("mine")
    with (
        one_sentence("was changed since we wrote it (a.txt"),
        new_folder(tmp_path / "place", KIND, ExportError, exact=True),
    ):
        pass
    assert (tmp_path / "place" / "a.txt").read_text() == "mine"
    make(tmp_path / "place", "new")  # unless that is said to matter
    assert (tmp_path / "place" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("what", ["nothing", "ours", "theirs meanwhile"])
def test_what_fails_leaves_everything_as_it_was(tmp_path, what):
    place = tmp_path / "place"
    if what == "ours":
        make(place)
    before = tree(tmp_path)
    with pytest.raises(DataError if "theirs" in what else ZeroDivisionError):  # noqa: PT012, SIM117
        with new_folder(place, KIND, DataError) as new:
            (new / "a.txt").write_text("new")
            if "theirs" not in what:
                _ = 1 / 0
            place.mkdir()
            (place / "thesis.tex").write_text("x")
            before = tree(place)
    assert tree(place if "theirs" in what else tmp_path) == before


def test_a_place_below_a_file_and_names_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "place", tmp_path / "file" / "deep" / "place"):
        with one_sentence(str(place), "not a directory" if "deep" in str(place) else ""):
            make(place)
    with one_sentence("file name too long"):
        make(tmp_path / ("x" * 300))
    with one_sentence("file name too long"):  # only the scratch folder's name is
        make(tmp_path / ("x" * 250))


# --- killed


CHILD = """
import os, sys
from pathlib import Path
from ds_local.outputs import folders
moment, place = sys.argv[1], Path(sys.argv[2])

def killed(*_):
    os.kill(os.getpid(), 9)

def after(module, name):
    real = getattr(module, name)
    setattr(module, name, lambda *a, **k: (real(*a, **k), killed())[0])

if moment == "two steps":
    folders.exchange = lambda *_: False
    real = Path.rename
    Path.rename = lambda self, to: (real(self, to), self == place and killed())[0]
elif moment == "begun":
    after(folders.tempfile, "mkdtemp")
elif moment == "locked":
    after(folders, "_try_lock")
elif moment == "sealed":
    after(folders, "seal")
elif moment == "in place":
    after(folders, "_swap")
with folders.new_folder(place, "folder of words") as new:
    (new / "deep").mkdir()
    (new / "a.txt").write_text("new")
    (new / "deep" / "b.txt").write_text("new" * 1000)
    if moment == "written":
        killed()
    if moment == "waits":
        print("ready", flush=True)
        sys.stdin.read()
"""


def start(moment, place):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, moment, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "moment", ["begun", "locked", "written", "sealed", "two steps", "in place"]
)
@pytest.mark.parametrize("there", [True, False])
def test_killed_at_any_moment_the_old_one_is_whole_and_the_rest_is_cleared(tmp_path, moment, there):
    place = tmp_path / "place"
    if there:
        make(place)
    before = tree(place)
    child = start(moment, place)
    child.communicate()
    assert child.returncode == -signal.SIGKILL or (moment == "two steps" and not there)
    if moment != "two steps":
        after = tree(place) if place.exists() else {}
        assert (after == before) is (moment != "in place")
    for leftover in tmp_path.glob(".place.*.partial"):
        os.utime(leftover, (time.time() - 100,) * 2)
    with pytest.raises(ZeroDivisionError), new_folder(place, KIND, DataError):
        _ = 1 / 0  # the next attempt clears up, and brings back what was on its way
    assert not list(tmp_path.glob(".*"))
    if there or place.exists():
        assert damage(place) == ""
        assert (place / "a.txt").read_text() == ("old" if there and moment != "in place" else "new")


def test_a_living_attempt_is_left_alone_and_the_last_one_wins(tmp_path):
    place = tmp_path / "place"
    child = start("waits", place)
    assert child.stdout.readline() == "ready\n"
    (tmp_path / ".place.mine.partial").mkdir()
    (tmp_path / ".place.mine.partial" / "lock").write_text("of somebody else")
    make(place)
    assert len(list(tmp_path.glob(".place.*.partial"))) == 2
    child.communicate()
    assert child.returncode == 0
    assert (place / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.glob(".place.*")] == [".place.mine.partial"]


def test_names_are_exchanged_in_one_step(tmp_path):
    make(tmp_path / "a", "a")
    make(tmp_path / "b", "b")
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "a.txt").read_text() == "b"
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


def test_leftovers_of_another_folder_whose_name_begins_so_are_left(tmp_path):
    """Killed between the two renames, `data.v2` has its only copy in there."""
    scratch = tmp_path / ".data.v2.abcdefgh.partial"
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "kept.txt").write_text("all there is")
    (scratch / "lock").write_text("")
    with new_folder(tmp_path / "data", KIND) as new:
        (new / "x").write_text("x")
    assert (scratch / "old" / "kept.txt").read_text() == "all there is"
    assert (tmp_path / "data" / "x").exists()
