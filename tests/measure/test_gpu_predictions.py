"""What the simulator makes of measured stages, worked out by hand."""

import pytest

from ds_local.config.catalog import name_of
from ds_local.measure.gpu_predictions import LINKS, PREDICTED, predictions
from ds_local.schedules.peers import PEERS
from ds_local.schedules.simulator import Costs, simulate

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


def test_chunks_pay_for_the_heads_of_stages_with_a_loss():
    headless = [ROW | {"stages": 4}] * 4
    heads = [ROW | {"stages": 4, "head": head} for head in (9.0, 1.0, 9.0, 0.0)]
    for schedule in ("chunked 2", "chunked 2, split 2"):
        plain, paid = (of(predictions(rows, 10, 4), schedule) for rows in (headless, heads))
        assert plain["step_seconds"] < paid["step_seconds"] < plain["step_seconds"] + 9
    assert of(predictions(headless, 10, 8), "chunked 2, split 2")["efficiency"] == pytest.approx(1)


def test_names_are_those_of_the_other_tables():
    for name, (mode, split) in PREDICTED.items():
        section = {"mode": mode} | ({"split_backward": split} if split else {})
        assert name_of(section) == name


def test_backprop_is_what_peers_run():
    rows = predictions([ROW] * 4, tokens=10, micro_batches=8)
    for schedule, peer in {
        "backprop": "1f1b",
        "backprop, split 1": "zero_bubble",
        "backprop, split 2": "zero_bubble_2",
    }.items():
        found, order = of(rows, schedule), PEERS[peer](4, 8)
        assert found["peak_live_micro_batches"] == list(order.peak_live)
        assert found["step_seconds"] == pytest.approx(simulate(order, Costs()).steady_period + 0.5)


def test_a_slow_link_is_waited_for():
    slow = ROW | {"activation_bytes": 1.25e8 * 5}  # five seconds at a gigabit a second
    rows = predictions([slow, slow], tokens=10, micro_batches=4)
    assert of(rows, "local", "1 Gb/s")["step_seconds"] == pytest.approx(4 * 5 + 0.5)
    assert of(rows, "local", "10 Gb/s")["step_seconds"] == pytest.approx(12.5)
