import pytest
from commands import command
from launch import ROOT

from ds_local.cluster.candidates import DEFAULT_SCHEMES, GIB, PLANNED, Cluster, Model
from ds_local.cluster.planner import is_legal, layouts, plan
from ds_local.cluster.pricing import Pricing
from ds_local.cluster.scheme_samples import schedule_for
from ds_local.errors import ConfigError
from ds_local.model import families

FAST = Cluster(
    nodes=2, devices_per_node=4, tflops=100, memory_gib=80, link_gbps=400, intra_gbps=4000
)


@pytest.fixture(scope="module")
def small():
    return Model.of(families.load_model_config(str(ROOT / "configs" / "gpt2-small.json")))


def test_data_parallelism_wins_where_links_are_fast_and_the_model_fits(small):
    found = plan(Pricing(small, FAST, 512), ["full"])
    assert found.best[0].candidate.scheme == "data parallel"
    assert all(price.simulated for price in found.best)
    slow = plan(Pricing(small, Cluster(8, 1, 100, 80, 1, 4000), 512), ["shared, 1/4 of tokens"])
    assert slow.best[0].candidate.scheme != "data parallel"
    assert {price.candidate.scheme for price in slow.best} == set(DEFAULT_SCHEMES)


def test_what_does_not_fit_is_said(small):
    found = plan(Pricing(small, Cluster(1, 2, 100, 2.5, 10, 100), 64), ["full"])
    assert "data parallel" in found.too_large
    assert all(price.memory <= 2.5 * GIB for price in found.best)
    assert all(price.candidate.recompute for price in found.too_large.values())


def test_only_legal_layouts(small):
    for layout in layouts(small, FAST, 64, ["full"], list(PLANNED)):
        assert layout.stages * layout.replicas == 8
        assert layout.stages <= small.depth
        assert layout.micro_batch * layout.micro_batches * layout.replicas == 64
        assert is_legal(layout)
        schedule_for(layout.scheme, layout.stages, layout.micro_batches)
    with pytest.raises(ConfigError, match="cannot be divided over 8192 devices"):
        plan(Pricing(small, Cluster(1024, 8, 100, 80, 10, 100), 7), ["full"])


def test_nodes_of_one_device_have_one_placement(small):
    found = list(layouts(small, Cluster(8, 1, 100, 80, 10, 100), 64, [""], ["local"]))
    assert {layout.placement for layout in found} == {"across_nodes"}
    assert len(found) == len(set(found))


def test_a_thousand_nodes_from_the_command_line():
    result = command(
        "plan",
        "--model",
        ROOT / "configs" / "gpt2-xl.json",
        "--nodes",
        "1024",
        "--devices-per-node",
        "8",
        "--device-tflops",
        "140",
        "--memory-gib",
        "80",
        "--link-gbps",
        "100",
        "--intra-gbps",
        "2400",
        "--batch-tokens",
        "8388608",
        "--tokens",
        "1e12",
        "--schemes",
        "data parallel",
        "local",
        "backprop",
        "--heads",
        "shared, 1/4 of tokens",
    )
    assert result.returncode == 0, result.stderr
    assert "layouts of 8192 devices" in result.stdout
    assert "averaging gradients" in result.stdout
