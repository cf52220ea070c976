"""The examples run as they stand, on two ranks and as plain python, and learn."""

import json
import math
import re

import pytest
from launch import ROOT, finished, start
from samples import sampled

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


@pytest.mark.parametrize("ranks", sampled([2], [1, 2]))
def test_a_model_of_hugging_face(ranks):
    for first, *_, last in losses("causal_lm.py", ranks).values():
        # as good as a guess among 4096 tokens; the same batch again and again is learned by heart,
        # once the learning rate has begun to rise
        assert first == pytest.approx(math.log(4096), abs=0.5)
        assert last < first - 0.05


@pytest.mark.parametrize("ranks", sampled([1], [1, 2]))
def test_layers_of_ones_own(ranks):
    for at_20, at_40, at_60 in losses("own_layers.py", ranks).values():
        assert at_60 < at_40 < at_20 < math.log(10)


def test_the_notebook_cell_by_cell_in_one_process(tmp_path):
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join([*code, code[-2]]))  # one is run again
    result = finished(start(str(tmp_path / "cells.py")), 600)
    assert result.returncode == 0, result.stdout
    first, second, again = re.findall(r"evaluated: \{(.*)\}", result.stdout)
    assert second == again  # backpropagation has no loss but the last
    assert re.fullmatch(r"0: [\d.]+, 1: [\d.]+", first)
    assert re.fullmatch(r"1: [\d.]+", second)
    steps = re.findall(r"step (\d): \{.*1: ([\d.]+)", result.stdout)
    assert [int(step) for step, _ in steps] == [1, 2, 3] * 3
    losses = [float(loss) for _, loss in steps]
    assert all(losses[n + 2] < losses[n] < 8.7 for n in (0, 3, 6))
    assert "backprop: idle 27%" in result.stdout
    assert "local: idle 0%" in result.stdout
