"""The examples run as they stand, on two ranks and as plain python, and learn."""

import math
import re

import pytest
from launch import ROOT, finished, start

pytestmark = pytest.mark.timeout(700)


def losses(example, ranks):
    """Stage -> the losses that the example prints, in order of steps."""
    result = finished(start(str(ROOT / "examples" / example), ranks=ranks), 600)
    assert result.returncode == 0, result.stdout
    found = re.findall(r"step (\d+), stage (\d+): loss ([\d.]+)", result.stdout)
    by_stage = {int(stage): [] for _, stage, _ in found}
    for _, stage, loss in sorted(found, key=lambda one: int(one[0])):
        by_stage[int(stage)].append(float(loss))
    assert set(by_stage) == set(range(ranks))
    return by_stage


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_hugging_face(ranks):
    for first, *_, last in losses("causal_lm.py", ranks).values():
        # as good as a guess among 4096 tokens; the same batch again and again is learned by heart,
        # once the learning rate has begun to rise
        assert first == pytest.approx(math.log(4096), abs=0.5)
        assert last < first - 0.05


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_of_ones_own(ranks):
    for at_20, at_40, at_60 in losses("own_layers.py", ranks).values():
        assert at_60 < at_40 < at_20 < math.log(10)
