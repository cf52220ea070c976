"""What a rank finds out alone."""

import os
import socket
import time

import pytest
from sentences import assert_one_sentence

from ds_local.cluster.surroundings import (
    check_surroundings,
    complete_environment,
    free_port,
    read_hostfile,
    stale_lock,
)
from ds_local.errors import ClusterError


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth77"}, "GLOO_SOCKET_IFNAME is eth77 but the interfaces are"),
        ({"NCCL_SOCKET_IFNAME": "ib9"}, "NCCL_SOCKET_IFNAME is ib9"),
        (
            {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
            "2 of the 4 ranks are on other machines",
        ),
    ],
)
def test_surroundings_that_cannot_work(environment, said):
    with pytest.raises(ClusterError, match=said):
        check_surroundings({"RANK": "1", **environment})


def test_a_stale_build_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert stale_lock() is None  # somebody is building
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(
        ClusterError, match=r"shm/lock was left behind by a build that was killed.*remove it"
    ):
        check_surroundings({})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read the hostfile"),
        ("", "names no host"),
        ("a slots=2\na slots=2\n", "line 2 of .* names a again"),
        ("a 2\n", "line 1 of .* write `HOST slots=N`"),
        ("a slots=0\n", "line 1 of"),
    ],
)
def test_hostfiles_that_cannot_work(tmp_path, text, said):
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClusterError, match=said):
        read_hostfile(path)


def test_a_hostfile(tmp_path):
    (tmp_path / "hostfile").write_text("# two machines\nnode-a slots=8\nnode-b slots=4  # half\n")
    assert read_hostfile(tmp_path / "hostfile") == {"node-a": 8, "node-b": 4}


def completed(**environment):
    complete_environment(environment)
    return environment


MASTER = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


def test_a_process_without_a_launcher_is_the_only_one():
    alone = completed()
    assert int(alone.pop("MASTER_PORT")) > 0
    assert alone == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert completed(MASTER_PORT="7", LOCAL_RANK="0")["MASTER_PORT"] == "7"
    again = completed()
    complete_environment(again)
    assert again == completed(**again)


@pytest.mark.parametrize(
    ("theirs", "rank"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "3"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            "3",
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, "3"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, "3"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "LOCAL_RANK": "1"}, "0"),  # a batch script
    ],
)
def test_other_launchers_are_understood(theirs, rank):
    found = completed(**theirs, **MASTER)
    assert (found["RANK"], found["LOCAL_RANK"]) == (rank, "1")
    assert found["WORLD_SIZE"] == ("1" if rank == "0" else "4")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, WORLD_SIZE is 2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, WORLD_SIZE is 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is one"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "no MASTER_ADDR and no MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "no LOCAL_RANK"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"},
            "rank 0 of 4 finds no MASTER_ADDR",
        ),
        (
            {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"},
            "replace --cpu by --multi_gpu",
        ),
    ],
)
def test_launchers_that_do_not_say_enough(environment, said):
    with pytest.raises(ClusterError, match=said) as error:
        complete_environment(environment)
    assert_one_sentence(error.value)


def test_a_port_that_somebody_listens_at_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free, order = free_port(), [taken.getsockname()[1]]
        assert 20000 <= free < 32768
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: order)
        with pytest.raises(ClusterError, match="none of 1,000 ports"):
            free_port()
        order.append(free)
        assert free_port() == free
