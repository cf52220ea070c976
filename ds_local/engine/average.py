"""A running average of a stage's weights (EMA), in fp32 beside those that train."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_local.engine.module import LocalPipelineModule
from ds_local.outputs.checkpoint_names import AVERAGE_FILE, AVERAGE_HEAD_FILE


class Average:
    """Of the layers and heads of this stage. Every replica computes the same.

    Args:
        parts: name of a file of a checkpoint -> the module whose averages it holds.
        decay: share of the average that stays in a step; in step n at most n / (n + 9), so that the
            first weights do not weigh for long. None: nothing is averaged.
    """

    def __init__(self, parts: Mapping[str, nn.Module], decay: float | None) -> None:
        self._parts, self._decay = parts if decay is not None else {}, decay or 0.0
        self._averages = {
            parameter: parameter.detach().float().clone()
            for part in self._parts.values()
            for parameter in part.parameters()
        }

    @classmethod
    def of(cls, module: LocalPipelineModule) -> Average:
        """As "ema" of its section says."""
        numbered = zip(module.layer_numbers, module.forward_funcs, strict=True)
        layers = {AVERAGE_FILE.format(n): one for n, one in numbered if isinstance(one, nn.Module)}
        ends = {int(segment): module.segment_parts[int(segment) + 1] for segment in module.heads}
        heads = {AVERAGE_HEAD_FILE.format(ends[s]): module.heads[str(s)] for s in ends}
        made = cls({**layers, **heads}, module.section.ema)
        module.on_load.append(made.restart)
        return made

    @torch.no_grad()
    def restart(self) -> None:
        """From the weights as they are, which were loaded."""
        for parameter, average in self._averages.items():
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """With the weights after optimizer step `step`, counted from 1."""
        share = 1 - min(self._decay, step / (step + 9))
        for parameter, average in self._averages.items():
            average.lerp_(parameter.float(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The stage computes with the averages for a while. Do not train meanwhile."""
        kept = {parameter: parameter.detach().clone() for parameter in self._averages}
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, tensor in weights.items():
            parameter.copy_(tensor)

    def save(self, write: Callable[[Any, str], None], folder: str | Path) -> None:
        """A file for each layer and head, with the names of its tensors."""
        for name, part in self._parts.items():
            own = {key: self._averages[parameter] for key, parameter in part.named_parameters()}
            write({**part.state_dict(), **own}, str(Path(folder, name)))

    @torch.no_grad()
    def load(self, look: Callable[[str], Mapping[str, Any]], files: Collection[str]) -> list[str]:
        """Go on with those of a checkpoint.

        Args:
            look: gives the content of a file.
            files: that there are.

        Returns:
            The files that are not there or of another shape: these averages begin with the weights.
        """
        missing = []
        for name, part in self._parts.items():
            found = look(name) if name in files else {}
            named = dict(part.named_parameters())
            if all(getattr(found.get(k), "shape", None) == p.shape for k, p in named.items()):
                for key, parameter in named.items():
                    self._averages[parameter].copy_(found[key])
            else:
                missing.append(name)
        return missing
