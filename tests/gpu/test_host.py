"""The host does not wait for the device, copies run beside kernels, and no memory is lost."""

import on_device
import pytest
from ranks import run_ranks

STEPS = 4
SAMPLED = {"mode": "local", "head": {"token_fraction": 0.25}}

pytestmark = pytest.mark.device


@pytest.fixture(scope="module", params=["local", "chunked", "backprop"])
def steps(request):
    """What the device and the host did on each of two ranks."""
    section = {
        "local": SAMPLED,
        "chunked": {"mode": "chunked", "split_backward": 1},
        "backprop": {"mode": "backprop"},
    }[request.param] | {"segments_per_stage": 2}
    return run_ranks(on_device.traced, 2, section, 2, STEPS, timeout=200, bf16={"enabled": True})


def test_the_host_waits_once_a_step(steps):
    """For what the optimizer, the reports and the finite check read."""
    for rank in steps:
        assert sum(rank["waits"].values()) <= STEPS, (rank["waits"], rank["warned"])


def test_copies_run_beside_kernels(steps):
    for rank in steps:
        assert rank["copies"]
    beside = sum(
        any(begin < k_end and k_begin < end for k_begin, k_end in rank["kernels"])
        for rank in steps
        for begin, end in rank["copies"]
    )
    assert beside > 0


@pytest.mark.parametrize("mode", ["local", "backprop"])
def test_memory_does_not_grow(mode):
    section = {"mode": mode, "segments_per_stage": 2}
    for early, late in run_ranks(on_device.memory, 2, section, 2, 200, timeout=200):
        assert late <= early + 4096
