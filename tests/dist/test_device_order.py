"""The real engine on a pretended device (`standin`): it waits once a step, and nothing is used
before it is there. Faults that are planted into the real code are found."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import textwrap
from typing import Any, NamedTuple
from unittest import mock

import jobs
import pytest
import torch
from families import MIXTRAL
from ranks import RankError, run_ranks
from samples import sampled

STEPS = 2  # the first makes what the next ones use again
ONE_READ = "updates._judge"
FIRST = "frames._run"  # the first mask of a shape, which all micro-batches share


class Plant(NamedTuple):
    """A line of the package, what stands there instead, and the fault that must be found."""

    of: str  # "module:function", from ds_local on
    line: str
    instead: str
    kind: str
    where: str | None = None  # None: in several places


@contextlib.contextmanager
def planted(plant: Plant) -> Any:
    module_name, path = plant.of.split(":")
    module = importlib.import_module(f"ds_local.{module_name}")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(plant.line) == 1, f"{plant.of} has changed"
    source = "from __future__ import annotations\n" + source.replace(plant.line, plant.instead)
    found: dict[str, Any] = {}
    exec(compile(source, module.__file__ or "", "exec"), vars(module), found)
    with mock.patch.object(owner, name, found[name]):
        yield


@contextlib.contextmanager
def on_a_device(number: int) -> Any:
    """DeepSpeed, too, takes the pretended device for its own."""
    from deepspeed.accelerator import get_accelerator
    from standin import standin

    from ds_local.links import codecs
    from ds_local.model import blocks

    def forget() -> None:
        for kept in (codecs._bits, codecs._start, blocks._context_of):
            kept.cache_clear()

    names = {
        "device_name": lambda *_: f"cuda:{number}",
        "current_device_name": lambda *_: f"cuda:{number}",
    }
    forget()
    with mock.patch.multiple(type(get_accelerator()), **names), standin(number) as faults:
        yield faults
    forget()


def with_masks(batches: Any) -> Any:
    for ids in batches:
        yield {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def watched(
    section: dict[str, Any],
    stages: int,
    device: int | None,
    plant: Plant | None = None,
    folder: str | None = None,
    masks: bool = False,
    recomputes: bool = False,
    steps: int = STEPS,
    **settings: Any,
) -> dict[str, Any]:
    """Train, save and resume in `folder`, evaluate.

    Returns:
        Losses, and what was found wrong in each step, [(kind, where)], and beside the steps.
    """
    with contextlib.ExitStack() as stack:
        if plant is not None:
            stack.enter_context(planted(plant))
        faults = [] if device is None else stack.enter_context(on_a_device(device))
        losses: list[Any] = []
        found: list[list[Any]] = []

        def batches(engine: Any, start: int) -> Any:
            data = jobs.batches(engine, start)
            return with_masks(data) if masks and data is not None else data

        def train(engine: Any) -> None:
            engine.module.activation_checkpoint_interval = int(recomputes)
            data = batches(engine, engine.global_steps)
            for _ in range(steps):
                faults.clear()
                losses.append(engine.train_batch(data))
                found.append([(kind, where) for kind, where, _ in faults])

        engine = jobs.build(section, stages, **settings)
        train(engine)
        faults.clear()
        if folder is not None:
            engine.save_checkpoint(folder)
            engine.wait_for_save()
            engine = jobs.build(section, stages, **settings)
            engine.load_checkpoint(folder)
            beside = list(faults)
            train(engine)
            faults[:] = beside
        engine.eval_batch(batches(engine, 10_000))
        beside = [(kind, where) for kind, where, _ in faults]
        losses = [loss.item() for loss in losses]
        return {"losses": (losses, engine.eval_losses), "steps": found, "beside": beside}


LOCAL = {"mode": "local", "segments_per_stage": 2}
AHEAD = {"mode": "backprop", "run_ahead": "auto"}
COPIED = {"readout": "shared", "blocks": 1, "blocks_from": "next_tracked", "refresh_every": 2}
FEW = {"gas": 2}  # micro-batches, where no link is what is tested
OWN = ["deepspeed_seam.step_optimizer", "updates.take_step"]  # DeepSpeed's own reads, and its norm

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frequent part of the vocabulary": (
        {**LOCAL, "head": {"vocabulary": 8}},
        {"token_counts": [1] * 64, **FEW},
    ),
    "sampled softmax": (
        {**LOCAL, "head": {"vocabulary": 8, "rare_samples": 4}},
        {"token_counts": [1] * 64, **FEW},
    ),
    "sampled head with a companion": (
        {**LOCAL, "head": {"token_fraction": 0.5, "companion": 0.5}},
        FEW,
    ),
    "copied weights, resumed": (
        {"mode": "local", "head": COPIED},
        {"folder": "", "steps": 9, **FEW},
    ),
    "overlapping": ({"mode": "overlapping"}, {}),
    "split backward": ({**LOCAL, "mode": "backprop", "split_backward": 1}, {}),
    "predicted weights, resumed": (
        {**AHEAD, "predict_weights": True},
        {"folder": "", "steps": 3},
    ),
    "recomputed layers": ({**LOCAL, "mode": "backprop"}, {"recomputes": True}),
    "experts": (LOCAL, {"model": MIXTRAL, **FEW}),
    "topk": ({**LOCAL, "link": {"codec": "topk", "keep": 0.25}}, {}),
    "lowrank": ({**LOCAL, "link": {"codec": "lowrank", "rank": 8}}, {}),
    "int4": ({**LOCAL, "link": {"codec": "int4"}}, {}),
    "past the host": ({**LOCAL, "link": {"past_host": True}}, {}),
    "llama, weighted by tokens, factors on rates and on clipping": (
        {
            **LOCAL,
            "loss_weighting": "token",
            "lr_multipliers": [1, 0.5, 1, 0.25],
            "clip_multipliers": [1, 0.5, 2, 1],
        },
        {"family": "llama", **FEW},
    ),
    "averaged weights, saved beside, resumed": (
        {**LOCAL, "ema": 0.9, "async_save": True},
        {"folder": "", **FEW},
    ),
}
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parts of those, by themselves
    "sampled head": ({**LOCAL, "head": {"token_fraction": 0.5}}, {}),
    "backprop": ({**LOCAL, "mode": "backprop"}, {}),
    "run-ahead, resumed": (AHEAD, {"folder": "", "steps": 3}),
    "weighted by tokens": ({**LOCAL, "loss_weighting": "token"}, {}),
    "factors on rates": ({**LOCAL, "lr_multipliers": [1, 0.5, 1, 0.25]}, {}),
}


SELDOM = [
    "overlapping",
    "recomputed layers",
    "experts",
    "int4",
    "topk",
    "sampled softmax",
    "frequent part of the vocabulary",
]


def steps_of(result: dict[str, Any]) -> list[list[Any]]:
    """But for masks that are kept."""
    first, *others = result["steps"]
    return [[fault for fault in first if fault != ("wait", FIRST)], *others]


@pytest.mark.parametrize(
    "row", sampled([row for row in ROWS if row not in SELDOM], [*ROWS, *ALONE])
)
def test_a_step_waits_once_and_all_is_in_order(row, tmp_path):
    section, how = (ROWS | ALONE)[row]

    def run(device: int | None) -> Any:
        folder = {"folder": str(tmp_path / str(device))} if "folder" in how else {}
        return run_ranks(watched, 2, section, 2, device, **{**how, **folder})

    for result, plain in zip(run(1), run(None), strict=True):
        assert result["losses"] == plain["losses"]  # the same bits as on the host
        count = len(result["steps"])
        assert steps_of(result) == [[("wait", ONE_READ)]] * count
        assert {kind for kind, _ in result["beside"]} == {"wait"}  # where all stages meet


@pytest.mark.parametrize(
    "extra",
    [{"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}],
    ids=["bf16", "ZeRO-1"],
)
def test_optimizers_of_deepspeed_wait_by_themselves(extra):
    plain, other = (run_ranks(watched, 2, LOCAL, 2, d, **FEW, **extra) for d in (None, 1))
    for result, expected in zip(other, plain, strict=True):
        assert result["losses"] == expected["losses"]
        for step in steps_of(result):
            assert step.count(("wait", ONE_READ)) == 1
            assert step.count(("wait", "updates.take_step")) == 1
            assert set(step) == {("wait", where) for where in [ONE_READ, *OWN]}


def test_masks_wait_where_transformers_looks_into_them():
    for result in run_ranks(watched, 2, LOCAL, 2, 1, masks=True, **FEW):
        for step in steps_of(result):
            assert set(step) <= {("wait", ONE_READ), ("wait", FIRST)}
            assert step.count(("wait", ONE_READ)) == 1


@pytest.mark.parametrize(
    "sync", sampled(["gradients", "subnets"], ["gradients", "periodic", "subnets"])
)
def test_replicas_wait_where_they_exchange(sync):
    replicas = {"sync": sync} | ({} if sync == "gradients" else {"every": 2})
    section = {"mode": "local", "segments_per_stage": 4, "replicas": replicas}
    plain, other = (
        run_ranks(watched, 2, section, 1, device, steps=3, **FEW) for device in (None, 1)
    )
    for result, expected in zip(other, plain, strict=True):
        assert result["losses"] == expected["losses"]
        first, second, third = steps_of(result)
        assert first == third == [("wait", ONE_READ)]
        exchanges = [] if sync == "gradients" else [("wait", "device.to_host")]
        assert set(second) == {("wait", ONE_READ), *exchanges}


def in_vain(device: int) -> list[str]:
    """Where the sums of an evaluation without messages are when all ranks add them up."""
    with on_a_device(device):
        from ds_local.engine import engine as module
        from ds_local.links.line import Place, StepVoid

        engine, places = jobs.build({"mode": "local"}, 1), []
        patches = {
            "evaluate": mock.Mock(side_effect=StepVoid(Place(0, 0, 0), True)),
            "dist": mock.Mock(all_reduce=lambda tensor, **_: places.append(str(tensor.device))),
        }
        with mock.patch.multiple(module, **patches):
            engine.eval_batch(iter([]))
        return places


def test_an_evaluation_without_messages_meets_on_the_device():
    (places,) = run_ranks(in_vain, 1, 1)  # NCCL knows of no others
    assert places == ["cuda:1", "cuda:1"]


PLANTS = {
    "wait: a draw of positions goes to the device from pageable memory": Plant(
        "model.heads:AuxiliaryHead.forward",
        "to_device(torch.randperm(total)[:count], targets_N.device)",
        "torch.randperm(total)[:count].to(targets_N.device)",
        "wait",
        "heads.forward",
    ),
    "wait: a loss is read in every micro-batch": Plant(
        "engine.executor:Executor._book",
        "total, count =",
        "loss.item(); total, count =",
        "wait",
        "executor._book",
    ),
    "wait: a positive loss is looked for by a mask": Plant(
        "engine.finite:Watch.see",
        "tensor.detach().sum()",
        "tensor[tensor > 0].detach().sum()",
        "wait",
        "finite.see",
    ),
    "order: what came is used before it is there": Plant(
        "links.staging:Staging.to_device", "computing.wait_stream(self._stream)", "", "order"
    ),
    "order: what leaves is copied before it is computed": Plant(
        "links.staging:Staging.to_host",
        "self._stream.wait_stream(torch.cuda.current_stream(self.device))",
        "",
        "order",
        "staging.to_host",
    ),
    "order: a message leaves before it is copied": Plant(
        "links.staging:Departures.after", "event.synchronize()", "None", "order", "pair._start"
    ),
    "reuse: a buffer serves again before it has left": Plant(
        "links.pair:Sender._take_back",
        "self._wait(work, purpose)",
        "[sent._work.wait() for sent in work._future.result().works]",  # nobody is told
        "reuse",
        "staging.to_host",
    ),
    "freed: what leaves is let go while it is copied": Plant(
        "links.staging:Staging.to_host",
        "if tensor.is_cuda:",
        "if None:",
        "freed",
    ),
    "freed: what came is let go while it is used": Plant(
        "links.staging:Staging.to_device", "tensor.record_stream(computing)", "pass", "freed"
    ),
    "device: the thread that sends off stands on device 0": Plant(
        "links.staging:stand_on",
        "torch.cuda.set_device(device)",
        "pass",
        "device",
        "staging.<lambda>",
    ),
    "spin: the thread that sends off takes a core": Plant(
        "links.staging:Staging.to_host",
        "torch.cuda.Event(blocking=True)",
        "torch.cuda.Event()",
        "spin",
        "staging.<lambda>",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name):
    plant = PLANTS[name]
    section = {**LOCAL, "head": {"token_fraction": 0.5}}
    results = run_ranks(watched, 2, section, 2, 1, plant, steps=2)
    found = {fault for result in results for step in steps_of(result) for fault in step}
    found -= {("wait", ONE_READ)}
    assert {kind for kind, _ in found} == {plant.kind}
    assert plant.where is None or {where for _, where in found} == {plant.where}


def test_weights_of_a_checkpoint_on_the_host_meet_none_of_the_device(tmp_path):
    plant = Plant(
        "replicas.head_copies:Copies.take", "new = to_device(new, tensor.device)", "pass", ""
    )
    section = {"mode": "local", "head": COPIED}
    with pytest.raises(RankError, match="Expected all tensors to be on the same device"):
        run_ranks(watched, 2, section, 2, 1, plant, folder=str(tmp_path), steps=9, **FEW)
