"""Saves that fail, fail on all ranks together, leave the checkpoint before them, and training goes
on."""

import argparse
import os
import subprocess
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from ranks import run_ranks
from samples import sampled
from small_disks import remount, small_disk

LOCAL = {"mode": "local"}


def fail_and_go_on(folder, break_it, mend_it, tag):
    """Save, train with failing saves, mend, save again. What was said, losses, and what the folder
    held after the failure; then the state that a fresh engine finds in the last checkpoint."""
    from ds_local.checkpoints.folder import latest_tag, locate
    from ds_local.checkpoints.sums import verify
    from ds_local.errors import SaveError

    engine = jobs.build(LOCAL, 2)
    data = jobs.batches(engine)
    losses = [engine.train_batch(data).item()]
    engine.save_checkpoint(folder, tag)
    torch.distributed.barrier()
    if engine.global_rank == 0:
        break_it(folder)
    torch.distributed.barrier()
    said = []
    for _ in range(2):
        losses.append(engine.train_batch(data).item())
        try:
            engine.save_checkpoint(folder, tag)
        except SaveError as error:
            said.append(str(error))
        left = sorted(os.listdir(folder))
        assert verify(locate(folder, latest_tag(folder)))["step"] == 1
    torch.distributed.barrier()
    if engine.global_rank == 0:
        mend_it(folder)
    torch.distributed.barrier()
    losses.append(engine.train_batch(data).item())
    engine.save_checkpoint(folder, tag)
    again = jobs.build(LOCAL, 2)
    again.load_checkpoint(folder)
    state, other = jobs.state_of(engine), jobs.state_of(again)
    return {
        "said": said,
        "losses": losses,
        "left": left,
        "same": all(torch.equal(tensor, other[name]) for name, tensor in state.items()),
        "step": again.global_steps,
    }


def undisturbed():
    engine = jobs.build(LOCAL, 2)
    data = jobs.batches(engine)
    return [engine.train_batch(data).item() for _ in range(4)]


@pytest.fixture(scope="module")
def straight():
    return run_ranks(undisturbed, 2)


def fill(folder):
    place = Path(folder).parent / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    place.write_bytes(b"x" * (free - 300_000))


def fill_all(folder):
    place = Path(folder).parent / "filler"
    place.write_bytes(b"x" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))


def empty(folder):
    (Path(folder).parent / "filler").unlink()


def use_inodes(folder):
    place = Path(folder).parent / "filler"
    place.mkdir()
    for number in range(os.statvfs(folder).f_favail - 5):
        (place / str(number)).touch()


def free_inodes(folder):
    subprocess.run(["rm", "-r", str(Path(folder).parent / "filler")], check=True)


def read_only(folder):
    remount(Path(folder).parent, "ro")


def writable(folder):
    remount(Path(folder).parent, "rw")


CASES = {
    "full": (
        fill,
        empty,
        r"No space left on device; the checkpoint needs [\d,]{7,} bytes, [\d,]{7} are free",
    ),
    "quite full": (fill_all, empty, r"No space left on device; the checkpoint needs"),
    "no inodes": (
        use_inodes,
        free_inodes,
        r"no inode is free, all 60 are in use; the checkpoint needs",
    ),
    "read-only": (read_only, writable, "Read-only file system"),
}


@pytest.mark.parametrize(  # a new folder, and one that is written again
    ("case", "tag"),
    sampled(
        [*zip(CASES, (None, "best") * 2, strict=True)],
        [(case, tag) for case in CASES for tag in (None, "best")],
    ),
)
def test_a_disk_that_takes_no_more_stops_nothing(tmp_path, straight, case, tag):
    break_it, mend_it, words = CASES[case]
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=60") as disk:
        folder = disk / "checkpoints"
        found = run_ranks(fail_and_go_on, 2, str(folder), break_it, mend_it, tag)
        for rank, result in enumerate(found):
            assert result["losses"] == straight[rank]
            assert len(result["said"]) == 2
            for sentence in result["said"]:
                assert sentence.count("\n") == 0
                assert str(folder) in sentence
                assert ".partial" not in sentence
                import re

                assert re.search(words, sentence), sentence
            assert result["said"] == found[0]["said"]
            assert result["left"] == sorted(["latest", tag or "global_step1"])
            assert result["same"]
            assert result["step"] == 4
        assert not [p for p in disk.rglob("*") if ".partial" in p.name]


