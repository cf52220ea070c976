"""One device: what each stage of a model costs on it alone, what the simulator makes of that for
several such devices, what heads cost, and how fast the engine is beside a plain loop.

Several processes on one device would share its time and hide every bubble, so stages are timed one
after another, each alone. Useful MFU counts the model's own floating-point operations (readout and
attention included, auxiliary heads not) over the time of the whole stage, heads included; a
pipeline's is then that times its efficiency.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config import shipped
from ds_local.config.catalog import head_of
from ds_local.config.files import local_parallel
from ds_local.config.sections import HeadConfig
from ds_local.errors import ConfigError
from ds_local.measure import report
from ds_local.measure.device import SEED, Device, Layers
from ds_local.measure.gpu_checks import rows_of_study, rows_of_tests
from ds_local.measure.gpu_engine import engine_rows
from ds_local.measure.gpu_predictions import predictions
from ds_local.measure.gpu_rows import is_done, merged, rows_of
from ds_local.measure.heads import PARTS, VARIANTS, loss_of
from ds_local.model import blocks, families
from ds_local.model.flops import choose_parts, forward_flops

Row = dict[str, Any]

TINY = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 8,
    "n_head": 2,
    "vocab_size": 512,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"readout": "shared", "token_fraction": 0.125}
KERNELS = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}  # kernel -> its package


def measure(args: argparse.Namespace) -> list[Row]:
    """Rows of `benchmark.py gpu`. What stands in `args.json` already is not measured again, and
    what does not fit into the device's memory has no row.

    Raises:
        ConfigError: without a CUDA device, except in a dry run; for a model that is none.
    """
    if args.dry_run:
        args.models, args.tokens, args.sequences, args.repeats = ["tiny"], 16, 2, 2
        args.micro_batches = min(args.micro_batches, 8)
        args.kernel = "torch"
    elif not torch.cuda.is_available():
        raise ConfigError(
            "benchmark.py gpu needs a CUDA device; --dry-run shows on the CPU that it works"
        )
    rows = report.load([args.json]) if args.json and args.json.exists() else []
    for task, run in _tasks(_Bench(args), args):
        if is_done(task, rows, args):
            continue
        rows = merged(rows, rows_of(task, run, args))
        report.save(rows, args.json, "gpu")
    return rows


def _tasks(bench: _Bench, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what makes its rows), the most telling first."""
    kinds = [False] if args.no_compile else [True, False]
    if "tests" in args.parts:
        yield "tests", partial(rows_of_tests, args)
    for model in args.models:
        config = bench.config(model)
        for compiled in kinds if "whole" in args.parts else []:
            yield f"{model} whole {compiled}", partial(bench.whole, model, config, compiled)
        for stages in args.stages if "stages" in args.parts else []:
            for compiled in kinds:
                name = f"{model} {stages} stages {compiled}"
                yield name, partial(bench.stages_and_more, model, config, stages, compiled)
    first = args.models[0]
    source = bench.source(first)
    if "engine" in args.parts:
        yield f"{first} engine", partial(engine_rows, bench.device, source, first, args)
    if "heads" in args.parts:
        yield f"{first} heads", partial(bench.heads, first, bench.config(first))
    if "study" in args.parts:
        yield "study", partial(rows_of_study, args)


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = Device("cpu" if args.dry_run else "cuda", args.repeats)

    def source(self, model: str) -> dict[str, Any]:
        """The model's config.json, without dropout. Raises ConfigError where there is none."""
        if model == "tiny":
            return TINY
        path = shipped.find(f"{model}.json")
        if not path.exists():
            names = ", ".join(name.removesuffix(".json") for name in shipped.MODELS)
            raise ConfigError(f"no model is called {model!r}; there are {names}")
        return json.loads(path.read_text())

    def config(self, model: str) -> Any:
        return families.load_model_config(self.source(model))

    @property
    def tokens(self) -> int:
        return self.args.sequences * self.args.tokens

    def mfu(self, config: Any, num_blocks: int, readout: bool, seconds: float) -> float:
        block, last = forward_flops(config, self.args.tokens)
        flops = 3.0 * self.tokens * (block * num_blocks + last * readout)
        return flops / seconds / (self.args.peak_tflops * 1e12)

    def _readout(self, config: Any) -> blocks.Readout:
        return self.device.ready(blocks.Readout(config, SEED, self.args.kernel))

    def _size(self) -> Row:
        return {
            "sequences": self.args.sequences,
            "tokens": self.args.tokens,
            "kernel": self.args.kernel,
        }

    def whole(self, model: str, config: Any, compiled: bool) -> list[Row]:
        """The honest yardstick: the model in one process, forward, backward and optimizer step,
        with as many micro-batches a step as the engine has."""
        self.device.forget_peak()
        depth, count = families.num_blocks(config), self.args.accumulate
        layers = [blocks.Embedding(config, SEED), *self.device.blocks(config, depth)]
        body, readout = self.device.ready(Layers(layers), compiled), self._readout(config)
        parameters = [*body.parameters(), *readout.parameters()]
        optimizer = self.device.adamw(parameters)
        ids = self.device.ids(config, self.args.sequences, self.args.tokens)

        def step() -> None:
            for _ in range(count):
                (readout.loss(body(ids), ids) / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = self.device.seconds(step) / count
        row = {
            "what": "whole model",
            "model": model,
            "compiled": compiled,
            "micro_batches": count,
            "tokens_per_second": self.tokens / seconds,
            "useful_mfu": self.mfu(config, depth, True, seconds),
            "peak_bytes": self.device.peak(),
        }
        return [row | self._size()]

    def stages_and_more(self, model: str, config: Any, stages: int, compiled: bool) -> list[Row]:
        """Times of every stage by itself, cut as `causal_lm` cuts it with cheap heads, and what
        the simulator makes of them."""
        head = HEAD | {"kernel": self.args.kernel}
        section = local_parallel({"local_parallel": {"mode": "local", "head": head}})
        parts = choose_parts(config, section, stages, self.args.micro_batches, self.args.tokens)
        kinds: dict[tuple[bool, bool, int], Row] = {}  # stages of one kind take one time
        rows = []
        for stage, (begin, end) in enumerate(pairwise(parts)):
            first, last = stage == 0, stage + 1 == stages
            kind = first, last, end - begin - first - last
            if kind not in kinds:
                kinds[kind] = self._stage(config, section.head, parts, stage, kind, compiled)
            facts = {"model": model, "stages": stages, "stage": stage, "compiled": compiled}
            rows.append({"what": "stage", **facts, **kinds[kind]})
        return rows + predictions(rows, self.tokens, self.args.micro_batches)

    def _stage(
        self,
        config: Any,
        head: Any,
        parts: list[int],
        stage: int,
        kind: tuple[bool, bool, int],
        compiled: bool,
    ) -> Row:
        self.device.forget_peak()
        first, last, count = kind
        layers = self.device.blocks(config, count)
        if first:
            layers.insert(0, blocks.Embedding(config, SEED))
        body = self.device.ready(Layers(layers), compiled)
        ids = self.device.ids(config, self.args.sequences, self.args.tokens)
        hidden = self.device.hidden(config, *ids.shape)
        loss: nn.Module
        if last:
            loss = self._readout(config)
            loss_of = loss.loss
        else:
            loss = self.device.ready(blocks.make_head(config, stage, SEED, head, parts))
            loss_of = loss
        given = ids if first else hidden
        times = self._times(body, given, hidden, compiled)
        learning = [p for p in loss.parameters() if p.requires_grad]
        reached = hidden.detach().clone().requires_grad_()
        run = partial(_gradients, loss_of, reached, ids, [reached, *learning])
        times["head"] = self.device.seconds(run)
        total = sum(times.values())
        times["optimizer"] = self._update([*body.parameters(), *learning])
        return {
            "blocks": count,
            **times,
            "useful_mfu": self.mfu(config, count, last, total),
            "peak_bytes": self.device.peak(),
            "activation_bytes": hidden.numel() * 2,
            **self._size(),
        }

    def _times(self, body: Any, given: Tensor, out: Tensor, compiled: bool) -> dict[str, float]:
        """Forward and the two halves of the backward pass, in seconds. Compiled layers compute
        both halves in one, so theirs are taken to be alike."""
        parameters = list(body.parameters())
        inputs = [given.detach().clone().requires_grad_()] if given.is_floating_point() else []
        source, gradient = (inputs or [given])[0], torch.ones_like(out)

        def backward(wanted: list[Tensor]) -> float:
            return self.device.seconds(lambda: torch.autograd.grad(body(source), wanted, gradient))

        forward = self.device.seconds(lambda: body(source))
        both = max(0.0, backward([*inputs, *parameters]) - forward)
        half = both / 2
        if inputs and not compiled:
            half = min(both, max(0.0, backward(inputs) - forward))
        return {"forward": forward, "input_grad": half, "weight_grad": both - half}

    def _update(self, parameters: list[Tensor]) -> float:
        """Seconds of an AdamW step on fp32 copies, which are then copied back."""
        masters = [p.detach().float().requires_grad_() for p in parameters]
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer = self.device.adamw(masters)

        def step() -> None:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)

        return self.device.seconds(step)

    def heads(self, model: str, config: Any) -> Iterator[Row]:
        """Time and memory of each kind of head, beside a block that is compiled where it is."""
        ids = self.device.ids(config, self.args.sequences, self.args.tokens)
        reached = self.device.hidden(config, *ids.shape).requires_grad_()

        @cache
        def one_block(compiled: bool) -> float:
            block = self.device.ready(Layers(self.device.blocks(config, 1)), compiled)
            wanted = [reached, *block.parameters()]
            return self.device.seconds(lambda: torch.autograd.grad(block(reached).sum(), wanted))

        kernels = ["torch", *(kernel for kernel, package in KERNELS.items() if find_spec(package))]
        variants = VARIANTS | {f"full, kernel {kernel}": {"kernel": kernel} for kernel in kernels}
        for name, given in variants.items():
            whole = {"kernel": self.args.kernel, **head_of(given, config.vocab_size)}
            section, compiled = HeadConfig(**whole), whole["kernel"] == "compiled"
            block_seconds = one_block(compiled)
            self.device.forget_peak()
            head = self.device.ready(blocks.make_head(config, 0, SEED, section, PARTS), compiled)
            learning = [p for p in head.parameters() if p.requires_grad]
            run = partial(_gradients, partial(loss_of, head), reached, ids, [reached, *learning])
            yield {
                "what": "head",
                "model": model,
                "head": name,
                "section": given,
                "seconds": self.device.seconds(run),
                "block_seconds": block_seconds,
                "block_compiled": compiled,
                "peak_bytes": self.device.peak(),
                **self._size(),
                "kernel": section.kernel,
            }


def _gradients(loss_of: Any, hidden: Tensor, labels: Tensor, wanted: list[Tensor]) -> Any:
    return torch.autograd.grad(loss_of(hidden, labels), wanted)
