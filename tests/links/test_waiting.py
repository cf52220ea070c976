"""Waiting for another rank: what is a lost peer, what is late, and who is named."""

import pytest
from torch import distributed as dist

from ds_local.errors import LostConnection, TransportError
from ds_local.links.waiting import EVERYBODY, WAITING, Waiter, is_late, is_lost

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"

BROKEN = RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:5313. 🏖️")

LATE = RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation")


@pytest.mark.parametrize(
    ("error", "lost", "late"),
    [
        (BROKEN, True, False),
        (LATE, True, True),
        (RuntimeError("Application timeout caused pair closure"), True, True),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//1"), True, True),
        (dist.DistNetworkError("The client socket has failed to connect"), True, False),
        (
            dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
            True,
            False,
        ),
        (
            RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"),
            True,
            True,
        ),
        (LostConnection("waited for stage 1", late=True), True, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, None),
        (
            dist.DistBackendError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"),
            False,
            None,
        ),
        (
            RuntimeError(f"[enforce fail at {GLOO}pair.cc:446] op.preamble.length <= op.nbytes"),
            False,
            None,
        ),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False, None),
        (ValueError("the request timed out"), False, None),
        (RuntimeError("my own timeout"), False, None),
        (ConnectionResetError("the hub"), False, None),
        (TransportError("other shapes"), False, None),
    ],
)  # fmt: skip
def test_only_errors_of_the_connection_are_taken_for_one(error, lost, late):
    assert is_lost(error) is lost
    if lost:
        assert is_late(error) is late


class Work:
    def __init__(self, error=None):
        self.error = error

    def wait(self, limit):
        if self.error is not None:
            raise self.error


def test_waiting_names_whom_and_lets_other_errors_pass():
    waiter = Waiter(5.0)
    waiter.wait_for(Work(), 1, "stage 1 (rank 1)", "to send step 2")
    with pytest.raises(
        LostConnection, match=r"waited for stage 1 \(rank 1\) to send step 2, but the connection"
    ) as gone:
        waiter.wait_for(Work(BROKEN), 1, "stage 1 (rank 1)", "to send step 2")
    assert not gone.value.late
    for error in (LATE, TimeoutError()):
        with pytest.raises(LostConnection, match="but nothing came within") as late:
            waiter.wait_for(Work(error), 1, "stage 1 (rank 1)", "to send step 2")
        assert late.value.late
    with pytest.raises(RuntimeError, match="CUDA error") as other:
        waiter.wait_for(Work(RuntimeError("CUDA error: bad")), 1, "stage 1", "to send step 2")
    assert not isinstance(other.value, TransportError)


def test_waits_are_known_while_they_last_and_counted():
    class Look:
        def wait(self, limit):
            seen.append((WAITING[0].rank, WAITING[0].purpose, limit.total_seconds()))

    seen, waiter = [], Waiter(5.0)
    waiter.wait_for(Look(), EVERYBODY, "all", "at the start")
    assert seen == [(EVERYBODY, "at the start", 5.0)]
    assert WAITING == []
    assert 0 < waiter.waited < 5
