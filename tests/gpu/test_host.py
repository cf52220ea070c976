"""The host does not wait for the device, copies run beside kernels, and no memory is lost."""

import on_device
import pytest
from ranks import run_ranks

STEPS = 4
DEEPSPEED = 5  # times that DeepSpeed's bf16 optimizer waits at the end of a step, at most
ROWS = {
    "local": {"mode": "local", "head": {"token_fraction": 0.25}},
    "chunked": {"mode": "chunked", "split_backward": 1},
    "backprop": {"mode": "backprop"},
}

pytestmark = pytest.mark.device


@pytest.fixture(scope="module", params=ROWS)
def steps(request):
    """What the device and the host did on each of two ranks, in bf16."""
    return run(request.param, bf16={"enabled": True})


def run(row, **settings):
    section = ROWS[row] | {"segments_per_stage": 2}
    return run_ranks(on_device.traced, 2, section, 2, STEPS, timeout=200, **settings)


def test_the_host_waits_once_a_step():
    """For what the optimizer, the reports and the finite check read."""
    for rank in run("local"):
        assert sum(rank["waits"].values()) <= STEPS, (rank["waits"], rank["warned"])


def test_in_bf16_it_waits_for_deepspeed_too(steps):
    for rank in steps:
        waits = sum(rank["waits"].values())
        assert waits <= STEPS * (1 + DEEPSPEED), (rank["waits"], rank["warned"])


@pytest.mark.parametrize("row", ["local", "chunked"])
def test_copies_run_beside_kernels(row):
    """Not so with backpropagation on two ranks that share a device: they wait for each other."""
    ranks = run(row, bf16={"enabled": True})
    beside = sum(
        any(begin < k_end and k_begin < end for k_begin, k_end in rank["kernels"])
        for rank in ranks
        for begin, end in rank["copies"]
    )
    assert all(rank["copies"] for rank in ranks)
    assert beside > 0


@pytest.mark.parametrize("mode", ["local", "backprop"])
def test_memory_does_not_grow(mode):
    section = {"mode": mode, "segments_per_stage": 2}
    for early, late in run_ranks(on_device.memory, 2, section, 2, 200, timeout=200):
        assert late <= early + 4096
