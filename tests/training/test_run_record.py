"""What a run folder says of its run."""

import json

from written_runs import write_run

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
