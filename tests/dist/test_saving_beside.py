"""Asynchronous saves: training goes on meanwhile, and what is on the disk is as whole as ever. That
it is what was to be saved, in every precision, is shown in test_moving.py."""

import os
import threading
from pathlib import Path

import jobs
import pytest
import torch
from ranks import RankError, run_ranks
from small_disks import small_disk
from test_saving import empty, fill

BESIDE = {"mode": "local", "async_save": True}


def while_it_is_written(folder):
    """The writer is held up at its first file: steps, an evaluation and a step of the reports go
    by, then it may go on. Another save waits for the first."""
    engine = jobs.build(BESIDE, 2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    saved, go_on, write = jobs.state_of(engine), threading.Event(), engine.checkpoint_engine.save
    engine.checkpoint_engine.save = lambda **file: (go_on.wait(60), write(**file))
    engine.save_checkpoint(folder)
    for _ in range(2):
        engine.train_batch(data)
    engine.eval_batch(jobs.batches(engine, start=900))
    torch.distributed.barrier()
    before = os.listdir(folder)
    threading.Timer(0.2, go_on.set).start()
    engine.save_checkpoint(folder)
    after = Path(folder, "latest").read_text()
    engine.wait_for_save()
    again = jobs.build(BESIDE, 2)
    again.load_checkpoint(folder, "global_step1")
    same = all(torch.equal(t, saved[n]) for n, t in jobs.state_of(again).items())
    return before, after, Path(folder, "latest").read_text(), same


def test_training_goes_on_while_files_are_written(tmp_path):
    for before, after, at_last, same in run_ranks(while_it_is_written, 2, str(tmp_path)):
        assert [name for name in before if not name.startswith(".global_step1.")] == []
        assert (after, at_last) == ("global_step1", "global_step3")
        assert same


def fails_and_goes_on(folder):
    from ds_local.errors import SaveError

    engine, told, said = jobs.build(BESIDE, 2), [], []
    engine.saves.tell = lambda error: told.append(str(error))
    data = jobs.batches(engine)

    def save(waits):
        engine.train_batch(data)
        engine.save_checkpoint(folder)
        if waits:
            try:
                engine.wait_for_save()
            except SaveError as error:
                said.append(str(error))
        torch.distributed.barrier()

    save(waits=True)
    if engine.global_rank == 0:
        fill(folder)
    torch.distributed.barrier()
    save(waits=True)
    save(waits=False)  # nobody asks: the next save goes on all the same
    engine.saves.settle()
    torch.distributed.barrier()
    left = sorted(os.listdir(folder))
    torch.distributed.barrier()
    if engine.global_rank == 0:
        empty(folder)
    torch.distributed.barrier()
    save(waits=True)
    return said, told, left, sorted(os.listdir(folder))


def test_a_full_disk_is_told_and_stops_nothing(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=60") as disk:
        for said, told, left, at_last in run_ranks(fails_and_goes_on, 2, str(disk / "checkpoints")):
            assert len(said) == 1
            assert len(told) == 2
            assert said[0] == told[0]
            assert "No space left on device; the checkpoint needs" in said[0]
            assert ".partial" not in said[0]
            assert left == ["global_step1", "latest"]
            assert at_last == ["global_step1", "global_step4", "latest"]


def killed_while_it_writes(folder):
    engine = jobs.build(BESIDE, 2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    engine.wait_for_save()
    engine.train_batch(data)
    write, count = engine.checkpoint_engine.save, []

    def save(**file):
        count.append(1)
        if engine.global_rank == 1 and len(count) == 3:
            os._exit(9)
        write(**file)

    engine.checkpoint_engine.save = save
    engine.save_checkpoint(folder)
    engine.wait_for_save()


def found(folder):
    engine = jobs.build(BESIDE, 2)
    engine.load_checkpoint(folder)
    return engine.global_steps


def test_killed_while_a_thread_writes_the_older_one_is_whole(tmp_path):
    with pytest.raises(RankError):
        run_ranks(killed_while_it_writes, 2, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert run_ranks(found, 2, str(tmp_path)) == [1, 1]
