"""What we write appears whole or not at all, and only over what we made."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from sentences import one_sentence

from ds_local.errors import DataError, ExportError, OutputError
from ds_local.outputs import (
    FILES,
    check_file,
    damage,
    exchange,
    new_file,
    new_folder,
    read_list,
    write_file,
)

KIND = "folder of words"


def make(place, text="old", **how):
    with new_folder(place, KIND, DataError, **how) as new:
        (new / "deep").mkdir()
        (new / "a.txt").write_text(text)
        (new / "deep" / "b.txt").write_text(text * 1000)


def tree(folder):
    """Everything below a folder: name -> content, or what it is."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file()
        else os.lstat(path).st_mode
        for path in sorted(folder.rglob("*"))
    }


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
from ds_local import outputs
moment, place = sys.argv[1], Path(sys.argv[2])

def killed(*_):
    os.kill(os.getpid(), 9)

def after(module, name):
    real = getattr(module, name)
    setattr(module, name, lambda *a, **k: (real(*a, **k), killed())[0])

if moment == "two steps":
    outputs.exchange = lambda *_: False
    real = Path.rename
    Path.rename = lambda self, to: (real(self, to), self == place and killed())[0]
elif moment == "begun":
    after(outputs.tempfile, "mkdtemp")
elif moment == "locked":
    after(outputs, "_try_lock")
elif moment == "sealed":
    after(outputs, "_seal")
elif moment == "in place":
    after(outputs, "_swap")
with outputs.new_folder(place, "folder of words") as new:
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


# --- damage


def test_damage_is_found_and_named(tmp_path):
    place = tmp_path / "place"
    make(place)
    assert damage(place) == ""
    for change, said in (
        (lambda p: p.write_text("OLD"), "a.txt changed since it was written"),
        (lambda p: p.write_text("older"), "a.txt has 5 bytes instead of 3"),
        (lambda p: p.unlink(), "a.txt is missing"),
        (lambda p: p.mkdir(), "a.txt is missing"),
    ):
        change(place / "a.txt")
        assert damage(place) == said
    assert "missing or damaged" in damage(tmp_path)


def test_of_much_a_sample_is_read_and_every_size(tmp_path):
    with new_folder(tmp_path / "place", KIND) as new:
        (new / "small").write_bytes(b"x")
        for number in range(20):
            (new / f"{number:02}").write_bytes(bytes(1000))
    shard = tmp_path / "place" / "07"
    shard.write_bytes(bytes(999) + b"\1")
    found = [damage(tmp_path / "place", 5000, sample) for sample in range(100)]
    assert 5 < sum("07 changed" in said for said in found) < 60  # a quarter of them
    assert found == [damage(tmp_path / "place", 5000, sample) for sample in range(100)]
    assert damage(tmp_path / "place", 0) == ""
    assert "07 changed" in damage(tmp_path / "place", 20_001)
    shard.write_bytes(bytes(999))
    assert damage(tmp_path / "place", 0) == "07 has 999 bytes instead of 1,000"
    shard.write_bytes(bytes(1000))
    (tmp_path / "place" / "small").write_bytes(b"y")
    assert all("small changed" in damage(tmp_path / "place", 5000, sample) for sample in range(9))


# --- files


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


# --- storage that refuses


@contextmanager
def small_disk(place, options):
    """A file system of a few kilobytes in memory, which only root can make."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk to fill")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


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
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
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
