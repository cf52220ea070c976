"""Optimizers and schedulers that DeepSpeed would not take, or misread."""

import pytest
import torch
from sentences import assert_one_sentence
from test_deepspeed_checks import BASE, BF16, ZERO, adam, cosine, optimizer, scheduler

from ds_local.engine.deepspeed_checks import checked
from ds_local.engine.optimizer_checks import check_client_parts
from ds_local.errors import ConfigError

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
    "ours misspelt": (scheduler("WarmupStableDecay"), "did you mean 'WarmupStableDecayLR'"),
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_deepspeed_does_not_take_is_one_sentence(name):
    change, *words = OPTIMIZERS[name]
    refused(change, words)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_deepspeed_does_not_take_is_one_sentence(name):
    change, *words = SCHEDULERS[name]
    refused(change, words)


def refused(change, words):
    with pytest.raises(ConfigError) as error:
        checked({**BASE, **change})
    assert_one_sentence(error.value, *words)


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
