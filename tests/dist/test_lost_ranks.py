"""A rank dies, hangs or is told to stop: everybody else ends in time, with a sentence that names
it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port

SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
import jobs, torch, signal
section, stages, doom, step = {section!r}, {stages}, {doom}, {step}
engine = jobs.build(section, stages)
data = jobs.batches(engine)
print("READY", flush=True)
for number in range(200):
    if engine.global_rank == doom and number == step:
        {fate}
    engine.train_batch(data)
    time.sleep(0.02)
    if engine.should_stop:
        break
print("ENDED", engine.global_steps, flush=True)
torch.distributed.barrier()
"""


def start(tmp_path, fate, doom, stages=3, step=5, section=None, ranks=None):
    section = {"mode": "local", "link": {"timeout_seconds": 8}} if section is None else section
    tests = str(Path(__file__).parents[1])
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=tests, section=section, stages=stages, doom=doom, step=step, fate=fate)
    )
    port = free_port()
    processes = []
    for rank in range(ranks or stages):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks or stages),
            "LOCAL_SIZE": str(ranks or stages),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes, timeout=60):
    """Output of each process; a process that does not end in time is killed and fails the test."""
    deadline = time.monotonic() + timeout
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
    finally:
        for process in processes:
            process.kill()
    return outputs


@pytest.mark.parametrize("doom", [0, 1, 2])
def test_a_killed_stage_ends_all_others_with_its_name(tmp_path, doom):
    processes = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", doom)
    outputs = finish(processes)
    for rank, output in enumerate(outputs):
        if rank != doom:
            assert "ENDED" not in output
            assert f"stage {doom} (rank {doom})" in output, output[-2000:]


@pytest.mark.parametrize("doom", [0, 2])
def test_an_exception_on_one_stage_reaches_all_others(tmp_path, doom):
    outputs = finish(
        start(tmp_path, "raise RuntimeError('the disk is on fire')", doom, section=None)
    )
    # the exception is outside train_batch, so the others learn of it by the connection
    for rank, output in enumerate(outputs):
        if rank != doom:
            assert f"stage {doom} (rank {doom})" in output, output[-2000:]


def test_an_error_inside_a_step_travels_with_its_words(tmp_path):
    failing = "lambda *_: (_ for _ in ()).throw(ValueError('the disk is on fire'))"
    fate = f"engine.module.run_segment = {failing}"
    outputs = finish(start(tmp_path, fate, 1))
    assert all("the disk is on fire" in output for output in outputs), outputs
    assert "the run ended elsewhere: stage 1 (rank 1) at step 5: the disk is on fire" in outputs[2]
    assert "stage 1 (rank 1) at step 5: the disk is on fire" in outputs[0]


def test_a_hanging_stage_is_named_within_the_limit(tmp_path):
    began = time.monotonic()
    processes = start(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)", 1)
    for process in (processes[0], processes[2]):
        output = process.communicate(timeout=90)[0]
        assert "stage 1 (rank 1)" in output
        assert "nothing came within 8 s" in output or "the connection is gone" in output, output[
            -2000:
        ]
    assert time.monotonic() - began < 90
    processes[1].send_signal(signal.SIGCONT)
    finish(processes)


def test_a_dead_replica_is_named(tmp_path):
    outputs = finish(start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 3, stages=2, ranks=4))
    assert "ENDED" not in "".join(outputs)
    # rank 2 averages gradients with rank 3, rank 1 sends to it
    assert "rank 3" in outputs[1], outputs[1][-2000:]
    assert "rank 3" in outputs[2], outputs[2][-2000:]


@pytest.mark.parametrize(
    ("told", "ranks", "stages"),
    [
        ("last", 3, 3),
        ("all", 4, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("all", 3, 3), ("last", 4, 2))),
    ],
)
def test_a_stop_request_ends_all_ranks_at_the_same_step(tmp_path, told, ranks, stages):
    fate = "engine.request_stop()"
    doom = "int(os.environ['RANK'])" if told == "all" else ranks - 1
    outputs = finish(start(tmp_path, fate, doom, stages, ranks=ranks))
    steps = {line for output in outputs for line in output.splitlines() if line.startswith("ENDED")}
    assert len(steps) == 1, outputs
    assert int(steps.pop().split()[1]) < 60
