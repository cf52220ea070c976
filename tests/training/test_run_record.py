"""What a run folder says of its run."""

import json

import pytest
from written_runs import PER_STEP, STEPS, write_run

from ds_local.errors import RunError
from ds_local.training.run_record import RunRecord, thinned


def test_the_step_as_executed_where_it_was_recorded(tmp_path):
    run = RunRecord(write_run(tmp_path / "run"))
    band, unit, how = run.step_picture()
    assert how.startswith("simulated")
    assert unit == "units"
    assert len(band.pieces) == 2 * 8 * 2
    events = [
        {
            "name": name,
            "ph": "X",
            "pid": 0,
            "tid": stage,
            "ts": 1e6 * (10 * step + n),
            "dur": 5e5,
            "args": {"step": step},
        }
        for step in (38, 39)
        for stage in (0, 1)
        for n, name in enumerate(("ForwardPass", "RecvGrad", "GradientPass", "OptimizerStep"))
    ]
    (run.path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    band, unit, how = RunRecord(run.path).step_picture()
    assert how.startswith("as executed")
    assert unit == "seconds"
    assert [(p.kind, p.start, p.end) for p in band.pieces if p.stage == 1] == [
        ("F", 0.0, 0.5),
        ("B", 2.0, 2.5),
        ("U", 3.0, 3.5),
    ]


def test_peaks_survive_thinning():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5_003] = (5_003.0, 99.0)
    points[7_001] = (7_001.0, None)
    kept = thinned(points, 100)
    assert len(kept) <= 400
    assert (5_003.0, 99.0) in kept
    assert kept == sorted(kept, key=lambda p: p[0])


def test_figures_are_read_by_segment_and_by_stage(tmp_path):
    run = RunRecord(write_run(tmp_path / "run"))
    assert (run.segments, run.stages, run.last_step, run.tokens) == (
        [0, 1],
        [0, 1],
        STEPS,
        STEPS * PER_STEP,
    )
    assert run.points("train", 1, "loss")[1] == (4, 5.7)
    assert run.points("validation", 0, "loss", x="tokens") == [
        (20 * PER_STEP, 4.8),
        (40 * PER_STEP, 4.6),
    ]
    assert run.pace[0] == (2, PER_STEP / 2.0)
    assert run.memory == {0: 3 * 2**30, 1: 4 * 2**30}
    assert run.final_loss == 4.6


def test_waits_are_shares_of_the_reports(tmp_path):
    run = RunRecord(write_run(tmp_path / "run"))
    assert run.mean("idle_share", 1) == pytest.approx(0.4)
    assert run.mean("nothing", 1) == 0.0
    assert run.waits(1) == {"activation link 0 -> 1": 1.0}
    assert run.waits(0) == {}
    stretches = run.waiting(1, most=3)
    assert [one[:2] for one in stretches] == [(2, 14), (16, 28), (30, 40)]
    assert stretches[0][2:] == (pytest.approx(0.4), "activation link 0 -> 1")


def test_the_plan_says_what_was_to_happen(tmp_path):
    phases = [{"until_step": 30, "mode": "local"}, {"mode": "backprop"}]
    run = RunRecord(write_run(tmp_path / "run", phases=phases))
    assert run.phases == [(0, 30, "local"), (30, 40, "backprop")]
    assert run.expected_idle == [0.0, 0.0]
    (run.path / "run.json").write_text("{}")
    bare = RunRecord(run.path)
    assert (bare.plan, bare.phases, bare.expected_idle) == (None, [], None)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is it a run folder"):
        RunRecord(tmp_path)
