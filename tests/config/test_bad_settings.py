"""Settings that cannot work, found without torch: each is one sentence that names the key."""

import json
import math

import pytest
from sentences import assert_one_sentence

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.degrees import num_stages_and_replicas
from ds_local.config.files import load_config, local_parallel
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.sections import LinkConfig, ReplicasConfig
from ds_local.errors import ConfigError, DsLocalError
from ds_local.schedules.run_plan import RunPlan

INF, NAN, HUGE = math.inf, math.nan, 10**12

# section -> what the sentence must hold, besides the key
SECTION = {
    "depth as text": ({"link": {"depth": "4"}}, "link.depth must be an integer", '"4"'),
    "depth true": ({"link": {"depth": True}}, "link.depth must be an integer", "true"),
    "depth without end": ({"link": {"depth": 10**9}}, "link.depth", "1024"),
    "depth with a fraction": ({"link": {"depth": 1.5}}, "link.depth must be an integer", "1.5"),
    "depth null": ({"link": {"depth": None}}, "link.depth must be an integer", "null"),
    "transfer NaN": ({"link": {"transfer": NAN}}, "link.transfer", "finite number"),
    "transfer infinite": ({"link": {"transfer": INF}}, "link.transfer", "finite number"),
    "transfer negative": ({"link": {"transfer": -1}}, "link.transfer", "-1"),
    "transfer beyond measure": ({"link": {"transfer": 1e300}}, "link.transfer", "1000000"),
    "timeout NaN": ({"link": {"timeout_seconds": NAN}}, "link.timeout_seconds", "finite"),
    "timeout infinite": ({"link": {"timeout_seconds": INF}}, "link.timeout_seconds", "finite"),
    "timeout of ages": ({"link": {"timeout_seconds": 1e15}}, "link.timeout_seconds", "1000000"),
    "timeout negative": ({"link": {"timeout_seconds": -3}}, "link.timeout_seconds", "-3"),
    "warning never": ({"link": {"warn_seconds": INF}}, "link.warn_seconds", "finite"),
    "start of ages": (
        {"layout": {"start_timeout_seconds": 1e12}},
        "start_timeout_seconds",
        "10000000",
    ),
    "past_host in words": ({"link": {"past_host": "no"}}, "link.past_host must be true or false"),
    "no such codec": ({"link": {"codec": "fp8"}}, "link.codec must be", "'int8'"),
    "no such codec in a list": ({"link": {"codec": ["int8", "fp8"]}}, "link.codec.1 must be"),
    "groups beyond measure": (
        {"link": {"codec": "int8", "group_size": HUGE}},
        "group_size",
        "65536",
    ),
    "option of another codec": (
        {"link": {"codec": "int8", "keep": 0.5}},
        "keep",
        "set codec to topk",
    ),
    "link is a list": ({"link": []}, "link must be an object"),
    "section is a number": (7, "local_parallel must be an object", "7"),
    "section is a list": ([], "local_parallel must be an object"),
    "seed negative": ({"seed": -1}, "seed", "-1"),
    "seed with a fraction": ({"seed": 0.5}, "seed must be an integer"),
    "rates zero": ({"lr_multipliers": [1, 0]}, "lr_multipliers.1", "greater than 0"),
    "rates NaN": ({"lr_multipliers": [1, NAN]}, "lr_multipliers.1", "finite"),
    "one rate": ({"lr_multipliers": 2}, "lr_multipliers must be a list", "2"),
    "clips infinite": ({"clip_multipliers": [INF]}, "clip_multipliers.0", "finite"),
    "weights infinite": ({"mode": "deep_supervision", "weights": [INF]}, "weights.0", "finite"),
    "share of nothing": ({"head": {"token_fraction": 0}}, "head.token_fraction", "greater than 0"),
    "share above one": ({"head": {"token_fraction": 1.5}}, "head.token_fraction", "1"),
    "share as text": ({"head": {"token_fraction": "half"}}, "head.token_fraction", "a number"),
    "no token of its own": ({"head": {"vocabulary": 0}}, "head.vocabulary", "greater than 0"),
    "part of a vocabulary": ({"head": {"vocabulary": 0.5}}, "head.vocabulary", "an integer"),
    "companion against": ({"head": {"companion": -1}}, "head.companion", "-1"),
    "companion beyond": ({"head": {"companion": INF}}, "head.companion", "finite"),
    "tracking for ever": ({"head": {"tracking": 1}}, "head.tracking", "less than 1"),
    "blocks negative": ({"head": {"blocks": [-1]}}, "head.blocks.0", "-1"),
    "temperature a number": (
        {"head": {"temperature": 1}},
        "head.temperature must be true or false",
    ),
    "no such kernel": ({"head": {"kernel": "triton"}}, "head.kernel", "'liger'"),
    "split thrice": ({"split_backward": 3}, "split_backward", "2"),
    "split true": ({"split_backward": True}, "split_backward must be an integer"),
    "diagnostics in words": ({"diagnostics": "yes"}, "diagnostics must be true or false"),
    "parts as text": ({"parts": "0,2"}, "parts must be a list"),
    "until step 0": ({"phases": [{"until_step": 0}, {}]}, "phases.0.until_step", "greater than 0"),
    "correction NaN": (
        {"mix": [{}, {"micro_batches": 1}], "correction": NAN},
        "correction",
        "finite",
    ),
    "momentum of one": (
        {"replicas": {"sync": "periodic", "outer_momentum": 1.0}},
        "replicas.outer_momentum",
        "less than 1",
    ),
    "option of another sync": (
        {"replicas": {"every": 5}},
        "every",
        "set sync to subnets or periodic",
    ),
    "misspelt in a phase": (
        {"phases": [{"modee": "local"}]},
        "phases.0.modee",
        "did you mean 'mode'",
    ),
    "misspelt in a layout": ({"layout": {"stage": "within_node"}}, "layout.stage", "'stages'"),
}

