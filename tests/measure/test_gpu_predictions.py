"""What the simulator makes of measured stages, worked out by hand."""

import pytest

from ds_local.measure.gpu_predictions import LINKS, PREDICTED, predictions

ROW = {
    "model": "m",
    "stages": 2,
    "compiled": False,
    "forward": 1.0,
    "input_grad": 1.0,
    "weight_grad": 1.0,
    "head": 0.0,
    "optimizer": 0.5,
    "activation_bytes": 0,
}


def of(rows, schedule, link="NVLink 450 GB/s"):
    (found,) = [r for r in rows if r["schedule"] == schedule and r["link"]["name"] == link]
    return found


def test_a_row_for_each_link_and_schedule():
    rows = predictions([ROW, ROW], tokens=10, micro_batches=4)
    assert len(rows) == len(LINKS) * len(PREDICTED)
    assert {row["what"] for row in rows} == {"prediction"}
    assert (rows[0]["model"], rows[0]["stages"], rows[0]["compiled"]) == ("m", 2, False)


def test_stages_without_heads():
    rows = predictions([ROW, ROW], tokens=10, micro_batches=4)
    local, true = of(rows, "local"), of(rows, "backprop")
    assert local["efficiency"] == pytest.approx(1.0)
    assert local["step_seconds"] == pytest.approx(12.5)  # the update is not overlapped
    assert local["tokens_per_second"] == pytest.approx(40 / 12.5)
    assert true["efficiency"] == pytest.approx(4 / 5)
    assert true["peak_live_micro_batches"] == [2, 1]


def test_only_local_training_pays_for_heads_and_all_for_the_readout():
    rows = predictions([ROW | {"head": 1.5}, ROW | {"head": 3.0}], tokens=10, micro_batches=4)
    useful = (3 + 6) / 2  # of a stage in the mean, the readout's loss with the last
    local, true = of(rows, "local"), of(rows, "backprop")
    assert local["efficiency"] == pytest.approx(4 * useful / (4 * 6))
    assert true["step_seconds"] - 0.5 == pytest.approx(4 * 6 + 3)  # filled and drained over stage 0


def test_a_slow_link_is_waited_for():
    slow = ROW | {"activation_bytes": 1.25e8 * 5}  # five seconds at a gigabit a second
    rows = predictions([slow, slow], tokens=10, micro_batches=4)
    assert of(rows, "local", "1 Gb/s")["step_seconds"] == pytest.approx(4 * 5 + 0.5)
    assert of(rows, "local", "10 Gb/s")["step_seconds"] == pytest.approx(12.5)
