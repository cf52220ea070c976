"""What came of a run: events are shown, not hidden behind a dash."""

import json

from ds_local.training.pictures import draw_losses, summary_table


def rows():
    found = []
    for step in (10, 20, 30):
        for segment in (0, 1):
            event = 17 if (step, segment) == (20, 1) else None
            found.append(
                {
                    "step": step,
                    "segment": segment,
                    "stage": segment,
                    "split": "train",
                    "loss": None if event or segment == 0 else 3.0,
                    "has_loss": segment == 1,
                    "tokens": step * 100,
                    "seconds": step * 1.0,
                    "idle_share": 0.25,
                    "step_seconds": 1.0,
                    "nonfinite": "loss" if event else None,
                    "nonfinite_step": event,
                    "skipped": int(segment == 1 and step > 10),
                }
            )
    last = {"step": 30, "split": "validation", "tokens": 3000, "seconds": 30.0}
    found.append(last | {"segment": 1, "stage": 1, "loss": None, "nonfinite": "loss"})
    return found


def test_the_table_tells_what_was_not_finite():
    lines = summary_table(rows()).splitlines()
    assert lines[0].split() == [
        "segment",
        "stage",
        "validation",
        "loss",
        "perplexity",
        "idle",
        "share",
        "skipped",
    ]
    assert lines[1].split() == ["0", "0", "-", "-", "25.0%", "0"]
    assert lines[2].split() == ["1", "1", "not", "finite", "-", "25.0%", "1"]
    assert lines[3] == "not finite: loss of segment 1 (stage 1) at step 17"
    assert "30 steps, 3,000 tokens" in lines[-1]


def test_the_table_has_the_segments_that_there_are_now():
    before = [row | {"segment": 2, "stage": 2, "step": 5} for row in rows() if row["step"] == 10]
    assert before
    assert summary_table(before + rows()) == summary_table(rows())


def test_rows_of_older_runs_are_still_read():
    old = [
        {k: v for k, v in row.items() if k not in ("has_loss", "nonfinite_step", "skipped")}
        for row in rows()
    ]
    assert len(summary_table(old).splitlines()) == 4
    untimed = [{k: row[k] for k in row if k not in ("step_seconds", "idle_share")} for row in old]
    assert summary_table(untimed).splitlines()[1].split()[-2:] == ["-", "0"]


def test_events_are_in_the_picture(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    draw_losses(metrics, tmp_path / "with.png")
    calm = [row for row in rows() if row.get("nonfinite_step") is None]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in calm))
    draw_losses(metrics, tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
