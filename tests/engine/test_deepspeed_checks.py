"""What DeepSpeed would refuse after the start, or misread, is refused before ranks meet."""

import pytest
import torch
from sentences import assert_one_sentence
from torch import distributed as dist

from ds_local.engine import deepspeed_checks
from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.optimizer_checks import check_client_parts
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


OPTIMIZERS = {
    "misspelt type": ({"optimizer": {"typ": "AdamW"}}, "optimizer.typ", "did you mean 'type'"),
    "no type": ({"optimizer": {"params": {}}}, "optimizer has no type", "AdamW"),
    "type a number": ({"optimizer": {"type": 3}}, "optimizer.type must be a string"),
    "misspelt params": (
        {"optimizer": {"type": "AdamW", "parms": {}}},
        "optimizer.parms",
        "'params'",
    ),
    "params a list": ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params must be"),
    "misspelt name": (optimizer("AdmW"), "optimizer.type 'AdmW'", "'AdamW'"),
    "lower case of torch's": (optimizer("sgd", lr=0.1), "optimizer.type 'sgd'", "'SGD'"),
    "a module of torch": (optimizer("lr_scheduler"), "optimizer.type 'lr_scheduler'", "known are"),
    "the base class": (optimizer("Optimizer"), "optimizer.type 'Optimizer'"),
    "needs a closure": (optimizer("LBFGS"), "optimizer.type 'LBFGS'", "closure"),
    "needs sparse gradients": (optimizer("SparseAdam"), "optimizer.type 'SparseAdam'", "dense"),
    "not for a CPU": (optimizer("Lion"), "optimizer.type 'Lion'", "torch_adam"),
    "not for a CPU either": (optimizer("Lamb"), "optimizer.type 'Lamb'", "torch_adam"),
    "needs a package": (optimizer("MuAdamW"), "optimizer.type 'MuAdamW'", "pip install mup"),
    "unknown parameter": (adam(lrr=1), "optimizer.params.lrr", "did you mean 'lr'"),
    "of the fused class": (adam(bias_correction=True), "optimizer.params.bias_correction", "AdamW"),
    "unknown of the fused class": (optimizer("AdamW", fused=True), "optimizer.params.fused"),
    "unknown of Muon": (optimizer("Muon", momentun=0.9), "optimizer.params.momentun", "'momentum'"),
    "lr in quotes": (adam(lr="1e-3"), "optimizer.params.lr must be a number", "remove the quotes"),
    "lr in quotes, fused": (optimizer("AdamW", lr="1e-3"), "optimizer.params.lr must be a number"),
    "lr in quotes, Muon": (optimizer("Muon", lr="1e-3"), "optimizer.params.lr must be a number"),
    "lr null": (adam(lr=None), "optimizer.params.lr must be a number"),
    "lr true": (adam(lr=True), "optimizer.params.lr must be a number"),
    "lr negative": (adam(lr=-1e-3), "optimizer.params.lr must not be negative"),
    "lr negative, fused": (optimizer("Adam", lr=-1), "optimizer.params.lr must not be negative"),
    "decay negative": (adam(weight_decay=-0.1), "optimizer.params.weight_decay"),
    "one beta": (adam(betas=[0.9]), "optimizer.params.betas must be a list of 2 numbers"),
    "beta a number": (adam(betas=0.9), "optimizer.params.betas must be a list of 2 numbers"),
    "beta in quotes": (adam(betas=["0.9", 0.95]), "optimizer.params.betas", "remove the quotes"),
    "beta too large": (adam(betas=[0.9, 1.5]), "optimizer.params.betas", "1.5"),
    "beta too large, fused": (
        optimizer("AdamW", betas=[1.5, 0.9]),
        "optimizer.params.betas",
        "1.5",
    ),
    "momentum in quotes": (optimizer("SGD", lr=0.1, momentum="a"), "optimizer.params.momentum"),
    "nesterov alone": (
        optimizer("SGD", lr=0.1, nesterov=True),
        "optimizer.params.nesterov",
        "momentum",
    ),
    "amsgrad in words": (adam(amsgrad="no"), "optimizer.params.amsgrad must be true or false"),
    "switch in words": (adam(torch_adam="true"), "torch_adam must be true or false", "quotes"),
    "clipping elsewhere": (adam(max_grad_norm=1.0), "max_grad_norm", "gradient_clipping"),
    "untested with ZeRO": ({**optimizer("SGD", lr=0.1), **ZERO}, "optimizer.type 'SGD'", "ZeRO"),
}

