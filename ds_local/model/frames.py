"""A frame: what Hugging Face's own model computes around its blocks, run by itself.

A model's code makes the first hidden state, the masks, the positions and whatever else its blocks
take. The frame is that code, with recorders in the place of the blocks and without weights, so that
what a block takes is what the library gives it, in any family. Sizes: B sequences, T tokens, D
hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_local.errors import DataError, UnsupportedModel
from ds_local.links.device import to_device

# no attention implementation of the library's: masks are not made for it
_WITHOUT_MASKS = "frame_without_masks"
OUTPUTS = (0, 1, 2)  # a block gives a tensor, or a tuple of so many


class Call(NamedTuple):
    """What a block was called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trace(NamedTuple):
    """What a model runs around its blocks: outermost modules by name, in order."""

    before: list[str]
    after: list[str]
    hidden: tuple[int, ...]  # shape of what the last block takes for a few tokens


class _Reached(Exception):
    """The block up to which a frame was to run."""


class Frame:
    """The code of a model around its blocks.

    Args:
        model: the whole model, on the meta device; it is not changed.
        blocks: name of its list of blocks.
        outputs: what a block gives, one of `OUTPUTS`.
        own: name -> module to use in the place of the model's.
        masks: make attention masks; without them no value on the device is looked at.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        outputs: int,
        own: Mapping[str, nn.Module] | None = None,
        masks: bool = True,
    ) -> None:
        self._made_from = model, blocks, outputs, own, masks
        originals: Any = model.get_submodule(blocks)
        # recorders have the attributes of the blocks: the library looks at some
        stubs = nn.ModuleList(copy.copy(block) for block in originals)
        self.model = copy.deepcopy(model, {id(originals): stubs})
        self._outputs, self._stubs = outputs, stubs
        self._calls: list[Call] = []
        self._until = len(stubs)
        self._place: tuple[Any, Any] | None = None
        for number, stub in enumerate(stubs):
            stub.forward = self._recorder(number, _names_of(stub))
        for name, module in (own or {}).items():
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, module)
        inside = blocks + "."
        self._outer = {
            name: module
            for name, module in self.model.named_modules()
            if not name.startswith(inside)
        }
        kept = {part for module in (own or {}).values() for part in module.modules()}
        self._hollow = [module for module in self._outer.values() if module not in kept]
        for module in self._hollow:
            _compute_buffers(module, model)
        self.model.config.use_cache = False
        if not masks:
            self.model.config._attn_implementation = _WITHOUT_MASKS

    def __reduce__(self) -> Any:
        """Copies are made anew, with copies of the modules of one's own."""
        return Frame, self._made_from

    def _recorder(self, number: int, names: list[str]) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            if number != len(self._calls):
                raise UnsupportedModel("its blocks do not run once each, in order")
            hidden = args[0] if args else kwargs.pop("hidden_states")
            kwargs |= zip(names, args[1:], strict=False)
            self._calls.append(Call(hidden, args[1 + len(names) :], kwargs))
            if number + 1 == self._until:
                raise _Reached
            return (hidden, None)[: self._outputs] if self._outputs else hidden

        return record

    def _to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Buffers to the device; parameters become zeros that take no memory."""
        if self._place == (device, dtype):
            return
        self._place = device, dtype
        zero = torch.zeros((), device=device, dtype=dtype)
        for module in self._hollow:
            for name, parameter in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(zero.expand(parameter.shape), False))
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, to_device(buffer, device))

    def _run(self, until: int, inputs: Mapping[str, Tensor], training: bool = False) -> list[Call]:
        """Calls of the blocks; the last is number `until` - 1."""
        takes = inspect.signature(self.model.forward).parameters
        for name in inputs:
            if name not in takes:
                kind = self.model.config.model_type
                raise DataError(f"a model of type {kind} takes no {name}; leave it out of the data")
        for module in self._outer.values():
            module.training = training
        self._calls, self._until = [], until
        with suppress(_Reached):
            self.model(**inputs, use_cache=False)
        calls, self._calls = self._calls, []
        return calls

    def calls_of(self, hidden_BTD: Tensor, given: Mapping[str, Tensor]) -> list[Call]:
        """What each block takes besides a hidden state of this shape, type and device.

        Args:
            given: `attention_mask`, `position_ids` or both, where the data has them.

        Raises:
            DataError: when the model takes no such thing.
        """
        self._to(hidden_BTD.device, hidden_BTD.dtype)
        with torch.no_grad():
            inputs = {"inputs_embeds": torch.zeros_like(hidden_BTD), **given}
            return self._run(len(self._stubs), inputs)

    def first_hidden(
        self, ids_BT: Tensor, given: Mapping[str, Tensor], dtype: torch.dtype, training: bool
    ) -> Tensor:
        """What the first block takes: [B, T, D]. Raises DataError as above."""
        self._to(ids_BT.device, dtype)
        return self._run(1, {"input_ids": ids_BT, **given}, training)[0].hidden

    def trace(self) -> Trace:
        """What the model runs before and after its blocks. The frame is of no use afterwards."""
        self._to(torch.device("cpu"), torch.float32)
        readout = self.model.get_output_embeddings()
        readout.forward = lambda hidden: hidden  # the real product would take seconds
        holders = {name for name in self._outer if self._holds_blocks(name)}
        seen: list[tuple[str, int]] = []
        running: list[str] = []

        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                if not running:
                    seen.append((name, len(self._calls)))
                running.append(name)

            return hook

        for name in self._outer.keys() - holders:
            self._outer[name].register_forward_pre_hook(enter(name))
            self._outer[name].register_forward_hook(lambda *_: running.pop() and None)
        limit = getattr(self.model.config, "max_position_embeddings", None) or 3
        length = min(3, limit) if limit > 0 else 3  # some write -1 for no limit
        calls = self._run(-1, {"input_ids": torch.zeros(1, length, dtype=torch.long)})
        if len(calls) != len(self._stubs):
            raise UnsupportedModel("its blocks do not run once each, in order")
        if any(0 < done < len(calls) for _, done in seen):
            raise UnsupportedModel("it runs modules of its own between its blocks")
        before = [name for name, done in seen if done == 0]
        after = [name for name, done in seen if done]
        return Trace(list(dict.fromkeys(before)), after, tuple(calls[-1].hidden.shape))

    def _holds_blocks(self, name: str) -> bool:
        return any(module is self._stubs for module in self._outer[name].modules())


def _names_of(block: nn.Module) -> list[str]:
    """Of what a block takes by its place, after the hidden state."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _compute_buffers(module: nn.Module, model: PreTrainedModel) -> None:
    """Real buffers for empty ones, computed as the library does when it loads a model."""
    empty = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
    for name, buffer in empty.items():
        setattr(module, name, torch.empty_like(buffer, device="cpu"))
    if empty:
        model._init_weights(module)
