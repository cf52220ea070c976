"""The tables of a run's report, cell by cell."""

import json
import re

from written_runs import write_run

from ds_local.training.report_tables import (
    events_table,
    memory_table,
    samples_table,
    waits_table,
)
from ds_local.training.run_record import RunRecord


def record(tmp_path, *more, **how):
    folder = write_run(tmp_path / "run", **how)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    return RunRecord(folder)


def cells(table):
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]


def test_waits_of_each_stage(tmp_path):
    assert cells(waits_table(record(tmp_path))) == [
        ["0", "2.0%", "1000", "-"],
        ["1", "40.0%", "1000", "activation link 0 -&gt; 1 (100%)"],
    ]


def test_memory_beside_what_the_schedule_keeps_alive(tmp_path):
    assert cells(memory_table(record(tmp_path, mode="backprop"))) == [
        ["0", "3.00", "2"],
        ["1", "4.00", "1"],
    ]


def test_samples_are_the_newest_first_and_cannot_hold_html(tmp_path):
    rows = [
        {"step": step, "segment": 1, "stage": 1, "split": "sample", "loss": None}
        | {"prompt": "a <b", "text": f"> {step}", "tokens": 1, "seconds": 0.0}
        for step in range(1, 9)
    ]
    found = cells(samples_table(record(tmp_path, *rows)))
    assert [row[0] for row in found] == ["8", "7", "6", "5", "4", "3"]
    assert found[0][1] == "<pre>a &lt;b<b>&gt; 8</b></pre>"


def test_events_or_that_there_were_none(tmp_path):
    assert "Every loss and gradient was finite" in events_table(record(tmp_path))
    found = cells(events_table(record(tmp_path / "other", event=13)))
    assert found == [["13", "1", "1", "loss", "1"]]
