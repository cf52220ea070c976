"""The report of a run: its figures are those of the folder, and it opens in a browser."""

import json
import re

import pytest
from browser import opened, shown
from commands import command
from sentences import assert_one_sentence
from written_runs import write_run

from ds_local.cli.report import main
from ds_local.errors import RunError
from ds_local.training.report import report
from ds_local.training.run_record import RunRecord


def test_the_figures_are_those_of_the_folder(tmp_path):
    phases = [{"until_step": 30, "mode": "local"}, {"mode": "backprop"}]
    page = report([RunRecord(write_run(tmp_path / "run", event=13, phases=phases))])
    assert "local, then backprop" in page
    assert "2 stages x 1 replica \u00b7" in page
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
    assert '<td>1</td><td class="n">40.0%</td><td class="n">1000</td>' in page
    assert "activation link 0 -&gt; 1 (100%)" in page
    assert '<td>1</td><td class="n">4.00</td>' in page
    assert (
        '<td class="n">13</td><td class="n">1</td><td class="n">1</td><td class="bad">loss</td>'
        in page
    )
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


def test_a_start_with_fewer_stages_that_has_reported_nothing_yet(tmp_path):
    run = write_run(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["layout"]["stages"] = 1
    (run / "run.json").write_text(json.dumps(facts))
    page = report([RunRecord(run)])
    assert "1 stage x 1 replica" in page
    assert '<td>1</td><td class="n">4.00</td><td class="n">-</td>' in page


def test_a_page_of_the_user_in_the_run_folder_is_left_alone(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("mine")
    result = command("report", run)
    assert result.returncode == 1
    assert_one_sentence(result.stderr.strip(), "report.html exists and was not written by this")
    assert (run / "report.html").read_text() == "mine"


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
    assert '<td class="bad">loss</td>' in page
    assert page.count("nothing was measured") == 5


def test_a_run_that_goes_on_with_fewer_stages_has_a_report(tmp_path):
    """Rows of four stages, then of the two that run.json knows."""
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [
        row | {"segment": row["segment"] + 2, "stage": row["stage"] + 2, "idle_share": 0.9}
        for row in rows
        if row["step"] <= 10
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more + rows))
    record = RunRecord(run)
    assert (record.stages, record.stages_now) == ([0, 1, 2, 3], [0, 1])
    assert record.final_loss == rows[-1]["loss"]
    assert "<td>3</td>" not in report([record])


def test_several_runs_beside_each_other(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", mode="backprop", event=13)
    output = tmp_path / "compared.html"
    assert main([str(one), str(two), "--output", str(output)]) == 0
    page = output.read_text()
    assert capsys.readouterr().out == f"report: {output}\n"
    assert '<tr><td>one</td><td>local</td><td class="n">40</td><td class="n">4.6000</td>' in page
    assert '<td>local_parallel.mode</td><td>"local"</td><td>"backprop"</td>' in page
    assert page.count("<tr><td>local_parallel.") == 1  # all else is the same
    assert page.count("<details><summary>two</summary>") == 1
    assert "The same in all runs." in report([RunRecord(one)] * 2)


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
