"""torch.compile per stage: the same training, faster where it is used."""

import os
import shutil

import jobs
import pytest
from ranks import RankError, run_ranks

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="torch.compile on a CPU needs a C++ compiler",
)


def compiled(section, stages, own_call=False):
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = (
        "1"  # no pool of processes that would outlive the test
    )
    from torch._dynamo.utils import counters

    counters.clear()
    engine = jobs.build({**section, "link": {"timeout_seconds": 250}}, stages)
    if own_call:
        engine.compile(backend="eager")
    data = jobs.batches(engine)
    losses = [engine.train_batch(data).item() for _ in range(4)]
    return {"losses": losses, "graphs": counters["stats"]["unique_graphs"]}


@needs_compiler
def test_compiled_stages_learn_what_plain_ones_learn():
    section = {"mode": "local", "head": {"blocks": 1}}
    plain = run_ranks(compiled, 2, section, 2)
    fast = run_ranks(compiled, 2, {**section, "compile": True}, 2, timeout=280)
    for one, other in zip(plain, fast, strict=True):
        assert one["graphs"] == 0
        assert other["graphs"] > 0
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_the_engine_is_compiled_as_deepspeeds_is():
    plain, own = (
        run_ranks(compiled, 1, {"segments_per_stage": 2}, 1, own_call=own)[0]
        for own in (False, True)
    )
    assert own["graphs"] > 0
    assert own["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def without_compiler():
    saved = dict(os.environ)
    os.environ["PATH"] = "/nowhere"
    os.environ.pop("CXX", None)
    try:
        jobs.build({"compile": True}, 1)
    finally:
        os.environ.update(saved)


def test_a_missing_compiler_is_said_before_training():
    with pytest.raises(RankError, match="needs a C\\+\\+ compiler on a CPU"):
        run_ranks(without_compiler, 1)
