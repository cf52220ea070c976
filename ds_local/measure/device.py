"""Timing on one device, and the layers that are timed on it."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.model import blocks
from ds_local.model.compiling import allow_kinds

SEED = 1234
WARM_UP = 3  # runs before those that count; the first one compiles


class Layers(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Device:
    """Where a benchmark runs: a CUDA device, or in a dry run the CPU.

    Args:
        repeats: timed runs, of which the median counts.
    """

    def __init__(self, kind: str, repeats: int) -> None:
        self.device = torch.device(kind)
        self.repeats = repeats
        self._is_cuda = kind == "cuda"

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median time of a run, by the device's own events."""
        times = [self._once(run) for _ in range(WARM_UP + self.repeats)]
        return median(times[WARM_UP:])

    def _once(self, run: Callable[[], Any]) -> float:
        if not self._is_cuda:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def forget_peak(self) -> None:
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """The most bytes that tensors have held since `forget_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._is_cuda else None

    def ready(self, module: nn.Module, compiled: bool = False) -> Any:
        """In bf16 on the device, set to train; with compiled layers if asked for."""
        module = module.to(self.device, torch.bfloat16).train()
        if compiled:
            allow_kinds()
            for layer in module.modules():
                if isinstance(layer, blocks.Block):
                    layer.compile()
        return module

    def blocks(self, config: Any, count: int) -> list[nn.Module]:
        """Blocks with the same weights: drawing others takes longer than what is measured."""
        first = blocks.Block(config, 0, SEED)
        first.block.to(self.device, torch.bfloat16)
        made = [first]
        for _ in range(count - 1):
            other = copy.copy(first)
            other._modules = {"block": copy.deepcopy(first.block)}
            made.append(other)
        return list(made)

    def ids(self, config: Any, sequences: int, tokens: int) -> Tensor:
        """Token ids [B, T], drawn."""
        return torch.randint(config.vocab_size, (sequences, tokens), device=self.device)

    def hidden(self, config: Any, sequences: int, tokens: int) -> Tensor:
        """A hidden state [B, T, D] in bf16, drawn."""
        shape = sequences, tokens, config.hidden_size
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def adamw(self, parameters: Sequence[Tensor]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=1e-4, fused=self._is_cuda)
