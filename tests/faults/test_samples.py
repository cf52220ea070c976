"""A few cases of every campaign; `python tests/faults/run.py` plays them all."""

import importlib
import json
import os

import pytest
from launch import fork_server
from samples import sampled
from workbench import Bench

SAMPLES = [
    ("kills", {"layout": "2x1", "kills": [[1, 0.6]]}),
    ("saves", {"kind": "again", "rank": 0, "operation": 58}),
    ("corruptions", {"what": "tensors", "kind": "a bit", "which": 0.5, "at": 0.5}),
    ("corruptions", {"what": "latest", "kind": "above", "which": 0.5, "at": 0.5}),
    ("nonfinite", {
        "row": "mix", "precision": "bf16 ZeRO-1", "stage": 1, "what": "gradient", "value": "nan",
        "policy": "once, skipped", "block": 0, "micro_batch": 1,
    }),
    ("settings", {"settings": {"local_parallel.link.depth": 10**9}, "names": ["depth"]}),
    ("settings", {"settings": {"optimizer.type": None, "optimizer.typ": "AdamW"}, "names": ["typ"]}),
    ("settings", {"options": {"max_steps": -1}, "names": ["max-steps"]}),
    ("inputs", {"input": "prepare: output is somebody's"}),
    ("inputs", {"input": "resume: another seed"}),
    ("stops", {"kind": "told", "layout": "2x1", "rank": 1, "signal": "SIGINT", "to": "one", "after": 2}),
    ("fill", {"what": "run", "how": "nearly full", "layout": "2x1", "after": 1}),
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(fork_server(), tmp_path_factory.mktemp("faults"))


# what tests/dist and tests/launchers play too
COVERED = [SAMPLES[1], SAMPLES[4], SAMPLES[10]]


@pytest.mark.parametrize(
    ("campaign", "case"),
    sampled([case for case in SAMPLES if case not in COVERED], SAMPLES),
    ids=lambda x: x if isinstance(x, str) else json.dumps(x)[:60],
)
def test_sample(bench, campaign, case):
    if campaign == "fill" and os.geteuid():
        pytest.skip("mounts a small disk, which needs root")
    outcome = bench.play(importlib.import_module(campaign).play, case)
    assert outcome.wrong == [], outcome.said
