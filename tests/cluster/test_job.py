"""The planner's winner as files that start."""

import itertools
import shlex
from dataclasses import replace

import pytest

from ds_local.cluster.candidates import HEADS, PLANNED, TAILS, Candidate, Cluster, has_heads
from ds_local.cluster.job import config_of, start_of, steps_for
from ds_local.cluster.learning import Learning
from ds_local.cluster.planner import is_legal
from ds_local.cluster.prices import Price
from ds_local.config.deepspeed import batch_sizes
from ds_local.config.files import local_parallel
from ds_local.config.shipped import FOLDER
from ds_local.config.strict_json import dumps
from ds_local.engine.deepspeed_checks import checked
from ds_local.errors import ConfigError
from ds_local.schedules.run_plan import RunPlan

CLUSTER = Cluster(4, 2, 100, 80, 10, 100)
PRICE = Price(Candidate(4, 2, "chunked 2, split 2", "full", 4, 8), 2.0, 1000, 0, {}, 0, 0)


@pytest.mark.parametrize("scheme", [*PLANNED, *TAILS])
def test_every_scheme_is_a_config_that_starts(scheme, tmp_path):
    for head, recompute in itertools.product(HEADS if has_heads(scheme) else ("",), (False, True)):
        stages = 1 if scheme == "data parallel" else 4
        layout = Candidate(stages, 8 // stages, scheme, head, 4, 8, "within_node", recompute)
        assert is_legal(layout)
        config = config_of(layout, fp32=False, steps=500, vocab_size=512)
        checked(config)
        dumps(config)
        section = local_parallel(config)
        assert section.num_stages == stages
        assert batch_sizes(config, layout.replicas) == (4, 8)
        assert RunPlan.of(section, stages, 8).schedules


def test_a_run_is_as_long_as_its_scheme_needs():
    assert steps_for(PRICE, 10_500) == 11
    slower = replace(PRICE, learning=Learning(1.5, "measured"))
    assert steps_for(slower, 10_000) == 15
    assert steps_for(PRICE, None) is None
    assert "scheduler" not in config_of(PRICE.candidate, True, None, 512)


def test_a_tail_is_a_second_phase():
    candidate = replace(PRICE.candidate, scheme="chunked 2, split 2, tail 40 %")
    config = config_of(candidate, False, 500, 512)
    section = config["local_parallel"]
    assert section["phases"] == [
        {"mode": "chunked", "window": 2, "until_step": 300},
        {"mode": "backprop"},
    ]
    assert section["split_backward"] == 2
    assert config["scheduler"]["params"]["decay_num_steps"] == 100
    with pytest.raises(ConfigError, match=r"after 60% of the steps.*give the tokens of the run"):
        config_of(candidate, False, None, 512)


def test_a_share_of_the_vocabulary_is_a_number_of_the_models():
    candidate = replace(PRICE.candidate, scheme="local", heads="1/8 of the vocabulary")
    assert config_of(candidate, False, 500, 512)["local_parallel"]["head"]["vocabulary"] == 64


def test_the_command_is_that_of_the_cluster():
    words = shlex.split(start_of(PRICE, CLUSTER, "configs/my model.json", "plans/one", 12), True)
    start = words.index("deepspeed")
    assert words[start + 1 : start + 5] == ["--num_nodes", "4", "--num_gpus", "2"]
    assert words[words.index("--model") + 1] == "configs/my model.json"
    assert words[words.index("--deepspeed_config") + 1] == "plans/one/ds_config.json"
    assert words[words.index("--max-steps") + 1] == "${STEPS:-12}"
    assert "--hostfile" in words
    one = start_of(PRICE, replace(CLUSTER, nodes=1), "m", "f", None)
    assert "--hostfile" not in one
    assert "${STEPS:?the number of steps}" in one
    assert (FOLDER / "hostfile").exists()
