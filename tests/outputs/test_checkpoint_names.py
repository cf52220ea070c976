"""Names of checkpoints; files are named as DeepSpeed names them."""

import pytest

from ds_local.outputs.checkpoint_names import (
    BF16_SHARD_FILE,
    LAYER_FILE,
    STAGE_FILE,
    step_of,
    tag_of,
)


def test_a_step_has_a_tag_and_the_tag_its_step():
    assert tag_of(12) == "global_step12"
    assert step_of("global_step12") == 12


@pytest.mark.parametrize("tag", ["best", "global_step", "global_step12a", "my_global_step12"])
def test_a_tag_that_somebody_has_chosen_has_no_step(tag):
    assert step_of(tag) is None


def test_numbers_in_the_names_of_files():
    assert LAYER_FILE.format(3) == "layer_03-model_states.pt"
    assert STAGE_FILE.format(11) == "mp_rank_11_model_states.pt"
    assert BF16_SHARD_FILE.format(2, 1) == "bf16_zero_pp_rank_2_mp_rank_01_optim_states.pt"