# rest of the file -> what the sentence must hold
REST = {
    "clipping NaN": ({"gradient_clipping": NAN}, "gradient_clipping is NaN"),
    "clipping infinite": ({"gradient_clipping": INF}, "gradient_clipping is Infinity"),
    "clipping true": ({"gradient_clipping": True}, "gradient_clipping must be a number"),
    "lr infinite": (
        {"optimizer": {"type": "AdamW", "params": {"lr": -INF}}},
        "optimizer.params.lr is -Infinity",
    ),
    "beta NaN": (
        {"optimizer": {"params": {"betas": [0.9, NAN]}}},
        "optimizer.params.betas.1 is NaN",
    ),
    "NaN in the section": ({"local_parallel": {"link": {"transfer": NAN}}}, "link.transfer is NaN"),
    "NaN in notes": ({"notes": {"loss": NAN}}, "notes.loss is NaN"),
    "fp16 as a switch": ({"fp16": True}, "fp16 must be an object", '{"enabled": true}'),
    "bf16 as a switch": ({"bf16": True}, "bf16 must be an object", '{"enabled": true}'),
    "optimizer as a name": ({"optimizer": "AdamW"}, "optimizer must be an object"),
    "scheduler null": ({"scheduler": None}, "scheduler must be an object"),
    "wandb as a switch": ({"wandb": True}, "wandb must be an object"),
    "batch auto": ({"train_batch_size": "auto"}, 'train_batch_size is "auto"', "leave it out"),
    "micro-batch auto": (
        {"train_micro_batch_size_per_gpu": "auto"},
        "train_micro_batch_size_per_gpu",
        "--per_device_train_batch_size",
    ),
    "accumulation auto": (
        {"gradient_accumulation_steps": "auto"},
        "gradient_accumulation_steps",
        "write a number",
    ),
    "clipping auto": ({"gradient_clipping": "auto"}, "gradient_clipping", "--max_grad_norm"),
    "lr auto": ({"optimizer": {"params": {"lr": "auto"}}}, "optimizer.params.lr", "such as 3e-4"),
    "betas auto": ({"optimizer": {"params": {"betas": "auto"}}}, "optimizer.params.betas", "[0.9"),
    "decay auto": ({"optimizer": {"params": {"weight_decay": "auto"}}}, "weight_decay", "0.1"),
    "steps auto": (
        {"scheduler": {"params": {"total_num_steps": "auto"}}},
        "scheduler.params.total_num_steps",
        "--max_steps",
    ),
    "bf16 auto": ({"bf16": {"enabled": "auto"}}, "bf16.enabled", "write true or false"),
    "buckets auto": (
        {"zero_optimization": {"reduce_bucket_size": "auto"}},
        "zero_optimization.reduce_bucket_size",
        "remove it",
    ),
    "micro-batch without end": (
        {"train_micro_batch_size_per_gpu": HUGE},
        "train_micro_batch_size_per_gpu must be an integer of 1 to 1048576",
    ),
    "micro-batch 0": ({"train_micro_batch_size_per_gpu": 0}, "1 to 1048576", "got 0"),
    "accumulation negative": ({"gradient_accumulation_steps": -4}, "at least 1", "-4"),
    "print never": ({"steps_per_print": 0}, "steps_per_print", "at least 1"),
    "interval negative": (
        {"pipeline": {"activation_checkpoint_interval": -1}},
        "pipeline.activation_checkpoint_interval",
    ),
    "profiler": ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled", "--profile"),
    "breakdown": ({"wall_clock_breakdown": True}, "wall_clock_breakdown", "--profile"),
    "stages elsewhere": (
        {"pipeline": {"stages": 4}},
        "pipeline.stages",
        "local_parallel.num_stages",
    ),
    "seed elsewhere": ({"pipeline": {"seed_layers": True}}, "pipeline.seed_layers", ".seed"),
    "old offload": ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload", "remove it"),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "use 0 or 1"),
    "local disks": ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage"),
    "universal": ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
    "writer": ({"checkpoint": {"writer": {"type": "FAST"}}}, "checkpoint.writer", "remove it"),
    "sequence parallel": ({"sequence_parallel_size": 2}, "sequence_parallel_size", "set it to 1"),
    "autotuning": ({"autotuning": {"enabled": True}}, "autotuning.enabled", "scripts/plan.py"),
    "misspelt steps": ({"step_per_print": 5}, "step_per_print", "'steps_per_print'"),
    "misspelt wandb": ({"wanddb": {}}, "wanddb", "'wandb'"),
}