def one_rank_fails(folder, how):
    """Rank 1 cannot write one of its files; what each rank says and what is left."""
    from ds_local.errors import SaveError

    engine = jobs.build(LOCAL, 2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    original, count = engine.checkpoint_engine.save, 0

    def save(state_dict, path):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(5, "Input/output error") if how == "storage" else TypeError("a bug")
        original(state_dict=state_dict, path=path)

    if engine.global_rank == 1:
        engine.checkpoint_engine.save = save
    engine.train_batch(data)
    try:
        engine.save_checkpoint(folder)
    except SaveError as error:
        said = f"SaveError: {error}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    left = sorted(os.listdir(folder))
    if engine.global_rank == 1:
        del engine.checkpoint_engine.save
    if how == "storage":
        engine.save_checkpoint(folder)
    return said, left, sorted(os.listdir(folder))


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    found = run_ranks(one_rank_fails, 2, str(tmp_path), "storage")
    for said, left, then in found:
        assert "SaveError: rank 1: cannot save" in said
        assert "Input/output error" in said
        assert left == ["global_step1", "latest"]
        assert then == ["global_step1", "global_step2", "latest"]


def test_a_fault_of_the_program_is_not_taken_for_the_disks(tmp_path):
    found = run_ranks(one_rank_fails, 2, str(tmp_path), "bug")
    assert found[1][0] == "TypeError: a bug"
    assert found[0][0] == "CheckpointError: rank 1: TypeError: a bug"
    assert {tuple(left) for _, left, _ in found} == {("global_step1", "latest")}


class Custom:
    pass


STATES = {
    "a numpy scalar": ({"best": np.float64(1.5)}, r"client_state\['best'\] is a numpy.float64"),
    "a Namespace": (
        {"args": argparse.Namespace(a=1)},
        r"client_state\['args'\] is a argparse.Namespace",
    ),
    "a Path": (
        {"runs": [{"at": Path("x")}]},
        r"client_state\['runs'\]\[0\]\['at'\] is a pathlib.PosixPath",
    ),
    "a class": ({"x": Custom()}, r"client_state\['x'\] is a test_saving.Custom"),
    "a function": ({"f": print}, r"client_state\['f'\]"),
    "numpy keys": ({"x": {np.int64(3): 1}}, r"the key .* of client_state\['x'\]"),
    "a key of DeepSpeed's": ({"global_steps": 7}, "client_state has the key 'global_steps'"),
    "a number as key": ({3: 7}, "client_state has the key 3"),
}
FINE = {
    "note": "hello",
    "numbers": [1, 2.5, True, None],
    "pair": (1, "a"),
    "nested": {"a": {"b": torch.ones(2)}},
    "set": {1, 2},
    "bytes": b"x",
    "dtype": torch.bfloat16,
}


def client_states(folder, states, fine):
    """What is said of each state; then the fine one, saved and loaded."""
    engine = jobs.build(LOCAL, 2)
    said = []
    for state in states:
        mine = state if engine.global_rank == 1 else {}  # one rank's is enough
        try:
            engine.save_checkpoint(folder, client_state=mine)
            said.append("saved")
        except RuntimeError as error:
            said.append(f"{type(error).__name__}: {error}")
    left = os.path.isdir(folder) and os.listdir(folder)
    engine.save_checkpoint(folder, client_state=fine)
    return said, left, engine.load_checkpoint(folder)[1]


def test_client_state_that_could_not_be_loaded_is_refused(tmp_path):
    import re

    folder = str(tmp_path / "checkpoints")
    states = [state for state, _ in STATES.values()]
    for said, left, loaded in run_ranks(client_states, 2, folder, states, FINE):
        assert not left
        assert loaded.keys() == FINE.keys()
        for sentence, (_, words) in zip(said, STATES.values(), strict=True):
            assert sentence.startswith("CheckpointError")
            assert re.search(words, sentence), sentence
        assert {key: loaded[key] for key in FINE if key != "nested"} == {
            key: value for key, value in FINE.items() if key != "nested"
        }
        assert torch.equal(loaded["nested"]["a"]["b"], torch.ones(2))


def files_and_order(folder, precision):
    """Files in the folder, and how many steps had been reported when `latest` was written."""
    from ds_local.checkpoints import folder as checkpoints

    engine = jobs.build(LOCAL, 2, steps_per_print=100, **precision)
    reported, at_latest = [], []
    engine.reports.listeners.append(lambda rows: reported.append(rows[0].step))
    original = checkpoints._write_whole

    def write_whole(path, text):
        if Path(path).name == "latest":
            at_latest.append(list(reported))
        original(path, text)

    checkpoints._write_whole = write_whole
    try:
        data = jobs.batches(engine)
        for _ in range(3):
            engine.train_batch(data)
        engine.save_checkpoint(folder)
    finally:
        checkpoints._write_whole = original
    return sorted(os.listdir(folder)), at_latest


@pytest.mark.parametrize(
    "precision", [{}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}], ids=str
)
def test_reports_come_before_latest_and_scripts_that_cannot_work_are_not_left(tmp_path, precision):
    found = run_ranks(files_and_order, 2, str(tmp_path), precision)
    assert all(files == ["global_step3", "latest"] for files, _ in found)
    assert found[0][1] == [[3]]
