"""Nets of one parameter per segment, with every expected weight worked out by hand.

Four segments multiply by w = 2, 3, 5, 7, so an input of 1 gives h = 2, 6, 30, 210. The loss of
segment l is v_l * h_l with v = 0.5, 0.1, 0.01, 0.001 (the last one fixed). So

    loss      0: 1       1: 0.6     2: 0.3     3: 0.21
    dL/dw_0   0.5        0.3        0.15       0.105
    dL/dw_1              0.2        0.1        0.07
    dL/dw_2                         0.06       0.042
    dL/dw_3                                    0.03
    dL/dv     2          6          30

and one step of plain SGD with learning rate 1 subtracts the gradients that the row lets through. A
head learns only from its own loss, if that loss trains anybody.
"""

import pytest
from ranks import run_ranks

W, V = (2.0, 3.0, 5.0, 7.0), (0.5, 0.1, 0.01)


def one_step(section, stages, gas=1):
    import torch
    from torch import nn

    import ds_local

    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([factor]))

        def forward(self, hidden):
            return hidden * self.factor

    class Head(Times):
        def forward(self, hidden, labels):
            return (hidden * self.factor).mean()

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "local_parallel": section,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    module = ds_local.LocalPipelineModule(
        [Times(w) for w in W],
        num_stages=stages,
        loss_fn=lambda hidden, labels: 0.001 * hidden.mean(),
        head=lambda segment: Head(V[segment]),
        config=config,
        parts=[0, 1, 2, 3, 4],
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    engine.train_batch(iter([(torch.ones(1, 1), torch.zeros(1))] * gas))
    return {name: parameter.item() for name, parameter in engine.module.named_parameters()}


UNUSED = {"heads.0.factor": 0.5, "heads.1.factor": 0.1, "heads.2.factor": 0.01}

EXPECTED = {
    # w_0 = 2 - dL3/dw_0 = 2 - 0.105, and so on: everything from loss 3
    "backprop": ({"mode": "backprop"}, (1.895, 2.93, 4.958, 6.97), {}),
    # w_0 = 2 - dL0/dw_0 = 2 - 0.5, w_1 = 3 - dL1/dw_1 = 3 - 0.2, ...; v_l - h_l
    "local": ({"mode": "local"}, (1.5, 2.8, 4.94, 6.97), {0: -1.5, 1: -5.9, 2: -29.99}),
    # chunks {0, 1} from loss 1: 2 - 0.3, 3 - 0.2; {2, 3} from loss 3: 5 - 0.042
    "chunked": ({"mode": "chunked", "window": 2}, (1.7, 2.8, 4.958, 6.97), {1: -5.9}),
    # at step 0 shifted chunks are chunks; all heads exist, since later steps need them
    "shifted": (
        {"mode": "shifted_chunked", "window": 2},
        (1.7, 2.8, 4.958, 6.97),
        {0: 0.5, 1: -5.9, 2: 0.01},
    ),
    # w_0 hears losses 0 and 1: 2 - 0.5 - 0.3; w_1 losses 1 and 2: 3 - 0.2 - 0.1; w_2 losses 2 and
    # 3: 5 - 0.06 - 0.042
    "overlapping": (
        {"mode": "overlapping", "window": 2},
        (1.2, 2.7, 4.898, 6.97),
        {0: -1.5, 1: -5.9, 2: -29.99},
    ),
    # the mean of the same: 2 - 0.4, 3 - 0.15, 5 - 0.051; the last segment hears one loss only
    "overlapping mean": (
        {"mode": "overlapping", "window": 2, "combine": "mean"},
        (1.6, 2.85, 4.949, 6.97),
        {0: -1.5, 1: -5.9, 2: -29.99},
    ),
    # three losses each: 2 - 0.5 - 0.3 - 0.15, 3 - 0.2 - 0.1 - 0.07, 5 - 0.06 - 0.042
    "overlapping 3": (
        {"mode": "overlapping", "window": 3},
        (1.05, 2.63, 4.898, 6.97),
        {0: -1.5, 1: -5.9, 2: -29.99},
    ),
    # w_0 from loss 1 alone: 2 - 0.3; w_1 from loss 2 alone: 3 - 0.1; the last two from loss 3; no
    # head on segment 0
    "interlocking": (
        {"mode": "interlocking", "window": 2},
        (1.7, 2.9, 4.958, 6.97),
        {1: -5.9, 2: -29.99},
    ),
    # w_0 from loss 2 alone: 2 - 0.15; the last three from loss 3; one head
    "interlocking 3": (
        {"mode": "interlocking", "window": 3},
        (1.85, 2.93, 4.958, 6.97),
        {2: -29.99},
    ),
    # every loss above: 2 - (0.5 + 0.3 + 0.15 + 0.105), 3 - (0.2 + 0.1 + 0.07), 5 - (0.06 + 0.042)
    "deep supervision": (
        {"mode": "deep_supervision"},
        (0.945, 2.63, 4.898, 6.97),
        {0: -1.5, 1: -5.9, 2: -29.99},
    ),
    # weights 0.1, 0, 0.5, 1: 2 - (0.05 + 0.075 + 0.105), 3 - (0.05 + 0.07), 5 - (0.03 + 0.042);
    # heads 0.5 - 0.2, 0.01 - 15
    "deep supervision, weighted": (
        {"mode": "deep_supervision", "weights": [0.1, 0.0, 0.5, 1.0]},
        (1.77, 2.88, 4.928, 6.97),
        {0: 0.3, 2: -14.99},
    ),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", EXPECTED)
def test_one_step_of_a_row(name, ranks):
    section, weights, heads = EXPECTED[name]
    found = {}
    for part in run_ranks(one_step, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks):
        found |= part
    assert [found[f"{s}.factor"] for s in range(4)] == pytest.approx(weights, abs=1e-5)
    assert {name: value for name, value in found.items() if "heads" in name} == pytest.approx(
        {f"heads.{segment}.factor": value for segment, value in heads.items()}, abs=1e-5
    )


def test_one_step_of_a_mix():
    """One backprop and three local micro-batches: a quarter of the true gradient and three quarters
    of the local one.

    w_0 = 2 - 0.105 / 4 - 0.5 * 3 / 4, w_1 = 3 - 0.07 / 4 - 0.2 * 3 / 4, w_2 = 5 - 0.042 / 4 - 0.06
    * 3 / 4, w_3 = 7 - 0.03; v_0 = 0.5 - 2 * 3 / 4.
    """
    section = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}
    found = {}
    for part in run_ranks(one_step, 4, section, 4, gas=4):
        found |= part
    assert [found[f"{s}.factor"] for s in range(4)] == pytest.approx(
        [1.59875, 2.8325, 4.9445, 6.97], abs=1e-5
    )
    assert found["heads.0.factor"] == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize(
    "rest", [{"mode": "local"}, {"mode": "chunked", "window": 2}], ids=["local", "chunked"]
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_corrected_mix_has_the_gradient_of_backprop(ranks, rest):
    """All micro-batches are the same, so nothing is noise: segments end where backprop ends, heads
    where `rest` does."""
    section = {
        "mix": [{"mode": "backprop", "micro_batches": 1}, rest],
        "correction": 1.0,
        "segments_per_stage": 4 // ranks,
    }
    found = {}
    for part in run_ranks(one_step, ranks, section, ranks, gas=4):
        found |= part
    weights, heads = EXPECTED["backprop"][1], EXPECTED[rest["mode"]][2]
    assert [found[f"{s}.factor"] for s in range(4)] == pytest.approx(weights, abs=1e-5)
    assert [found[f"heads.{segment}.factor"] for segment in heads] == pytest.approx(
        list(heads.values()), abs=1e-5
    )


def test_backprop_builds_no_heads():
    found = {}
    for part in run_ranks(one_step, 2, {"mode": "backprop", "segments_per_stage": 2}, 2):
        found |= part
    assert not UNUSED.keys() & found.keys()
