"""A small training script on ranks of the fork server, in which something befalls one rank."""

from __future__ import annotations

from pathlib import Path

import launch
from fork_client import Run

SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
import jobs, torch, signal
section, stages, doom, step = {section!r}, {stages}, {doom}, {step}
engine = jobs.build(section, stages)
data = jobs.batches(engine)
for number in range(5000):
    if engine.global_rank == doom and number == step:
        {fate}
    engine.train_batch(data)
    time.sleep(0.02)
    if engine.should_stop:
        break
print("ENDED", engine.global_steps, flush=True)
torch.distributed.barrier()
"""


def start(tmp_path, fate, doom, stages=3, step=5, section=None, ranks=None) -> Run:
    """Args:
    fate: a statement for rank `doom` before it runs step `step`.
    """
    section = {"mode": "local", "link": {"timeout_seconds": 8}} if section is None else section
    tests = str(Path(__file__).parents[1])
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=tests, section=section, stages=stages, doom=doom, step=step, fate=fate)
    )
    # what is left of a lost neighbour must not hold up the end either
    return launch.start(str(script), ranks=ranks or stages, unloads=True)


def finish(run: Run, timeout: float = 200, ranks: list[int] | None = None) -> list[str]:
    """Output of each rank, once all of them, or those named, have ended."""
    in_time = run.wait(timeout, ranks)
    run.close()
    assert in_time, run.outputs()
    return [run.output(rank) for rank in range(len(run.pids))]


def ended_at(outputs: list[str]) -> int:
    """The step at which every rank ended."""
    lines = [line for output in outputs for line in output.splitlines() if line[:5] == "ENDED"]
    assert len(lines) == len(outputs), outputs
    assert len(set(lines)) == 1, outputs
    return int(lines[0].split()[1])
