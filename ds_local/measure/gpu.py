"""One device: what each stage of GPT-2 costs on it alone, and what the simulator makes of that for
several such devices.

Several processes on one device would share its time and hide every bubble, so stages are timed one
after another, each alone. Useful MFU counts the model's own floating-point operations (readout and
attention included, auxiliary heads not) over the time of the whole stage, heads included; a
pipeline's is then that times its efficiency.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.config.files import local_parallel
from ds_local.errors import ConfigError
from ds_local.model import blocks, families
from ds_local.model.flops import choose_parts
from ds_local.schedules.list_scheduler import make_schedule
from ds_local.schedules.peers import PEERS
from ds_local.schedules.routes import make_routes
from ds_local.schedules.simulator import Costs, simulate

SEED = 1234
# name -> width, blocks, attention heads
MODELS = {
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
    "xl": (1600, 48, 25),
    "tiny": (64, 8, 2),
}
VOCABULARY = 50257
LINKS = {
    "NVLink 450 GB/s": 3.6e12,
    "100 Gb/s": 1e11,
    "10 Gb/s": 1e10,
    "1 Gb/s": 1e9,
}  # bits per second
HEAD = {"readout": "shared", "token_fraction": 0.125}
PREDICTED = ("local", "1f1b", "zero_bubble")


class _Layers(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `benchmark.py gpu`.

    Raises:
        ConfigError: without a CUDA device, except in a dry run.
    """
    if args.dry_run:
        args.models, args.tokens, args.sequences, args.repeats = ["tiny"], 16, 2, 2
    elif not torch.cuda.is_available():
        raise ConfigError(
            "benchmark.py gpu needs a CUDA device; --dry-run shows on the CPU that it works"
        )
    unknown = set(args.models) - set(MODELS)
    if unknown:
        raise ConfigError(
            f"no model is called {sorted(unknown)[0]!r}; there are {', '.join(MODELS)}"
        )
    bench = _Bench(args)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for compiled in [False] if args.no_compile else [False, True]:
            rows.append(bench.whole_model(model, compiled))
            for stages in args.stages:
                parts = bench.stages(model, stages, compiled)
                rows += parts + bench.predictions(model, stages, compiled, parts)
    return rows


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.vocabulary = 512 if args.dry_run else VOCABULARY

    def config(self, model: str) -> Any:
        width, depth, heads = MODELS[model]
        return families.load_model_config(
            {
                "model_type": "gpt2",
                "vocab_size": self.vocabulary,
                "n_positions": self.args.tokens,
                "n_embd": width,
                "n_layer": depth,
                "n_head": heads,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "tie_word_embeddings": False,
            }
        )

    @property
    def tokens(self) -> int:
        return self.args.sequences * self.args.tokens

    def useful_flops(self, config: Any, num_blocks: int, readout: bool) -> float:
        """Of a micro-batch, forward and backward."""
        block, last = blocks.forward_flops(config, self.args.tokens)
        return 3.0 * self.tokens * (block * num_blocks + last * readout)

    def mfu(self, flops: float, seconds: float) -> float:
        return flops / seconds / (self.args.peak_tflops * 1e12)

    def _prepare(self, module: nn.Module, compiled: bool) -> Any:
        module = module.to(self.device, torch.bfloat16).train()
        return torch.compile(module) if compiled else module

    def _seconds(self, run: Callable[[], Any]) -> float:
        """Median over the repetitions, by CUDA events; after a few that warm up, or compile."""
        times = []
        for repeat in range(3 + self.args.repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end) / 1000
            else:
                began = time.perf_counter()
                run()
                taken = time.perf_counter() - began
            if repeat >= 3:
                times.append(taken)
        return median(times)

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def whole_model(self, model: str, compiled: bool) -> dict[str, Any]:
        """The honest yardstick: the model in one process, forward, backward and optimizer step."""
        config, depth = self.config(model), MODELS[model][1]
        self._forget_peak()
        layers = [
            blocks.Embedding(config, SEED),
            *(blocks.Block(config, i, SEED) for i in range(depth)),
        ]
        body = self._prepare(_Layers(layers), compiled)
        readout = blocks.Readout(config, SEED).to(self.device, torch.bfloat16)
        parameters = [*body.parameters(), *readout.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=self.device.type == "cuda")
        ids = torch.randint(
            self.vocabulary, (self.args.sequences, self.args.tokens), device=self.device
        )

        def step() -> None:
            readout.loss(body(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = self._seconds(step)
        print(
            f"{model}, whole, compiled {compiled}: {self.tokens / seconds:,.0f} tokens/s",
            file=sys.stderr,
        )
        return {
            "what": "whole model",
            "model": model,
            "compiled": compiled,
            "tokens_per_second": self.tokens / seconds,
            "useful_mfu": self.mfu(self.useful_flops(config, depth, True), seconds),
            "peak_bytes": self._peak(),
            "sequences": self.args.sequences,
            "tokens": self.args.tokens,
        }

    def stages(self, model: str, stages: int, compiled: bool) -> list[dict[str, Any]]:
        """Times of every stage by itself, cut as `causal_lm` cuts it with cheap heads."""
        config = self.config(model)
        section = local_parallel({"local_parallel": {"mode": "local", "head": HEAD}})
        parts = choose_parts(config, section, stages, self.args.micro_batches, self.args.tokens)
        return [
            self._stage(model, config, section.head, parts, stage, compiled)
            for stage in range(stages)
        ]

    def _stage(
        self, model: str, config: Any, head: Any, parts: list[int], stage: int, compiled: bool
    ) -> dict[str, Any]:
        self._forget_peak()
        first, last, own = stage == 0, stage == len(parts) - 2, list(pairwise(parts))[stage]
        numbers = range(own[0] + first - 1, own[1] - last - 1)  # of its blocks
        layers: list[nn.Module] = [blocks.Block(config, number, SEED) for number in numbers]
        if first:
            layers.insert(0, blocks.Embedding(config, SEED))
        body = self._prepare(_Layers(layers), compiled)
        ids = torch.randint(
            self.vocabulary, (self.args.sequences, self.args.tokens), device=self.device
        )
        hidden = torch.randn(
            *ids.shape, config.hidden_size, device=self.device, dtype=torch.bfloat16
        )
        if last:
            readout = blocks.Readout(config, SEED).to(self.device, torch.bfloat16)
            loss_of, loss_parameters = readout.loss, list(readout.parameters())
        else:
            made = (
                blocks.make_head(config, stage, SEED, head, parts)
                .to(self.device, torch.bfloat16)
                .train()
            )
            loss_of, loss_parameters = made, [p for p in made.parameters() if p.requires_grad]
        times = self._times(body, ids if first else hidden, hidden, loss_of, loss_parameters, ids)
        useful = self.useful_flops(config, len(numbers), last)
        total = sum(times.values())
        print(
            f"{model}, stage {stage} of {len(parts) - 1}, compiled {compiled}: {1000 * total:.2f} "
            "ms",
            file=sys.stderr,
        )
        return {
            "what": "stage",
            "model": model,
            "stages": len(parts) - 1,
            "stage": stage,
            "blocks": len(numbers),
            "compiled": compiled,
            **times,
            "useful_mfu": self.mfu(useful, total),
            "peak_bytes": self._peak(),
            "sequences": self.args.sequences,
            "tokens": self.args.tokens,
            "activation_bytes": hidden.numel() * 2,
        }

    def _times(
        self,
        body: Any,
        given: Tensor,
        out: Tensor,
        loss_of: Any,
        loss_parameters: Sequence[Tensor],
        ids: Tensor,
    ) -> dict[str, float]:
        """Forward, the two halves of the backward pass, and head with its gradients, in seconds."""
        parameters = list(body.parameters())
        through = given.detach().clone().requires_grad_() if given.is_floating_point() else None
        gradient = torch.ones_like(out)
        detached = out.detach().clone().requires_grad_()
        inputs = [] if through is None else [through]
        source = given if through is None else through

        def backward(wanted: list[Tensor]) -> float:
            return self._seconds(lambda: torch.autograd.grad(body(source), wanted, gradient))

        forward = self._seconds(lambda: body(source))
        both = backward([*inputs, *parameters]) - forward
        input_grad = backward(inputs) - forward if inputs else both / 2
        head = self._seconds(
            lambda: torch.autograd.grad(loss_of(detached, ids), [detached, *loss_parameters])
        )
        return {
            "forward": forward,
            "input_grad": max(0.0, input_grad),
            "weight_grad": max(0.0, both - input_grad),
            "head": head,
        }

    def predictions(
        self, model: str, stages: int, compiled: bool, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What the simulator makes of measured stages on that many devices.

        Others' schedules are given the same cut without the heads, the readout's loss with the last
        stage's work. Efficiency is the mean stage's useful time over the time of a step.
        """
        found = []
        times = {
            name: [row[name] for row in rows]
            for name in ("forward", "input_grad", "weight_grad", "head")
        }
        plain = dict(times, head=[0.0] * stages)
        for name, seconds in (("forward", 1 / 3), ("input_grad", 1 / 3), ("weight_grad", 1 / 3)):
            plain[name] = [*times[name][:-1], times[name][-1] + seconds * times["head"][-1]]
        useful = sum(sum(plain[name]) for name in ("forward", "input_grad", "weight_grad")) / stages
        for link, rate in LINKS.items():
            seconds = rows[0]["activation_bytes"] * 8 / rate
            for schedule in PREDICTED:
                costs = Costs(**(times if schedule == "local" else plain), link=seconds)  # type: ignore[arg-type]
                if schedule == "local":
                    order = make_schedule(
                        [(make_routes("local", stages), self.args.micro_batches)], stages
                    )
                else:
                    order = PEERS[schedule](stages, self.args.micro_batches)
                period = simulate(order, costs).steady_period
                found.append(
                    {
                        "what": "prediction",
                        "system": "simulator",
                        "schedule": schedule + (", compiled" if compiled else ""),
                        "model": model,
                        "stages": stages,
                        "micro_batches": self.args.micro_batches,
                        "compiled": compiled,
                        "link": {"name": link, "bits_per_second": rate},
                        "efficiency": self.args.micro_batches * useful / period,
                        "step_seconds": period,
                        "tokens_per_second": self.tokens * self.args.micro_batches / period,
                        "peak_live_micro_batches": list(order.peak_live),
                    }
                )
        return found
