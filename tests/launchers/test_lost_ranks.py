"""A rank dies, hangs or is told to stop: everybody else ends in time, with a sentence that names
it."""

import signal

import pytest
from doomed import ended_at, finish, start
from samples import sampled

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize("doom", [0, 1, 2])
def test_a_killed_stage_ends_all_others_with_its_name(tmp_path, doom):
    outputs = finish(start(tmp_path, KILLED, doom))
    for rank, output in enumerate(outputs):
        if rank != doom:
            assert "ENDED" not in output
            assert f"stage {doom} (rank {doom})" in output, output[-2000:]


@pytest.mark.parametrize("doom", [0, 2])
def test_an_exception_on_one_stage_reaches_all_others(tmp_path, doom):
    outputs = finish(start(tmp_path, "raise RuntimeError('the disk is on fire')", doom))
    # the exception is outside train_batch, so the others learn of it by the connection
    for rank, output in enumerate(outputs):
        if rank != doom:
            assert f"stage {doom} (rank {doom})" in output, output[-2000:]


def test_an_error_inside_a_step_travels_with_its_words(tmp_path):
    fate = (
        "engine.module.run_segment = lambda *_: (_ for _ in ()).throw("
        "ValueError('the disk is on fire'))"
    )
    outputs = finish(start(tmp_path, fate, 1))
    assert all("the disk is on fire" in output for output in outputs), outputs
    assert "the run ended elsewhere: stage 1 (rank 1) at step 5: the disk is on fire" in outputs[2]
    assert "stage 1 (rank 1) at step 5: the disk is on fire" in outputs[0]


def test_a_hanging_stage_is_named_within_the_limit(tmp_path):
    run = start(tmp_path, STOPPED, 1)
    assert run.wait(200, ranks=[0, 2]), run.outputs()
    for rank in (0, 2):
        output = run.output(rank)
        assert "stage 1 (rank 1)" in output
        assert "nothing came within 8 s" in output or "the connection is gone" in output, output
    run.signal(signal.SIGCONT, 1)
    finish(run)


def test_a_dead_replica_is_named(tmp_path):
    outputs = finish(start(tmp_path, KILLED, 3, stages=2, ranks=4))
    assert "ENDED" not in "".join(outputs)
    # rank 2 averages gradients with rank 3, rank 1 sends to it
    assert "rank 3" in outputs[1], outputs[1][-2000:]
    assert "rank 3" in outputs[2], outputs[2][-2000:]


@pytest.mark.parametrize(
    ("told", "ranks", "stages"),
    sampled(
        [("last", 3, 3), ("all", 4, 2)],
        [("last", 3, 3), ("all", 4, 2), ("all", 3, 3), ("last", 4, 2)],
    ),
)
def test_a_stop_request_ends_all_ranks_at_the_same_step(tmp_path, told, ranks, stages):
    doom = "int(os.environ['RANK'])" if told == "all" else ranks - 1
    run = start(tmp_path, "engine.request_stop()", doom, stages, ranks=ranks)
    assert ended_at(finish(run)) < 5000


# --- replicas that train apart --------------------------------------------------------------------

APART = {"mode": "local", "replicas": {"sync": "subnets", "every": 4}}


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (KILLED, "(rank 1) is gone: its process has ended"),
        (STOPPED, "(rank 1) at the exchange between replicas"),
    ],
    ids=["dies", "lags"],
)
def test_a_replica_that_dies_or_lags_at_an_exchange_is_named(tmp_path, fate, said):
    section = {**APART, "link": {"timeout_seconds": 8}}
    output = finish(start(tmp_path, fate, 1, stages=1, ranks=2, section=section), ranks=[0])[0]
    assert said in output, output


def test_a_stop_request_ends_replicas_at_the_same_step(tmp_path):
    run = start(tmp_path, "engine.request_stop()", 1, stages=1, ranks=2, section=APART)
    assert ended_at(finish(run)) < 5000


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "segment", "allowed", "step"),
    sampled(
        [("local", 1, {"skip": 3}, 8), ("backprop", 2, "stop", 6)],
        [("local", 1, {"skip": 3}, 8), ("backprop", 2, {"skip": 3}, 8), ("backprop", 2, "stop", 6)],
    ),
)
def test_too_many_in_a_row_end_every_stage_with_the_name_of_the_first(
    tmp_path, mode, segment, allowed, step
):
    fate = (
        "sys.path.insert(1, sys.path[0] + '/dist'); import test_nonfinite; "
        f"test_nonfinite.inject(engine, [(n, 'loss', {segment}, 0) for n in range(5, 200)])"
    )
    section = {"mode": mode, "on_nonfinite": allowed, "link": {"timeout_seconds": 60}}
    run = start(tmp_path, fate, segment, section=section)
    outputs = finish(run)
    times = ", the 3rd time in a row" if step == 8 else ""
    said = (
        f"the loss of segment {segment} was not finite in step {step} on stage {segment}{times}; "
        "go on from"
    )
    for status, output in zip(run.statuses(), outputs, strict=True):
        assert status != 0
        assert "ENDED" not in output
        assert said in output, output[-2000:]
