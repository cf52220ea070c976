"""The tables of what ds_config.json may say."""

from pathlib import Path

import pytest

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.deepspeed_rules import (
    AUTO,
    DEEPSPEED_KEYS,
    FP32_ONLY,
    NAMED,
    NUMBERS,
    OWN_AUTO,
    REFUSED,
    SECTIONS,
)
from ds_local.errors import ConfigError


def test_known_deepspeed_keys_are_the_ones_deepspeed_reads():
    """A key that DeepSpeed knows must not be taken for a slip of the pen."""
    import re

    from deepspeed.runtime import constants

    source = Path(constants.__file__).read_text()
    top_level = set(re.findall(r'^[A-Z_]+ = "([a-z_0-9]+)"$', source, re.M))
    for key in top_level:
        check_deepspeed({key: {"type": "Adam"} if key in SECTIONS else None})


def test_tables_name_keys_that_are_known():
    for path in [*NUMBERS, *(path for path, *_ in (*REFUSED, *FP32_ONLY)), *OWN_AUTO]:
        assert path[0] in DEEPSPEED_KEYS or path == ("sequence_parallel_size",)
    assert len(set(DEEPSPEED_KEYS)) == len(DEEPSPEED_KEYS)
    assert NAMED.keys() <= set(SECTIONS)


REFUSALS = {
    ".".join(path): (path, value)
    for path, value in [
        (("fp16", "enabled"), True),
        (("zero_optimization", "stage"), 3),
        (("zero_optimization", "offload_param"), {"device": "cpu"}),
        (("zero_optimization", "zenflow"), {"topk_ratio": 0.1}),
        (("activation_checkpointing", "cpu_checkpointing"), True),
        (("activation_checkpointing", "number_checkpoints"), 2),
        (("expert_parallel", "enabled"), True),
        (("pipeline", "partition"), "uniform"),
        (("compile", "deepcompile"), True),
        (("tensor_parallel", "autotp_size"), 2),
        (("managed_gradient_accumulation",), False),
    ]
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_the_key_the_value_and_the_remedy(name):
    path, value = REFUSALS[name]
    config = value
    for key in reversed(path):
        config = {key: config}
    with pytest.raises(ConfigError) as error:
        check_deepspeed(config)
    reason = next(reason for of, _, reason in REFUSED if of == path)
    assert str(error.value) == f"{name} is {value!r}: {reason}"


def test_what_is_switched_off_is_not_refused():
    for path, wrong, _ in REFUSED:
        off = {"stage": 0, "partition": "best", "stages": "auto"}.get(path[-1], False)
        if path[-1] in ("managed_gradient_accumulation", "check_grad_overflow"):
            off = True
        assert not wrong(off), path
    offload = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    check_deepspeed(offload)


def test_what_only_a_trainer_fills_in_says_what_to_write():
    for path, said in (
        (("optimizer", "params", "lr"), AUTO["lr"]),
        (("zero_optimization", "overlap_comm"), "remove it, so that DeepSpeed's default holds"),
    ):
        config = "auto"
        for key in reversed(path):
            config = {key: config}
        with pytest.raises(ConfigError) as error:
            check_deepspeed(config)
        assert str(error.value).endswith(said)
        assert str(error.value).startswith(".".join(path))
    check_deepspeed({"pipeline": {"stages": "auto"}, "local_parallel": {"run_ahead": "auto"}})
