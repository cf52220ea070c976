"""What DeepSpeed would refuse after the start, or misread, is refused before ranks meet."""

import pytest
from sentences import assert_one_sentence
from torch import distributed as dist

from ds_local.engine import deepspeed_checks
from ds_local.engine.deepspeed_checks import checked
from ds_local.errors import ConfigError

ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": ADAM,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


def adam(**params):
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}


def optimizer(name, **params):
    return {"optimizer": {"type": name, "params": params}}


def cosine(**params):
    return scheduler("WarmupCosineLR", **{"total_num_steps": 20, "warmup_num_steps": 2, **params})


def scheduler(name, **params):
    return {"scheduler": {"type": name, "params": params}}


SECTIONS = {
    "bf16 in quotes": ({"bf16": {"enabled": "false"}}, "bf16.enabled must be true or false"),
    "bf16 a number": ({"bf16": {"enabled": 1}}, "bf16.enabled must be true or false"),
    "bf16 misspelt": ({"bf16": {"enable": True}}, "bf16.enable", "'enabled'"),
    "bf16 twice": ({**BF16, "bfloat16": {}}, "bfloat16", "remove bfloat16"),
    "overflow unchecked": ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow"),
    "ours at the top": ({"window": 2}, "window is 2", "move it into local_parallel"),
    "ZeRO at the top": ({"overlap_comm": True}, "move it into zero_optimization"),
    "rate at the top": ({"lr": 1e-3}, "lr is 0.001", "move it into optimizer.params"),
    "interval at the top": (
        {"partition_method": "best", "seed_layers": True},
        "seed_layers is True",
        "move it into pipeline",
    ),
    "ZeRO misspelt": ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge", "'stage'"),
    "buckets negative": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}},
        "zero_optimization.reduce_bucket_size must be greater than 0",
    ),
    "buckets in quotes": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}},
        "zero_optimization.reduce_bucket_size must be an integer",
        "remove the quotes",
    ),
    "overlap in words": (
        {"zero_optimization": {"overlap_comm": "yes"}},
        "zero_optimization.overlap_comm",
    ),
    "wandb missing": ({"wandb": {"enabled": True}}, "wandb.enabled", "pip install wandb"),
    "comet missing": ({"comet": {"enabled": True}}, "comet.enabled", "pip install comet_ml"),
    "tensorboard missing": (
        {"tensorboard": {"enabled": True}},
        "tensorboard.enabled",
        "pip install",
    ),
    "csv misspelt": ({"csv_monitor": {"enabld": True}}, "csv_monitor.enabld", "'enabled'"),
    "csv in a file": (
        {"csv_monitor": {"enabled": True, "output_path": f"{__file__}/x"}},
        "csv_monitor.output_path",
        "another folder",
    ),
    "project a number": ({"wandb": {"project": 3}}, "wandb.project must be a string"),
    "profiler misspelt": (
        {"flops_profiler": {"enable": True}},
        "flops_profiler.enable",
        "'enabled'",
    ),
    "checkpointing misspelt": (
        {"activation_checkpointing": {"partition_activation": True}},
        "activation_checkpointing.partition_activation",
        "'partition_activations'",
    ),
    "interval misspelt": (
        {"pipeline": {"activation_checkpoint_intervall": 1}},
        "pipeline.activation_checkpoint_intervall",
    ),
    "timer misspelt": ({"timers": {"throughput": {"enabld": True}}}, "timers.throughput.enabld"),
    "tag misspelt": ({"checkpoint": {"tag_validaton": "Warn"}}, "checkpoint.tag_validaton"),
    "tag unknown": ({"checkpoint": {"tag_validation": "maybe"}}, "checkpoint", "MAYBE"),
    "writing misspelt": (
        {"checkpoint": {"parallel_write": {"pipeline": True}}},
        "checkpoint.parallel_write.pipeline",
    ),
    "sums in bf16": ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
    "sums in fp32 without ZeRO": (
        {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype",
    ),
    "sums in something": ({"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype is 'fp8'"),
    "breakdown in words": ({"memory_breakdown": "yes"}, "memory_breakdown must be true or false"),
    "prescale in words": (
        {"prescale_gradients": "yes"},
        "prescale_gradients must be true or false",
    ),
    "clipping null": ({"gradient_clipping": None}, "gradient_clipping must be a number"),
    "messages in fp8": ({"communication_data_type": "fp8"}, "communication_data_type is 'fp8'"),
    "sum of maxima": ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op is 'max'"),
    "loud": ({"log_level": "loud"}, "log_level is 'loud'"),
    "gone from DeepSpeed": ({"amp": {"enabled": True}}, "amp", "removed"),
    "gone too": ({"curriculum_learning": {}}, "curriculum_learning", "removed"),
    "comms misspelt": ({"comms_logger": {"enabled": True, "verbos": True}}, "comms_logger.verbos"),
    "compile misspelt": ({"compile": {"deepcompil": True}}, "compile.deepcompil"),
}

GOOD = {
    "bare": {},
    "no scheduler, fused": {
        "scheduler": {"type": "WarmupLR", "params": {}},
        **optimizer("AdamW", lr=1e-3),
    },
    "SGD": optimizer("SGD", lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": optimizer("Adagrad", lr=0.1),
    "Adam of another kind": adam(adam_w_mode=False, foreach=False, eps=1e-6, betas=[0.9, 0.95]),
    "Muon": optimizer("Muon", lr=0.02, momentum=0.95, betas=[0.9, 0.95], adam_lr=1e-3),
    "torch's schedule": scheduler("CosineAnnealingLR", T_max=20, last_epoch=-1),
    "one cycle": scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3),
    "linear": cosine(warmup_type="linear", cos_min_ratio=0.1),
    "ZeRO": {**BF16, **ZERO, "data_types": {"grad_accum_dtype": "fp32"}},
    "buckets as floats": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}},
    "off": {"wandb": {"enabled": False}, "fp16": {"enabled": False}, "wall_clock_breakdown": False},
    "csv": {"csv_monitor": {"enabled": True, "output_path": "", "job_name": "x"}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_deepspeed_takes_is_taken(name):
    config, section = checked({**BASE, **GOOD[name]})
    assert config["optimizer"]
    assert section.link.depth == 4


@pytest.mark.parametrize("name", SECTIONS)
def test_what_deepspeed_does_not_take_is_one_sentence(name):
    change, *words = SECTIONS[name]
    with pytest.raises(ConfigError) as error:
        checked({**BASE, **change})
    assert_one_sentence(error.value, *words)
    assert not dist.is_initialized()


def test_compilers_are_looked_for(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"optimizer.type 'AdamW' is compiled .*torch_adam"):
        checked({**BASE, **optimizer("AdamW", lr=1e-3)})
    with pytest.raises(ConfigError, match=r"compile needs a C\+\+ compiler"):
        checked({**BASE, "local_parallel": {"compile": True}})


def test_a_device_without_bf16_is_named(monkeypatch):
    accelerator = deepspeed_checks.get_accelerator()
    monkeypatch.setattr(type(accelerator), "is_bf16_supported", lambda _: False)
    with pytest.raises(ConfigError, match="this cpu has no bf16"):
        checked({**BASE, **BF16})


def test_what_nothing_reads_is_said():
    said = deepspeed_checks.unread(
        {**BASE, "$schema": "x", "_why": "y", "clip_grad": 1.0, "vocabulary_size": 9}
        | {"disable_allgather": False}
    )
    assert said == [
        "nothing reads 'clip_grad', which is 1.0 in the DeepSpeed config",
        "nothing reads 'vocabulary_size', which is 9 in the DeepSpeed config",
    ]
