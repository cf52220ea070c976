"""Mistakes in a user's own script: the constructors, `initialize`."""

from pathlib import Path

import jobs
import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from ranks import run_ranks
from sentences import assert_one_sentence
from torch import distributed as dist
from torch import nn

import ds_local
from ds_local.errors import ConfigError, DsLocalError

ROOT = Path(__file__).parents[2]


def layers(count=4):
    return [nn.Linear(4, 4) for _ in range(count)]


def module(*args, config=None, **kwargs):
    config = jobs.ds_config({"mode": "backprop"}) if config is None else config
    return ds_local.LocalPipelineModule(*args, config=config, **kwargs)


def model(name="gpt2", config=None, **kwargs):
    config = jobs.ds_config({"mode": "backprop"}) if config is None else config
    return ds_local.causal_lm(jobs.MODELS[name], config=config, **kwargs)


BAD = {
    "no stages": (lambda: module(layers(), 0), "num_stages", "0"),
    "stages in quotes": (lambda: module(layers(), "1"), "num_stages", "'1'"),
    "more stages than processes": (lambda: module(layers(), 3), "cannot be divided", "3"),
    "no layers": (lambda: module([], 1), "at least 1 layers", "0"),
    "loss of another kind": (lambda: module(layers(), 1, loss_fn=3), "loss_fn is a int"),
    "head of another kind": (lambda: module(layers(), 1, head="x"), "head is a str"),
    "interval negative": (
        lambda: module(layers(), 1, activation_checkpoint_interval=-1),
        "activation_checkpoint_interval",
    ),
    "topology of three axes": (
        lambda: module(layers(), topology=PipeModelDataParallelTopology(1, 1, 1)),
        "topology",
        "['data', 'model', 'pipe']",
    ),
    "boundaries that fall": (lambda: module(layers(), 1, parts=[0, 5]), "parts", "[0, 5]"),
    "mix of too many": (
        lambda: module(
            layers(),
            1,
            config=jobs.ds_config({"mix": [{"mode": "backprop", "micro_batches": 9}, {}]}),
        ),
        "mix names 9 micro-batches",
    ),
    "window too large": (
        lambda: model(config=jobs.ds_config({"mode": "interlocking", "window": 3})),
        "window is 3",
    ),
    "accumulation without end": (
        lambda: model(config=jobs.ds_config({}, gas=10**12)),
        "1000000000000",
    ),
    "misspelt optimizer": (
        lambda: model(config=jobs.ds_config({}, optimizer={"typ": "Adam"})),
        "optimizer.typ",
    ),
    "misspelt scheduler": (
        lambda: module(
            layers(), 1, config=jobs.ds_config({}, scheduler={"type": "WarmupLR", "parms": {}})
        ),
        "scheduler.parms",
    ),
    "config missing": (lambda: model(config="/nowhere.json"), "/nowhere.json"),
    "sequences of nothing": (lambda: model(seq_len=0), "seq_len"),
    "sequences too long": (lambda: model(seq_len=10**6), "1000000 tokens"),
    "bottleneck wider than the model": (
        lambda: model(config=jobs.ds_config({"head": {"rank": 4096}})),
        "head.rank",
        "4096",
    ),
    "model misspelt": (
        lambda: ds_local.causal_lm(
            {"model_type": "gpt2", "n_layers": 3}, config=jobs.ds_config({})
        ),
        "'n_layers'",
        "'n_layer'",
    ),
    "a segment that ends where no model of the family can": (
        lambda: ds_local.causal_lm(
            {
                "model_type": "olmo_hybrid",
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "vocab_size": 64,
                "pad_token_id": None,
            },
            config=jobs.ds_config(
                {"mode": "local", "segments_per_stage": 2, "parts": [0, 2, 6]}, gas=1
            ),
        ),
        "segment 0 ends after block 1",
        "parts",
    ),
    "model that cannot be cut": (
        lambda: ds_local.causal_lm(
            {"model_type": "gpt_neox_japanese", "num_hidden_layers": 2, "vocab_size": 64},
            config=jobs.ds_config({}),
        ),
        "a gpt_neox_japanese cannot be trained in parts",
        "depends on how many there are",
    ),
    "model too large for any memory": (
        lambda: ds_local.causal_lm(
            {**jobs.MODELS["gpt2"], "n_embd": 2**22, "n_head": 4}, config=jobs.ds_config({})
        ),
        "GiB",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_found_before_processes_start(name, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    call, *words = BAD[name]
    with pytest.raises(DsLocalError) as error:
        call()
    assert_one_sentence(error.value, *words)
    assert not dist.is_initialized()


def raised(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def mistakes():
    import deepspeed

    config = jobs.ds_config({"mode": "local"})
    module = ds_local.causal_lm(jobs.MODELS["gpt2"], config=config)
    without = {key: value for key, value in config.items() if key != "optimizer"}
    scaled = jobs.ds_config({"mode": "local", "lr_multipliers": [2.0]})
    return {
        "deepspeed's": raised(lambda: deepspeed.initialize(model=module, config=config)),
        "no optimizer": raised(lambda: ds_local.initialize(model=module, config=without)),
        "no config": raised(lambda: ds_local.initialize(model=module)),
        "other section": raised(lambda: ds_local.initialize(model=module, config=scaled)),
        "no model": raised(lambda: ds_local.initialize(model=nn.Linear(1, 1), config=config)),
        "data": raised(lambda: ds_local.initialize(model=module, config=config, training_data=[])),
    }


def test_mistakes_in_initialize():
    (said,) = run_ranks(mistakes, 1)
    for name, words in {
        "deepspeed's": ["ds_local.initialize", "1F1B"],
        "no optimizer": ["there is no optimizer"],
        "no config": ["config=..."],
        "other section": ["pass both the same config"],
        "no model": ["LocalPipelineModule", "Linear"],
        "data": ["training_data", "empty list"],
    }.items():
        assert_one_sentence(said[name], *words)


class Numbered(torch.utils.data.IterableDataset):
    def __iter__(self):
        from reference import batch

        for number in range(6):
            ids = batch(0, number, 0)
            yield from zip(ids, ids, strict=True)


def rows():
    for ids, _ in Numbered():
        yield {"input_ids": ids.tolist()}


def from_a_stream(stages, kind):
    import datasets

    source = Numbered()
    if kind == "datasets":
        source = datasets.IterableDataset.from_generator(rows).with_format("torch")
    config = jobs.ds_config({"mode": "local"}, gas=2)
    module = ds_local.causal_lm(jobs.MODELS["gpt2"], num_stages=stages, config=config)
    given = {"training_data": source}
    engine, _, loader, _ = ds_local.initialize(model=module, config=config, **given)
    losses = [engine.train_batch().item() for _ in range(4)]
    return losses, type(loader).__name__


def from_a_loader(stages):
    """A DataLoader: begun once, begun again in every step, and begun for an evaluation."""
    from deepspeed.utils import RepeatingLoader

    engine = jobs.build({"mode": "local"}, stages, gas=2)
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=2)
    data = iter(RepeatingLoader(loader))
    losses = [engine.train_batch(data).item() for _ in range(4)]
    said = raised(lambda: engine.train_batch(loader)), raised(lambda: engine.train_batch(7))
    evaluated = [engine.eval_batch(one).item() for one in (loader, iter(loader), list(loader))]
    return losses, said, evaluated


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_training_from_a_stream_equals_training_from_its_batches(kind):
    streamed = run_ranks(from_a_stream, 2, 2, kind)
    assert [losses for losses, _ in streamed] == run_ranks(from_batches, 2, 2)
    assert {name for _, name in streamed} == {"RepeatingLoader"}


def test_a_data_loader_is_begun_once_for_training():
    straight = run_ranks(from_batches, 2, 2)
    for losses, (loader, number), evaluated in run_ranks(from_a_loader, 2, 2):
        assert losses in straight
        assert_one_sentence(loader, "train_batch got DataLoader", "call iter(...) on it once")
        assert_one_sentence(number, "train_batch got int; give an iterator")
        assert evaluated[0] == evaluated[1] == evaluated[2]


def from_batches(stages):
    from reference import batch

    engine = jobs.build({"mode": "local"}, stages, gas=2)
    data = ((batch(0, number % 6, 0),) * 2 for number in range(8))
    return [engine.train_batch(data).item() for _ in range(4)]


def notes(section):
    return jobs.build(section, 2).plan.notes


def test_rows_that_come_to_the_same_are_noted():
    assert run_ranks(notes, 2, {"mode": "chunked"})[0] == [
        "on 2 segments chunked(2) is the same as backprop"
    ]
    assert run_ranks(notes, 2, {"mode": "local"})[0] == []
