"""The bound and the memory of one candidate, worked out by hand."""

import pytest
from test_pricing import even

from ds_local.cluster.candidates import Candidate, Cluster
from ds_local.cluster.pricing import Pricing


def test_a_data_parallel_step_by_hand():
    cluster = Cluster(
        nodes=4, devices_per_node=1, tflops=1, memory_gib=1, link_gbps=1e-6, intra_gbps=1
    )
    price = Pricing(even(1), cluster, 8).price(Candidate(1, 4, "data parallel", "", 2, 1))
    # 100 fp32 parameters: each device sends 2 x 3/4 of 400 bytes over 125 bytes a second, after 2
    # sequences of 3 seconds
    assert price.step_seconds == pytest.approx(6 + 600 / 125)
    assert price.bytes_reduced == 600
    assert price.tokens == 80
    assert "averaging gradients" in price.loss


def test_memory_by_hand():
    pricing = Pricing(even(2, kept=50), Cluster(1, 2, 1, 80, 1, 1, reserve_gib=0), 8, zero_stage=0)
    local, true = (
        pricing.price(Candidate(2, 1, row, "", 4, 2)).memory for row in ("local", "backprop")
    )
    # 100 fp32 parameters with gradient and two moments; per live micro-batch 40 tokens x (50 kept +
    # 8 at the boundary) numbers
    assert local == 1600 + 40 * 58 * 4
    assert true == 1600 + 2 * 40 * 58 * 4
