"""Tokens per second of a device over stages and replicas, on clusters worked out by hand."""

import xml.dom.minidom

import pytest
from launch import ROOT

from ds_local.cluster.candidates import Candidate, Cluster, Model
from ds_local.cluster.pricing import Pricing
from ds_local.cluster.scaling import ALONE, MOST_DEVICES, picture, scaling, tables
from ds_local.model import families
from ds_local.model.flops import UnitCosts

FREE = Cluster(1, 8, tflops=1, memory_gib=80, link_gbps=1e9, intra_gbps=1e9, latency_seconds=0)


def model_of(depth=8, params=0):
    """One second for a block and sequence, of one token; nothing else takes time."""
    costs = UnitCosts(1.0, 0.0, [0.0])
    return Model(depth, 1, 1, costs, None, params, 0, 0, kept=0, itemsize=4)


def grid(cells, scheme):
    return {
        (cell.stages, cell.replicas): cell.price and cell.price.device_tokens_per_second
        for cell in cells
        if cell.scheme == scheme
    }


def test_local_stages_lose_nothing_and_backprop_its_bubble():
    cells = scaling(model_of(), FREE, 8, ["full"], [ALONE, "local", "backprop"], growing=True)
    assert grid(cells, ALONE) == pytest.approx(dict.fromkeys([(1, 4**n) for n in range(6)], 1 / 8))
    local = grid(cells, "local")
    assert local == pytest.approx(dict.fromkeys(local, 1 / 8))
    backprop = grid(cells, "backprop")
    # 8 micro-batches on 4 stages: 8 + 3 rounds for 8 rounds of work
    assert backprop[4, 1] == backprop[4, 256] == pytest.approx(1 / 8 * 8 / 11)
    assert max(stages * replicas for stages, replicas in backprop) <= MOST_DEVICES
    assert {stages for stages, _ in backprop} == {2, 4, 8}  # the model has 8 blocks


def test_a_step_of_one_size_ends_where_its_sequences_do():
    cells = scaling(model_of(), FREE, 8, ["full"], ["backprop"], growing=False)
    found = grid(cells, "backprop")
    # with 4 replicas 2 micro-batches are left for 2 stages: 3 rounds for 2 of work
    assert found[2, 1] == pytest.approx(1 / 8 * 8 / 9)
    assert found[2, 4] == pytest.approx(1 / 8 * 2 / 3)
    assert found[2, 16] is None
    text = tables(cells)
    assert "too few stages or sequences" in text
    assert next(line for line in text.splitlines() if line.startswith("     2")).split()[3] == "-"


def test_what_does_not_fit_is_marked():
    cells = scaling(model_of(params=10**9), FREE, 8, ["full"], [ALONE], growing=True)
    assert grid(cells, ALONE)[1, 1] is None
    assert tables(cells).splitlines()[2].split()[1] == "m"


def test_a_step_takes_no_less_than_its_busiest_stage():
    """In the short step that a long one is reckoned from, averaging gradients makes another stage
    the busiest."""
    model = Model.of(families.load_model_config(str(ROOT / "configs" / "gpt2-xl.json")))
    pricing = Pricing(model, Cluster(8, 8, 140, 80, 100, 2400), 512 * 16)
    bound = pricing.price(Candidate(4, 16, "local", "full", 1, 512))
    assert pricing.simulate(bound).step_seconds >= bound.step_seconds


def test_a_picture_has_a_curve_for_each_scheme():
    cells = scaling(model_of(), FREE, 8, ["full"], [ALONE, "local"], growing=True)
    text = picture(cells).file()
    xml.dom.minidom.parseString(text)
    assert all(word in text for word in (ALONE, "local", "4,096"))
