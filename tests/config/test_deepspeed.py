"""Keys of ds_config.json that we rely on: misspelt, of the wrong kind, or not for a pipeline."""

import pytest

from ds_local.config.deepspeed import (
    batch_sizes,
    bf16_enabled,
    check_deepspeed,
    check_number,
    zero_stage,
)
from ds_local.errors import ConfigError

DEEPSPEED_MISTAKES = {
    "misspelt clipping": ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
    "misspelt accumulation": (
        {"grandient_accumulation_steps": 2},
        "did you mean 'gradient_accumulation_steps'?",
    ),
    "misspelt zero": ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'?"),
    "misspelt optimizer": ({"optimiser": {}}, "did you mean 'optimizer'?"),
    "misspelt section": ({"local_paralel": {}}, "did you mean 'local_parallel'?"),
    "clipping as text": ({"gradient_clipping": "abc"}, "gradient_clipping must be a number"),
    "factors on no clipping": (
        {"local_parallel": {"clip_multipliers": [1.0, 2.0]}},
        "factors on gradient_clipping, which is not set",
    ),
    "negative clipping": ({"gradient_clipping": -1}, "at least 0"),
    "fractional micro-batch": ({"train_micro_batch_size_per_gpu": 1.5}, "must be an integer"),
    "no micro-batches": ({"gradient_accumulation_steps": 0}, "at least 1"),
    "true as a number": ({"train_batch_size": True}, "must be an integer"),
    "fp16": ({"fp16": {"enabled": True}}, "use bf16"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "use bf16"),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "use 0 or 1"),
    "ZeRO-3": ({"zero_optimization": {"stage": 3}}, "use 0 or 1"),
    "offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "remove it",
    ),
    "partitioned activations": ({"pipeline": {"pipe_partitioned": True}}, "tensor-parallel"),
    "partitioned gradients": ({"pipeline": {"grad_partitioned": True}}, "tensor-parallel"),
    "reentrant checkpointing": ({"pipeline": {"use_reentrant": True}}, "cut off"),
    "elasticity": ({"elasticity": {"enabled": True}}, "refuses elasticity"),
    "data efficiency": ({"data_efficiency": {"enabled": True}}, "data loader on every stage"),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "set it to 1"),
}


@pytest.mark.parametrize("name", DEEPSPEED_MISTAKES)
def test_mistakes_elsewhere_in_the_file(name):
    config, words = DEEPSPEED_MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        check_deepspeed(config)
    assert words in str(error.value)


def test_unrelated_keys_are_left_to_the_user():
    check_deepspeed(
        {"my_own_notes": 1, "fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    )


@pytest.mark.parametrize(
    ("config", "replicas", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, 1, (2, 1)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 3, (2, 4)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 4}, 3, (2, 4)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, 3, (2, 4)),
        ({"train_batch_size": 6}, 3, (2, 1)),
    ],
)
def test_batch_sizes(config, replicas, expected):
    assert batch_sizes(config, replicas) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "or train_batch_size"),
        (
            {
                "train_batch_size": 7,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 2,
            },
            "train_batch_size 7 is not",
        ),
        ({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 2}, "change one of them"),
    ],
)
def test_batch_sizes_that_contradict_each_other(config, words):
    with pytest.raises(ConfigError) as error:
        batch_sizes(config, 1)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["local_parallel", "bf16", "zero_optimization", "pipeline"])
@pytest.mark.parametrize("value", [None, True, []])
def test_sections_are_objects(key, value):
    with pytest.raises(ConfigError, match=f"{key} must be an object"):
        check_deepspeed({key: value})


def test_precision_and_zero_are_read_under_their_old_names_too():
    assert bf16_enabled({"bfloat16": {"enabled": True}})
    assert not bf16_enabled({"bf16": {"enabled": False}})
    assert [zero_stage(c) for c in ({}, {"zero_optimization": {"stage": 1}})] == [0, 1]


def test_a_number_is_of_its_kind_and_between_its_bounds():
    check_number("a", 3)
    check_number("a", 0.5, float, 0, 1)
    for value, kind, bounds, said in (
        (True, int, (1,), "a must be an integer of at least 1, got True"),
        (2.0, int, (1,), "a must be an integer of at least 1, got 2.0"),
        (1.5, float, (0, 1), "a must be a number of 0 to 1, got 1.5"),
        ("1", float, (0, 1), "a must be a number of 0 to 1, got '1'"),
    ):
        with pytest.raises(ConfigError) as error:
            check_number("a", value, kind, *bounds)
        assert str(error.value) == said
