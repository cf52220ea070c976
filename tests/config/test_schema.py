"""Mistakes in ds_config.json are found before processes start, and named in a sentence."""

import json

import pytest

from ds_local.config.deepspeed import batch_sizes, check_deepspeed
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.files import load_config, local_parallel
from ds_local.errors import ConfigError
from ds_local.schedules.run_plan import RunPlan, head_segments
from ds_local.schedules.simulator import Costs, simulate

MISTAKES = {
    "misspelt mode key": ({"mod": "local"}, "did you mean 'mode'?"),
    "unknown mode": ({"mode": "greedy"}, "local_parallel.mode"),
    "misspelt window": ({"mode": "interlocking", "windov": 2}, "did you mean 'window'?"),
    "correction of nothing": (
        {"mode": "local", "correction": 1.0},
        "between the two entries of a mix, got 0",
    ),
    "correction too large": (
        {"mix": [{"micro_batches": 1}, {}], "correction": 2},
        "local_parallel.correction",
    ),
    "window 0": ({"mode": "interlocking", "window": 0}, "local_parallel.window"),
    "window as text": ({"mode": "interlocking", "window": "two"}, "local_parallel.window"),
    "bad combine": ({"mode": "overlapping", "combine": "max"}, "local_parallel.combine"),
    "negative weight": (
        {"mode": "deep_supervision", "weights": [-1, 1]},
        "local_parallel.weights.0",
    ),
    "no stages": ({"num_stages": 0}, "local_parallel.num_stages"),
    "no segments": ({"segments_per_stage": 0}, "local_parallel.segments_per_stage"),
    "negative seed": ({"seed": -1}, "local_parallel.seed"),
    "another word for stop": (
        {"on_nonfinite": "halt"},
        'local_parallel.on_nonfinite: must be "stop" or {"skip": n}, got \'halt\'',
    ),
    "no step to skip": ({"on_nonfinite": {"skip": 0}}, "local_parallel.on_nonfinite.skip"),
    "misspelt skip": ({"on_nonfinite": {"skp": 3}}, "did you mean 'skip'?"),
    "misspelt link key": ({"link": {"dept": 4}}, "did you mean 'depth'?"),
    "link depth 0": ({"link": {"depth": 0}}, "local_parallel.link.depth"),
    "timeout 0": ({"link": {"timeout_seconds": 0}}, "local_parallel.link.timeout_seconds"),
    "misspelt head key": ({"head": {"rnk": True}}, "did you mean 'rank'?"),
    "mode and mix": ({"mode": "local", "mix": [{"mode": "local"}]}, "give either mix or mode"),
    "empty mix": ({"mix": []}, "at least one entry"),
    "two open entries in a mix": (
        {"mix": [{"mode": "local"}, {"mode": "backprop"}]},
        "at most one entry without micro_batches",
    ),
    "misspelt mix key": (
        {"mix": [{"mode": "local", "microbatches": 2}]},
        "did you mean 'micro_batches'?",
    ),
    "mix of 0 micro-batches": (
        {"mix": [{"mode": "local", "micro_batches": 0}]},
        "local_parallel.mix.0.micro_batches",
    ),
    "mode and phases": (
        {"mode": "local", "phases": [{"mode": "local"}]},
        "give either phases or mode",
    ),
    "phases without an end": (
        {"phases": [{"until_step": 3, "mode": "local"}]},
        "a last phase without one",
    ),
    "phases going back": (
        {
            "phases": [
                {"until_step": 9, "mode": "local"},
                {"until_step": 5, "mode": "local"},
                {"mode": "backprop"},
            ]
        },
        "increasing",
    ),
    "misspelt phase key": (
        {"phases": [{"untilstep": 3}, {"mode": "local"}]},
        "did you mean 'until_step'?",
    ),
    "something else entirely": ({"frobnicate": 1}, "known keys are"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_our_section(name):
    section, words = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        local_parallel({"local_parallel": section})
    assert words in str(error.value)
    assert "local_parallel" in str(error.value)


def test_mix_that_does_not_add_up():
    section = local_parallel(
        {"local_parallel": {"mix": [{"mode": "backprop", "micro_batches": 3}, {"mode": "local"}]}}
    )
    assert [count for _, count in RunPlan(section, 2, 8).rows_at(0)] == [3, 5]
    with pytest.raises(
        ConfigError, match="names 3 micro-batches but gradient_accumulation_steps is 2"
    ):
        RunPlan(section, 2, 2).rows_at(0)
    closed = local_parallel({"local_parallel": {"mix": [{"mode": "backprop", "micro_batches": 3}]}})
    with pytest.raises(ConfigError, match="make them agree"):
        RunPlan(closed, 2, 4).rows_at(0)


@pytest.mark.parametrize(
    ("segments", "micro_batches", "transfer", "count"),
    [(2, 8, 0, 4), (4, 4, 0, 1), (4, 8, 0, 4), (4, 8, 1, 2), (8, 16, 0, 8)],
)
def test_auto_hides_as_many_micro_batches_as_the_pipeline_can(
    segments, micro_batches, transfer, count
):
    def share(section, number):
        link = {"transfer": transfer}
        mix = [{"mode": "backprop", "micro_batches": number}, {"mode": "local"}]
        whole = local_parallel({"local_parallel": {"mix": mix, "link": link, **section}})
        return RunPlan(whole, segments // whole.segments_per_stage, micro_batches)

    assert [n for _, n in share({}, "auto").rows_at(0)] == [
        count,
        micro_batches - count,
    ]
    costs = Costs(link=transfer)
    idle = [
        simulate(share({}, number).schedule_at(0), costs).idle_share
        for number in ("auto", count, count + 1)
    ]
    assert idle[:2] == pytest.approx([0, 0], abs=1e-9)
    assert idle[2] > 0.01
    # whatever the number of ranks that hold the segments
    folded = share({"segments_per_stage": segments}, "auto").schedule_at(0)
    assert sum(routes.mode == "backprop" for routes in folded.rows) == count


def test_stages_and_replicas():
    section = local_parallel({"local_parallel": {"num_stages": 2}})
    assert num_stages_and_replicas(section, 4) == (2, 2)
    assert num_stages_and_replicas(local_parallel({}), 4) == (4, 1)
    with pytest.raises(ConfigError, match="3 processes cannot be divided into 2 stages"):
        num_stages_and_replicas(section, 3)
    with pytest.raises(ConfigError, match="make them agree"):
        num_stages_and_replicas(section, 4, 4)


def test_split_backward_reaches_schedules_and_automatic_counts():
    for split, kinds in ((0, "BF"), (1, "BFIW"), (2, "BFIW")):
        section = local_parallel({"local_parallel": {"mode": "chunked", "split_backward": split}})
        assert {action.kind for action in RunPlan(section, 4, 4).schedule_at(0).actions()} == set(
            kinds
        )
    auto = {"mix": [{"mode": "backprop", "micro_batches": "auto"}, {"mode": "local"}]}
    rows = [
        RunPlan(local_parallel({"local_parallel": {**auto, "split_backward": s}}), 8, 12).rows_at(0)
        for s in (0, 2)
    ]
    assert [counts for _, counts in rows[1]] > [counts for _, counts in rows[0]]
    with pytest.raises(
        ConfigError, match="compile makes one piece of what split_backward takes apart"
    ):
        local_parallel({"local_parallel": {"compile": True, "split_backward": 1}})
    with pytest.raises(ConfigError, match="split_backward"):
        local_parallel({"local_parallel": {"split_backward": 3}})


def test_phases_and_shifts_have_keys():
    section = local_parallel(
        {
            "local_parallel": {
                "phases": [
                    {"until_step": 4, "mode": "shifted_chunked", "window": 2},
                    {"mode": "backprop"},
                ]
            }
        }
    )
    keys = [RunPlan(section, 4, 4).key_at(step) for step in range(6)]
    assert keys == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 0)]
    assert section.distinct_steps() == [0, 1, 4]
    assert head_segments(section, 4) == {0, 1, 2}


def test_phases_in_a_cycle():
    phases = [{"until_step": 2, "mode": "local"}, {"mode": "backprop"}]
    section = local_parallel({"local_parallel": {"phases": phases, "cycle_steps": 3}})
    assert [section.scheme_at(step).mode for step in range(7)] == [
        "local",
        "local",
        "backprop",
    ] * 2 + ["local"]
    plan = RunPlan(section, 4, 4)
    assert {plan.key_at(step) for step in range(7)} == {
        plan.key_at(step) for step in section.distinct_steps()
    }
    for wrong, words in (
        ({"phases": phases, "cycle_steps": 2}, "after step 2, got 2"),
        ({"cycle_steps": 3}, "last of several phases"),
        (
            {
                "phases": [{"until_step": 2, "mode": "shifted_chunked"}, {"mode": "local"}],
                "cycle_steps": 5,
            },
            "every 2 steps",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            local_parallel({"local_parallel": wrong})


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a": 1, "a": 2}', "twice")],
)
def test_files_that_are_no_config(tmp_path, text, words):
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert words in str(error.value)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.json")


def test_every_field_says_what_it_means():
    from ds_local.config.schema import LocalParallelConfig
    from ds_local.config.scheme import MixEntry, Phase
    from ds_local.config.sections import HeadConfig, LinkConfig

    for model in (LocalParallelConfig, Phase, MixEntry, LinkConfig, HeadConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_shipped_config_is_valid():
    config = load_config("ds_config.json")
    check_deepspeed(config)
    section = local_parallel(config)
    micro_batch_size, num_micro_batches = batch_sizes(config, 1)
    assert micro_batch_size >= 1
    for step in section.distinct_steps():
        RunPlan(section, 2, num_micro_batches).schedule_at(step)
    assert json.loads(section.model_dump_json())


def test_diagnostics_find_the_local_row_of_a_mix():
    section = local_parallel(
        {"local_parallel": {"mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}]}}
    )
    assert [schedule.rows[0].mode for schedule in RunPlan(section, 4, 4).probe_schedules] == [
        "local",
        "backprop",
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "chunked"}], "correction": 1.0},
        {"phases": [{"until_step": 2, "mode": "local"}, {"mode": "backprop"}], "cycle_steps": 3},
    ],
)
def test_a_mode_on_the_command_line_replaces_the_whole_scheme(given):
    from ds_local.cli import train
    from ds_local.config.command_line import overridden_section

    arguments = train.parse_arguments(
        [
            "--model",
            "m",
            "--data",
            "d",
            "--output",
            "o",
            "--max-steps",
            "1",
            "--deepspeed_config",
            "c",
            "--mode",
            "local",
        ]
    )
    section = overridden_section({**given, "seed": 3}, arguments)
    assert local_parallel({"local_parallel": section}) == local_parallel(
        {"local_parallel": {"mode": "local", "seed": 3}}
    )