# (section, stages, micro-batches) -> what the sentence must hold
TOO_LARGE = {
    "accumulation without end": (({}, 2, HUGE), str(2 * HUGE), "gradient_accumulation_steps"),
    "segments without end": (({"segments_per_stage": 10**9}, 2, 4), str(2 * 10**9), "1024"),
    "chunks that hardly repeat": (
        (
            {
                "mix": [
                    {"mode": "shifted_chunked", "window": 97, "micro_batches": 1},
                    {"mode": "shifted_chunked", "window": 89},
                ]
            },
            100,
            4,
        ),
        "8633 schedules",
        "fewer",
    ),
    "window without end": (
        ({"mode": "shifted_chunked", "window": 10**9}, 2, 4),
        "window is 1000000000",
        "choose 1 to 2",
    ),
}


def refused(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert_one_sentence(error.value, *words)


@pytest.mark.parametrize("name", SECTION)
def test_in_our_section(name):
    section, *words = SECTION[name]
    refused(lambda: local_parallel({"local_parallel": section}), ["local_parallel", *words])


@pytest.mark.parametrize("name", REST)
def test_in_the_rest_of_the_file(name):
    config, *words = REST[name]
    refused(lambda: check_deepspeed(config), words)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_schedules_that_could_not_be_held(name):
    (section, stages, micro_batches), *words = TOO_LARGE[name]
    settings = local_parallel({"local_parallel": section})
    with pytest.raises(DsLocalError) as error:
        _ = RunPlan(settings, stages, micro_batches).schedules
    assert_one_sentence(error.value, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"a": tru}', "not valid JSON"),
    ],
    ids=["open", "byte order mark", "list", "twice", "deep", "long", "word"],
)
def test_files_that_are_no_config(tmp_path, text, words):
    path = tmp_path / "ds_config.json"
    path.write_text(text, encoding="utf-8")
    refused(lambda: load_config(path), [str(path), words])


@pytest.mark.parametrize("given", [0, -2, 1.5, "2", True])
def test_numbers_of_stages(given):
    refused(lambda: num_stages_and_replicas(LocalParallelConfig(), 4, given), ["num_stages"])


def test_what_worked_before_works_still():
    section = {
        "window": 2.0,
        "mode": "chunked",
        "link": {"codec": ["int8", "none"], "group_size": 32, "timeout_seconds": 600},
        "lr_multipliers": [1, 0.5],
        "replicas": {"sync": "subnets", "every": 1e1},
        "seed": 0,
    }
    found = local_parallel({"local_parallel": section})
    assert (found.window, found.link.codec, found.replicas.every) == (2, ("int8", "none"), 10)
    assert found == local_parallel(
        {"local_parallel": json.loads(found.model_dump_json(exclude_unset=True))}
    )
    check_deepspeed({"$schema": "x", "notes": {"from": "auto"}, "pipeline": {"stages": "auto"}})


def test_old_names_are_read_with_a_note():
    class Renamed(LocalParallelConfig):
        renamed = {"number_of_stages": "num_stages"}  # noqa: RUF012

    with pytest.warns(FutureWarning, match="number_of_stages is called num_stages now"):
        assert Renamed.model_validate({"number_of_stages": 3}).num_stages == 3
    with pytest.raises(ValueError, match="both are there"):
        Renamed.model_validate({"number_of_stages": 3, "num_stages": 3})


@pytest.mark.parametrize("model", [LinkConfig, ReplicasConfig])
def test_options_depend_on_keys_and_values_that_exist(model):
    assert model.options()
    for option in model.options().values():
        for value in option.values:
            assert getattr(model.model_validate({option.key: value}), option.key) == value