SCHEDULERS = {
    "misspelt params": (
        {"scheduler": {"type": "WarmupLR", "parms": {}}},
        "scheduler.parms",
        "'params'",
    ),
    "no params": ({"scheduler": {"type": "WarmupLR"}}, "scheduler has no params"),
    "no type": ({"scheduler": {"params": {}}}, "scheduler has no type"),
    "misspelt name": (
        scheduler("WarmupCosinLR"),
        "scheduler.type 'WarmupCosinLR'",
        "'WarmupCosineLR'",
    ),
    "a helper of DeepSpeed": (scheduler("get_torch_optimizer"), "scheduler.type", "unknown"),
    "the base class": (scheduler("LRScheduler"), "scheduler.type 'LRScheduler'"),
    "no steps": (scheduler("WarmupCosineLR"), "scheduler.params has no total_num_steps"),
    "misspelt steps": (cosine(total_num_step=3), "total_num_step is not", "'total_num_steps'"),
    "steps in quotes": (
        cosine(total_num_steps="300"),
        "total_num_steps must be an integer",
        "quotes",
    ),
    "steps 0": (cosine(total_num_steps=0), "total_num_steps must be at least 1"),
    "steps negative": (cosine(total_num_steps=-5), "total_num_steps must not be negative"),
    "warm-up 0": (cosine(warmup_num_steps=0), "scheduler.params.warmup_num_steps is 0"),
    "warm-up with a fraction": (
        cosine(warmup_num_steps=2.5),
        "warmup_num_steps must be an integer",
    ),
    "shape of another name": (
        cosine(warmup_type="cosine"),
        "warmup_type is 'cosine'",
        "log, linear",
    ),
    "empty list": (cosine(cos_min_ratio=[]), "cos_min_ratio", "empty list"),
    "ratio above one": (cosine(cos_min_ratio=2), "cos_min_ratio", "0 to 1"),
    "rates of two groups": (
        scheduler("WarmupLR", warmup_min_lr=[0, 0]),
        "scheduler.params.warmup_min_lr",
        "expected 1",
    ),
    "torch's without a step": (scheduler("StepLR"), "scheduler.params has no step_size"),
    "torch's with a function": (scheduler("LambdaLR", lr_lambda=3), "'LambdaLR'", "callable"),
    "torch's by a loss": (scheduler("ReduceLROnPlateau"), "'ReduceLROnPlateau'", "metrics"),
    "torch's with bf16": ({**scheduler("StepLR", step_size=3), **BF16}, "'StepLR'", "WarmupLR"),
    "torch's with ZeRO": ({**scheduler("StepLR", step_size=3), **ZERO}, "'StepLR'", "WarmupLR"),
}

SECTIONS = {
    "bf16 in quotes": ({"bf16": {"enabled": "false"}}, "bf16.enabled must be true or false"),
    "bf16 a number": ({"bf16": {"enabled": 1}}, "bf16.enabled must be true or false"),
    "bf16 misspelt": ({"bf16": {"enable": True}}, "bf16.enable", "'enabled'"),
    "bf16 twice": ({**BF16, "bfloat16": {}}, "bfloat16", "remove bfloat16"),
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


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, name) for t in ("OPTIMIZERS", "SCHEDULERS", "SECTIONS") for name in globals()[t]],
)
def test_what_deepspeed_does_not_take_is_one_sentence(table, name):
    change, *words = globals()[table][name]
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


def test_optimizers_that_a_script_passes():
    parameter = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 2)
    check_client_parts(BASE, None, None)
    check_client_parts({}, sgd, schedule)
    check_client_parts({}, torch.optim.SGD, lambda _: schedule)
    for config, client, scheduler_, words in (
        ({}, None, None, ["there is no optimizer", '"type": "AdamW"']),
        ({}, 3, None, ["optimizer is a int"]),
        (ZERO, sgd, None, ["'SGD'", "ZeRO"]),
        (BASE, None, schedule, ["lr_scheduler", "optimizer=..."]),
    ):
        with pytest.raises(ConfigError) as error:
            check_client_parts(config, client, scheduler_)
        assert_one_sentence(error.value, *words)
