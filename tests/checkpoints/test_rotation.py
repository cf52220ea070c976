"""Older checkpoints go, and nothing else."""

import shutil

import pytest
from killed import killed_everywhere
from test_folder import save, step_of

from ds_local.checkpoints.folder import clean, complete_tags, latest_tag
from ds_local.checkpoints.rotation import remove_older


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of four steps, of which a later one is left from an earlier start."""
    for step in (2, 4, 10, 8):
        save(tmp_path, f"global_step{step}", step)
    return tmp_path


def tags(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_the_newest_stay(folder):
    save(folder, "global_step12", 12)
    assert remove_older(folder, 2) == ["global_step2", "global_step4", "global_step8"]
    assert tags(folder) == {"global_step10", "global_step12"}
    assert remove_older(folder, 2) == []


def test_the_one_that_latest_names_stays_in_any_case(folder):
    remove_older(folder, 1)
    assert tags(folder) == {"global_step8", "global_step10"}
    assert step_of(folder, latest_tag(folder)) == 8


def test_before_the_loop_has_saved_nothing_goes(tmp_path):
    save(tmp_path, "good-enough", 3, save_latest=False)
    assert remove_older(tmp_path, 1) == []
    assert tags(tmp_path) == {"good-enough"}


def test_what_the_loop_did_not_save_stays(folder):
    save(folder, "best", 1, save_latest=False)
    save(folder, "global_step2-kept", 2, save_latest=False)
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "mine.txt").write_text("mine")
    (folder / "global_step4" / "notes.txt").write_text("mine")
    (folder / "global_step2" / "ds_local.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    assert remove_older(folder, 1) == []
    expected = {"best", "global_step2-kept", "tokenizer"} | {
        f"global_step{step}" for step in (2, 3, 4, 8, 10)
    }
    assert tags(folder) == expected
    assert (folder / "global_step4" / "notes.txt").read_text() == "mine"


def test_killed_at_any_file_operation_what_is_there_is_whole(tmp_path):
    folder = tmp_path / "checkpoints"

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        for step in (2, 4, 6):
            save(folder, f"global_step{step}", step)

    begin()
    points = []
    for point in killed_everywhere(lambda: remove_older(folder, 1), folder):
        points.append(point)
        for tag in complete_tags(folder):
            step_of(folder, tag)
        assert latest_tag(folder) == "global_step6"
        clean(folder)
        remove_older(folder, 1)
        assert tags(folder) == {"global_step6"}
        assert {path.name for path in folder.iterdir()} == {"global_step6", "latest"}
        begin()
    assert len(points) > 4
