"""What the console shows, to the letter."""

import math
from types import SimpleNamespace

import pytest

from ds_local.engine.reports import SegmentReport
from ds_local.training.callbacks import Validation
from ds_local.training.pace import Pace
from ds_local.training.progress import Progress, progress_line, validation_line

SPEEDS = {"tokens_per_second": 12_345.6, "device_tokens_per_second": 6_172.8, "mfu": None}


def report(segment, loss, idle, link=None, event=None, seconds=1.0, **more):
    return SegmentReport(
        step=9,
        segment=segment,
        stage=segment,
        loss=loss,
        grad_norm=more.get("grad_norm"),
        lr=more.get("lr"),
        seconds=seconds,
        idle_share=idle,
        sent_bytes=0,
        exchanged_bytes=None,
        memory_bytes=more.get("memory_bytes"),
        slowest_link=link,
        nonfinite=event,
        nonfinite_step=7 if event else None,
        skipped=2 if event else 0,
    )


def test_losses_rate_norms_pace_and_who_waits_most():
    reports = [
        report(0, None, 0.1, grad_norm=1.23456, lr=3e-4),
        report(1, 3.14159, 0.3, "activation link 0 -> 1", grad_norm=0.5, lr=3e-4),
    ]
    assert progress_line(reports, SPEEDS) == (
        "loss - 3.142 | lr 0.0003 | norm 1.23 0.5 | 12,346 tokens/s | idle 20%, most on stage 1 "
        "30% for the activation link 0 -> 1"
    )


def test_on_devices_also_each_ones_pace_use_and_memory():
    reports = [
        report(0, 1.0, 0.0, memory_bytes=2**30),
        report(1, 1.0, 0.0, memory_bytes=3 * 2**30),
    ]
    line = progress_line(reports, {**SPEEDS, "mfu": 0.414})
    assert "12,346 tokens/s (6,173 a device, MFU 41%, 3.0 GiB)" in line


def test_a_stage_that_waits_for_nobody_names_no_link():
    assert progress_line([report(0, 2.0, 0.0)], SPEEDS).endswith("| idle 0%, most on stage 0 0%")
    line = progress_line([report(0, 2.0, 0.04, "activation link 0 -> 1")], SPEEDS)
    assert line.endswith("| idle 4%, most on stage 0 4%")  # nor one that waits little


def test_what_was_not_finite_is_said():
    line = progress_line([report(0, 1.0, 0.0), report(1, None, 0.0, event="gradient")], SPEEDS)
    assert line.endswith("| not finite: gradient of segment 1 at step 7, 2 skipped")


def validated(step, losses, is_best=False):
    return Validation(step, losses, losses[max(losses)], is_best, 0 if is_best else 1, {}, {}, {})


@pytest.mark.parametrize(
    ("validation", "line"),
    [
        (validated(0, {0: 4.0, 1: 3.0}, True), "step 0: validation loss 4.000 3.000"),
        (validated(5, {1: 2.0, 0: 2.5}, True), "step 5: validation loss 2.500 2.000"),
        (validated(9, {0: 2.5}), "step 9: validation loss 2.500"),
    ],
)
def test_a_line_for_each_validation(validation, line):
    perplexity = f", perplexity {math.exp(validation.loss):.2f}"
    best = "; the best so far" if validation.step == 5 else ""
    assert validation_line(validation) == line + perplexity + best


def test_a_validation_that_is_not_finite_says_where():
    line = validation_line(validated(3, {0: 1.0, 1: math.nan}))
    assert line == "step 3: validation loss 1.000 nan; that of segments [1] is not finite"


def test_a_log_file_gets_a_line_for_each_report_and_the_first_one_pays_for_the_start(capsys):
    progress, run = (
        Progress(0, 20, Pace(1000, 2, lambda _: 0.0, None)),
        SimpleNamespace(max_steps=20),
    )
    for seconds in (50.0, 1.0, 3.0):
        progress.on_report(run, [report(0, 2.0, 0.0, seconds=seconds)])
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("step 9/20 | loss 2.000 | ") for line in lines)
    assert [line.split(" | ")[2] for line in lines] == [
        "20 tokens/s",
        "1,000 tokens/s",
        "500 tokens/s",
    ]
