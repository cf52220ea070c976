"""The folder of checkpoints: at any moment a whole one, whatever kills the writer."""

import json
import os
import shutil

import pytest
from killed import killed_everywhere

from ds_local.checkpoints.facts import FACTS
from ds_local.checkpoints.folder import (
    Writing,
    clean,
    complete_tags,
    latest_tag,
    locate,
    newest_tag,
)
from ds_local.checkpoints.sums import verify
from ds_local.config.schema import LocalParallelConfig
from ds_local.errors import CheckpointError, SaveError


def facts(step, section=None):
    return {
        "step": step,
        "num_stages": 1,
        "num_replicas": 1,
        "segment_parts": [0, 2],
        "head_segments": [],
        "local_parallel": section or LocalParallelConfig().model_dump(mode="json"),
        "model": None,
        "optimizer": {"type": "adamw", "precision": "fp32", "zero_stage": 0},
        "scheduler": None,
    }


def save(folder, tag, step, save_latest=True, section=None):
    writing = Writing(folder, tag)
    writing.target.mkdir()
    for name in ("a.pt", "b.pt"):
        (writing.target / name).write_text(f"{name} of step {step}")
    writing.commit(facts(step, section), save_latest)


def step_of(folder, tag):
    """The step of a checkpoint, after all checks; its files must be of that step."""
    place = locate(folder, tag)
    step = verify(place)["step"]
    assert {p.read_text() for p in place.glob("*.pt")} == {f"{n}.pt of step {step}" for n in "ab"}
    return step


@pytest.mark.parametrize("tags", [("one", "two"), ("best", "best")], ids=["new", "again"])
def test_killed_at_any_file_operation_there_is_a_whole_checkpoint(tmp_path, tags):
    points = []
    folder = tmp_path / "checkpoints"

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, tags[0], 1)

    begin()
    for point in killed_everywhere(lambda: save(folder, tags[1], 2), folder):
        points.append(point)
        assert step_of(folder, latest_tag(folder)) in (1, 2)
        assert all(step_of(folder, tag) in (1, 2) for tag in complete_tags(folder))
        save(folder, tags[1], 3)  # goes through, and nothing of the killed one is left
        assert step_of(folder, latest_tag(folder)) == 3
        assert {p.name for p in folder.iterdir()} == {*tags, "latest"}
        begin()
    assert {"os.rename", "os.mkdir", "open", "os.remove"} <= {point.split()[0] for point in points}
    assert len(points) > 15


def test_killed_in_the_first_save_the_next_start_finds_what_there_is(tmp_path):
    folder, found = tmp_path / "checkpoints", set()
    for _ in killed_everywhere(lambda: save(folder, "global_step4", 4), folder):
        tag = newest_tag(folder)
        found.add(tag)
        assert tag is None or step_of(folder, tag) == 4
        with_pointer = (folder / "latest").exists()
        assert not with_pointer or latest_tag(folder) == tag
        shutil.rmtree(folder, ignore_errors=True)
    assert found == {None, "global_step4"}


def test_without_a_pointer_the_newest_is_that_of_the_highest_step(tmp_path):
    for tag, step in (("best", 9), ("global_step10", 10), ("a", 3)):
        save(tmp_path, tag, step, save_latest=False)
    assert newest_tag(tmp_path) == "global_step10"


def test_what_others_wrote_is_left_alone(tmp_path):
    foreign = tmp_path / "best"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no checkpoint, so it is left alone"):
        save(tmp_path, "best", 1)
    looks_alike = tmp_path / ".notes.partial-of-mine"
    looks_alike.write_text("mine")
    (tmp_path / "old.partial").mkdir()
    save(tmp_path, "other", 1)
    clean(tmp_path)
    assert looks_alike.exists()
    assert (tmp_path / "old.partial").is_dir()
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_what_a_living_process_writes_is_not_cleaned_away(tmp_path):
    writing = Writing(tmp_path, "one")
    writing.target.mkdir()
    save(tmp_path, "two", 2)
    clean(tmp_path)
    assert writing.target.is_dir()
    elsewhere = tmp_path / ".three.partial-another.host-12-34-0"
    elsewhere.mkdir()
    save(tmp_path, "two", 3)
    assert elsewhere.is_dir()
    clean(tmp_path)  # nobody else can be writing: the lock of the run says so
    assert not elsewhere.exists()


def test_a_checkpoint_that_is_given_up_leaves_nothing(tmp_path):
    save(tmp_path, "one", 1)
    writing = Writing(tmp_path, "one")
    writing.target.mkdir()
    (writing.target / "a.pt").write_text("half")
    writing.abandon()
    assert {p.name for p in tmp_path.iterdir()} == {"one", "latest"}
    assert step_of(tmp_path, "one") == 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot write to .*file"):
        Writing(tmp_path / "file", "one")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["layer_00-model_states.pt", "mp_rank_00_model_states.pt"],
            r"PipelineEngine.*load_state_dir",
        ),
        (["mp_rank_00_model_states.pt"], "DeepSpeed without pipeline stages"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed without pipeline stages"),
        (["config.json", "model.safetensors"], "Hugging Face folder"),
        (["other.bin"], "no complete checkpoint; complete are: one"),
    ],
)
def test_checkpoints_of_other_programs_are_known_by_their_files(tmp_path, names, said):
    save(tmp_path, "one", 1)
    theirs = tmp_path / "global_step7"
    theirs.mkdir()
    for name in names:
        (theirs / name).write_text("{}")
    with pytest.raises(CheckpointError, match=said):
        locate(tmp_path, "global_step7")
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError):
        latest_tag(tmp_path)


def test_power_may_fail_after_every_rename(tmp_path, monkeypatch):
    """What is renamed is on the disk before, and so is the name afterwards."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    save(tmp_path, "one", 1)
    names = [os.path.basename(path) for path in done]
    assert {"a.pt", "b.pt"} <= set(names)
    assert sum(name.startswith((f".{FACTS}.", ".latest.")) for name in names) == 2
    assert done.count(str(tmp_path)) >= 2
    assert json.loads((tmp_path / "one" / FACTS).read_text())["step"] == 1
