"""What stands behind the progress bar, to the letter."""

from ds_local.engine.reports import SegmentReport
from ds_local.training.progress import progress_line


def report(segment, loss, idle, link=None, event=None):
    return SegmentReport(
        step=9,
        segment=segment,
        stage=segment,
        loss=loss,
        grad_norm=None,
        lr=None,
        seconds=1.0,
        idle_share=idle,
        sent_bytes=0,
        exchanged_bytes=None,
        slowest_link=link,
        nonfinite=event,
        nonfinite_step=7 if event else None,
        skipped=2 if event else 0,
    )


def test_losses_pace_and_who_waits_most():
    reports = [report(0, None, 0.1), report(1, 3.14159, 0.3, "activation link 0 -> 1")]
    assert progress_line(reports, 12_345.6) == (
        "loss - 3.142 | 12,346 tokens/s | idle 20%, most on stage 1 30% for the activation link "
        "0 -> 1"
    )


def test_a_stage_that_waits_for_nobody_names_no_link():
    assert progress_line([report(0, 2.0, 0.0)], 10).endswith("| idle 0%, most on stage 0 0%")


def test_what_was_not_finite_is_said():
    line = progress_line([report(0, 1.0, 0.0), report(1, None, 0.0, event="gradient")], 1)
    assert line.endswith("| not finite: gradient of segment 1 at step 7, 2 skipped")
