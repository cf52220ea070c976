"""The report of a run: its figures are those of the folder, and it opens in a browser."""

import json
import re

import pytest
from browser import opened, shown

from ds_local.charts.plots import Curve, chart, ticks
from ds_local.cli.report import main
from ds_local.errors import RunError
from ds_local.training.report import report, what_next
from ds_local.training.run_record import RunRecord, thinned

STEPS, PER_STEP = 40, 512


def write_run(folder, event=None, idle=(0.02, 0.4), rising=False, **section):
    """A run of two stages, told by its rows."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(2, STEPS + 1, 2):
        for segment in (0, 1):
            bad = event is not None and segment == 1 and step == event + 1
            rows.append(
                {
                    "step": step,
                    "segment": segment,
                    "stage": segment,
                    "split": "train",
                    "loss": None if bad else 6 - step / 20 - segment / 10,
                    "has_loss": True,
                    "tokens": step * PER_STEP,
                    "seconds": step * 2.0,
                    "nonfinite": "loss" if bad else None,
                    "nonfinite_step": event if bad else None,
                    "skipped": int(event is not None and step > event and segment == 1),
                    "grad_norm": 1.5 + segment,
                    "lr": 0.001 * step,
                    "idle_share": idle[segment],
                    "step_seconds": 2.0,
                    "sent_bytes": 1000,
                    "exchanged_bytes": None,
                    "slowest_link": "activation link 0 -> 1" if segment else None,
                }
            )
            if step % 20 == 0:
                rows.append(
                    {
                        "step": step,
                        "segment": segment,
                        "stage": segment,
                        "split": "validation",
                        "loss": 5.0 + (step / 100 if rising else -step / 100),
                        "memory_bytes": (3 + segment) * 2**30,
                        "tokens": step * PER_STEP,
                        "seconds": step * 2.0,
                    }
                )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "local_parallel": section or {"mode": "local"},
    }
    facts = {
        "arguments": {"max_steps": STEPS},
        "config": config,
        "layout": {"stages": 2, "replicas": 1},
        "versions": {"torch": "2.99"},
        "starts": [{"step": 0, "time": "2026-01-01T00:00:00+00:00", "host": "node7"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_the_figures_are_those_of_the_folder(tmp_path):
    phases = [{"until_step": 30, "mode": "local"}, {"mode": "backprop"}]
    page = report([RunRecord(write_run(tmp_path / "run", event=13, phases=phases))])
    assert "local, then backprop" in page
    assert "2 stages x 1 replicas" in page
    assert "40 steps, 20,480 tokens" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))
    losses, *_ = data
    assert [c["name"] for c in losses["curves"]] == [
        "",
        "segment 0 measured",
        "",
        "segment 1 measured",
    ]
    assert losses["curves"][1]["points"] == [[20, 4.8], [40, 4.6]]
    assert len(losses["curves"][0]["points"]) == 20
    assert [14, None] in losses["curves"][2]["points"]  # not finite: a gap
    idle = next(chart for chart in data if chart["percent"])
    assert idle["curves"][1]["points"][0] == [2, 0.4]
    # tables: idle share and bytes, memory, events, versions, starts
    assert "<td>1</td><td class=n>40.0%</td><td class=n>1000</td>" in page
    assert "activation link 0 -&gt; 1 (100%)" in page
    assert "<td>1</td><td class=n>4.00</td>" in page
    assert "<td class=n>13</td><td class=n>1</td><td class=n>1</td><td class=bad>loss</td>" in page
    assert "torch 2.99" in page
    assert "node7" in page
    assert "steps 2 to 2: idle 40.0%, longest for the activation link 0 -&gt; 1" in page
    assert "256" in page  # tokens a second: 512 in 2 s


def test_it_needs_nothing_from_elsewhere(tmp_path):
    page = report([RunRecord(write_run(tmp_path / "run"))])
    urls = set(re.findall(r"https?://[^\"' ]+", page))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert '<link rel="icon" href="data:,">' in page
    assert "src=" not in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"event": 13},
            "Numbers were not finite, 1 times in the reports, first at step 13: loss of segment 1",
        ),
        ({"rising": True}, "was best at step 20 (5.2000) and is 5.4000 now"),
        ({}, "Stage 1 is the idlest: it waits 40% of its time, mostly for the activation link 0"),
        ({}, "Stage 0 waits least (2%), so it has the most work"),
        ({"idle": (0.01, 0.02)}, "No stage waits much: the idlest, stage 1, 2.0% of its time."),
        ({"idle": (0.1, 0.13), "mode": "backprop"}, "The schedule alone explains 11%"),
        ({"idle": (0.3, 0.4)}, "All stages wait alike"),
    ],
    ids=["event", "rising", "idlest", "why", "busy", "schedule", "links"],
)
def test_it_says_where_to_look(tmp_path, options, said):
    told = " ".join(what_next(RunRecord(write_run(tmp_path / "run", **options))))
    assert said in told


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


def test_folders_of_older_runs_are_read_as_far_as_they_go(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    (run / "trace.json").write_text("[]")
    page = report([RunRecord(run)])
    assert "run.json is missing or damaged" in page
    with pytest.raises(RunError, match="holds no metrics"):
        RunRecord(tmp_path)


def test_a_run_that_ended_in_its_first_step_has_a_report(tmp_path):
    row = {"step": 1, "segment": 0, "stage": 0, "tokens": 512, "seconds": 0.0, "loss": None}
    event = row | {"split": "event", "nonfinite": "loss", "nonfinite_step": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    page = report([RunRecord(tmp_path)])
    assert "<td class=bad>loss</td>" in page
    assert page.count("nothing was measured") == 5


def test_several_runs_beside_each_other(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", mode="backprop", event=13)
    output = tmp_path / "compared.html"
    assert main([str(one), str(two), "--output", str(output)]) == 0
    page = output.read_text()
    assert capsys.readouterr().out == f"report: {output}\n"
    assert "<tr><td>one</td><td>local</td><td class=n>40</td><td class=n>4.6000</td>" in page
    assert (
        "<td>local_parallel.mode</td><td>&quot;local&quot;</td><td>&quot;backprop&quot;</td>"
        in page
    )
    assert page.count("<details><summary>two</summary>") == 1


def test_peaks_survive_thinning():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5_003] = (5_003.0, 99.0)
    points[7_001] = (7_001.0, None)
    kept = thinned(points, 100)
    assert len(kept) <= 400
    assert (5_003.0, 99.0) in kept
    assert kept == sorted(kept, key=lambda p: p[0])


def test_axes_have_round_numbers():
    assert ticks(0.0, 1.0, 5) == [
        (0.0, "0"),
        (0.2, "0.2"),
        (0.4, "0.4"),
        (0.6000000000000001, "0.6"),
        (0.8, "0.8"),
        (1.0, "1"),
    ]
    assert [text for _, text in ticks(0, 3e6, 3)] == ["0", "1M", "2M", "3M"]
    assert [text for _, text in ticks(0.0, 4e-4, 4)] == [
        "0",
        "0.0001",
        "0.0002",
        "0.0003",
        "0.0004",
    ]


def test_a_curve_is_where_its_values_are():
    drawing = chart(
        "t",
        [Curve("", "#123456", [(0, 0.0), (1, None), (2, 1.0)])],
        "x",
        "y",
        y_range=(0.0, 1.0),
        size=(200, 190),
    )
    # left 58, right 22, top 50, bottom 40
    assert 'd="M58 150M178 50"' in drawing.inline().replace(".0", "")


def test_it_opens_in_a_browser(tmp_path):
    output = tmp_path / "report.html"
    run = write_run(tmp_path / "run", event=13)
    assert main([str(run), "--output", str(output)]) == 0
    look = """
    const drawings = [...document.querySelectorAll('main svg')];
    show(drawings.length);
    const drawn = d => d.querySelectorAll('path,rect').length;
    show(drawings.every(d => d.getBoundingClientRect().width > 300 && drawn(d)));
    const losses = document.querySelector('#chart0 svg'), box = losses.getBoundingClientRect();
    const data = JSON.parse(document.getElementById('data').textContent)[0];
    const x = box.left + data.right * box.width / data.width - 1;
    losses.dispatchEvent(new MouseEvent('mousemove', {clientX: x, clientY: box.top + 100}));
    show(document.getElementById('tip').textContent);
    losses.dispatchEvent(new MouseEvent('mouseleave'));
    show(document.getElementById('tip').hidden);
    """
    dom, complaints = opened(output, tmp_path, look)
    assert complaints == []
    count, fine, values, hidden = shown(dom)
    # losses, rate, norms, pace, idle, where the time goes, waits, one step
    assert (count, fine, hidden) == ("8", "true", "true")
    assert values.splitlines()[0] == "step 40"
    assert "segment 1 measured  4.6" in values
