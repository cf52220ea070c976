"""The objects inside the section: links, placement, heads, replicas."""

import pytest

from ds_local.config.files import local_parallel
from ds_local.config.sections import HeadConfig, LayoutConfig, LinkConfig
from ds_local.errors import ConfigError


def test_stop_is_the_first_step():
    stop = local_parallel({"local_parallel": {"on_nonfinite": "stop"}})
    assert stop.on_nonfinite.skip == 1
    again = {"local_parallel": stop.model_dump(mode="json", exclude_unset=True)}
    assert local_parallel(again) == stop
    assert local_parallel({}).on_nonfinite.skip == 10


def test_which_ranks_hold_which_stage():
    across, within = LayoutConfig(), LayoutConfig(stages="within_node")
    assert across.ranks(2, 3) == [[0, 3], [1, 4], [2, 5]]
    assert within.ranks(2, 3) == [[0, 1], [2, 3], [4, 5]]
    assert across.neighbours(4, 2, 3) == [1, 5]
    assert within.neighbours(3, 2, 3) == [2, 5]
    assert within.neighbours(0, 1, 1) == []


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        ({"sync": "subnet"}, "local_parallel.replicas.sync"),
        ({"snyc": "subnets"}, "did you mean 'sync'?"),
        ({"sync": "subnets", "every": 0}, "local_parallel.replicas.every"),
        ({"every": 5}, "every means nothing with sync 'gradients'"),
        (
            {"sync": "periodic", "scale": "train"},
            "scale means nothing with sync 'periodic'; remove it, or set sync to subnets",
        ),
        ({"sync": "subnets", "outer_lr": 1}, "outer_lr means nothing with sync 'subnets'"),
        ({"sync": "subnets", "partition": []}, "partition must name"),
        ({"sync": "subnets", "partition": ["mlp", "mlp"]}, "partition must name"),
        ({"sync": "periodic", "outer_momentum": 1.0}, "local_parallel.replicas.outer_momentum"),
    ],
)
def test_mistakes_in_the_replicas_section(replicas, words):
    with pytest.raises(ConfigError) as error:
        local_parallel({"local_parallel": {"replicas": replicas}})
    assert words in str(error.value)


def test_a_list_of_codecs_has_one_for_each_link():
    assert LinkConfig(codec="int8").codec_above(5) == "int8"
    link = LinkConfig(codec=["none", "topk"], keep=0.5)
    assert [link.codec_above(segment) for segment in (0, 1)] == ["none", "topk"]


def test_no_head_has_more_blocks_than_the_model_above_it():
    assert [HeadConfig(blocks=2).blocks_of(0, above) for above in (5, 1, 0)] == [2, 1, 0]
    assert [HeadConfig(blocks=[3, 0]).blocks_of(segment, 2) for segment in (0, 1)] == [2, 0]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"rank": 4, "readout": "shared"}, "leave rank out, or use a private readout"),
        ({"rank": 4, "init": "model"}, "leave rank out, or init"),
    ],
)
def test_a_bottleneck_does_not_go_with_a_readout_of_full_width(head, words):
    with pytest.raises(ConfigError, match=words):
        local_parallel({"local_parallel": {"head": head}})


def test_a_rank_that_is_nowhere_is_refused():
    with pytest.raises(ConfigError, match="rank 6 is not one of 2 stages x 3 replicas"):
        LayoutConfig().neighbours(6, 2, 3)


def test_a_readout_has_a_column_for_each_token_or_for_some_and_the_rest():
    assert HeadConfig().classes(64) == 64
    assert HeadConfig(vocabulary=8).classes(64) == 9
