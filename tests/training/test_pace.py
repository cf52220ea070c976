"""How fast a step was, by hand."""

from types import SimpleNamespace

import pytest

from ds_local.config.files import local_parallel
from ds_local.model import families
from ds_local.model.flops import forward_flops
from ds_local.schedules.run_plan import RunPlan
from ds_local.training.pace import Pace, peak_of, useful_operations


def test_tokens_a_second_of_all_and_of_one_device():
    pace = Pace(4096, 4, lambda step: 0.0, None)
    assert pace.figures(0, 2.0) == {
        "tokens_per_second": 2048.0,
        "device_tokens_per_second": 512.0,
        "mfu": None,
    }


def test_how_much_of_the_peak_a_step_uses():
    asked = []
    pace = Pace(1, 2, lambda step: asked.append(step) or 6e12, 1e12)
    assert pace.figures(7, 4.0)["mfu"] == 0.75  # 6 in 4 seconds on two that could do 8
    assert asked == [7]


def test_peaks_go_by_what_the_device_is_called():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_of("Tesla T4") is None
    assert peak_of("") is None


@pytest.mark.parametrize("mode", ["backprop", "local"])
def test_a_steps_operations_are_those_of_backpropagation(mode):
    """A forward and two gradients of every block and of the readout, whatever heads add."""
    config = families.load_model_config("configs/gpt2-nano.json")
    section = local_parallel({"local_parallel": {"mode": mode}})
    blocks, parts = families.num_blocks(config), [0, 3, families.num_blocks(config) + 2]
    engine = SimpleNamespace(
        plan=RunPlan.of(section, 2, 4),
        section=section,
        module=SimpleNamespace(hf_config=config, segment_parts=parts),
    )
    block, readout = forward_flops(config, 128)
    tokens = 4 * 2 * 128  # micro-batches of 2 sequences
    expected = 3 * (blocks * block + readout) * tokens
    assert useful_operations(engine, 0, tokens, 128) == pytest.approx(expected)
