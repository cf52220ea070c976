"""What a rank finds out alone."""

import os
import time

import pytest

from ds_local.cluster.surroundings import check_surroundings, read_hostfile, stale_lock
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
