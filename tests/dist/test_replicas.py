"""Replicas that train apart: equality with plain training, with a one-process emulation, and exact resumption."""

from __future__ import annotations

import jobs
import pytest
import torch
from ranks import run_ranks

SUBNETS = {"sync": "subnets", "every": 2}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "replicas", [SUBNETS, {"sync": "periodic", "every": 2, "outer_lr": 1.0, "outer_momentum": 0.0}], ids=["subnets", "plain average"]
)
def test_one_replica_is_plain_training_bit_for_bit(family, replicas):
    plain = run_ranks(jobs.train, 2, {"mode": "local"}, 2, 5, family=family)
    apart = run_ranks(jobs.train, 2, {"mode": "local", "replicas": replicas}, 2, 5, family=family)
    for one, other in zip(plain, apart, strict=True):
        assert one["own"] == other["own"]
        assert one["eval"] == other["eval"]
        assert all(torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items())
