"""A folder that we wrote, for tests of what is written."""

import os

from ds_local.errors import DataError
from ds_local.outputs import new_folder

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
