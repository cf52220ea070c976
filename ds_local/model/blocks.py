"""A Hugging Face causal language model as a list of pipeline layers: embedding, blocks, readout.

The layers wrap Hugging Face's own modules. What a block takes besides the hidden state is computed
on the spot from its shape by the model's own code (`frames.py`), so that one tensor is all that
travels between stages. Where a micro-batch has a mask or positions of its own, layers pass a dict
of these and the hidden state. Every module is taken from a real `PreTrainedModel`: a block built
from a bare config has no attention implementation and silently sees the future.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ds_local.config.sections import HeadConfig
from ds_local.model.anatomy import (
    config_json,
    config_of,
    family_of,
    frame_of,
    num_blocks,
    skeleton,
)
from ds_local.model.companion import Companion
from ds_local.model.frames import Call
from ds_local.model.frequent import FrequentPart, SampledSoftmax
from ds_local.model.heads import AuxiliaryHead, count_targets, readout_loss
from ds_local.model.logits import LogitRule
from ds_local.model.routers import listen, routers_of, with_logits
from ds_local.model.seeds import seeded
from ds_local.model.split_linear import SPLITTABLE, casts, linear
from ds_local.model.state import GIVEN, HIDDEN, State, hidden_of


def _materialize(config: PretrainedConfig, name: str, *key: int | str) -> Any:
    """A copy of one part of the model with freshly initialized weights that depend on `key`
    alone."""
    model = skeleton(config)
    part = copy.deepcopy(model.get_submodule(name)).to_empty(device="cpu")
    with seeded(*key):
        part.apply(model._init_weights)
    return part


class _Conv1D(Conv1D):
    """GPT-2's linear layer, whose weight is transposed, with a weight gradient that can be
    deferred."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x) if casts(x) else linear(x, self.weight, self.bias, transposed=True)
        )


SPLITTABLE[Conv1D] = _Conv1D


_SHAPES = 8  # of [B, T] that are kept: more would hold memory for each


class Context:
    """What every block of a stage takes besides the hidden state (masks, positions, rotary
    embeddings), kept for the newest shapes."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self._frame = frame_of(config)
        self._kept: dict[tuple[Any, ...], list[Call]] = {}
        # the newest mask or positions that a micro-batch gave, and what came of them
        self._newest: tuple[dict[str, Tensor], list[Call]] = {}, []

    def __reduce__(self) -> Any:
        """What is kept is anybody's, so copies of a block share it."""
        return context_of, (self._config,)

    def call(self, state: State, index: int) -> Call:
        """What block `index` takes beside this hidden state."""
        hidden_BTD = hidden_of(state)
        given = {n: state[n] for n in GIVEN if n in state} if isinstance(state, dict) else {}
        if given:
            return self._of_given(given, hidden_BTD)[index]
        key = (hidden_BTD.shape[:2], hidden_BTD.dtype, hidden_BTD.device)
        if key not in self._kept:
            while len(self._kept) >= _SHAPES:
                del self._kept[next(iter(self._kept))]
            calls = self._frame.calls_of(hidden_BTD, {})
            self._kept[key] = [call._replace(hidden=hidden_BTD.new_empty(0)) for call in calls]
        return self._kept[key][index]

    def _of_given(self, given: dict[str, Tensor], hidden_BTD: Tensor) -> list[Call]:
        """Kept for the next block of the same micro-batch."""
        known, calls = self._newest
        if known.keys() != given.keys() or any(known[name] is not given[name] for name in given):
            calls = self._frame.calls_of(hidden_BTD, given)
            self._newest = given, calls
        return calls


def context_of(config: PretrainedConfig) -> Context:
    """That of all blocks of a config in this process."""
    return _context_of(config_json(config))


@functools.lru_cache(maxsize=8)
def _context_of(config_json: str) -> Context:
    return Context(config_of(config_json))


class Embedding(nn.Module):
    """Token ids [B, T] -> hidden [B, T, D]: all that the model does before its blocks.

    A dict of `input_ids`, and `attention_mask` or `position_ids` or both, becomes the same dict
    with the hidden state in the place of the ids.
    """

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        super().__init__()
        names = family_of(config).embedding
        for part, name in names.items():
            setattr(self, part, _materialize(config, name, seed, part))
        # it uses the modules above, and is none itself
        self._frame = frame_of(config, {name: getattr(self, part) for part, name in names.items()})

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a lookup gains nothing, and compiled for a GPU its gradient would be summed in
        any order."""

    def forward(self, inputs: Tensor | dict[str, Tensor]) -> State:
        beside = dict(inputs) if isinstance(inputs, dict) else {"input_ids": inputs}
        ids_BT = beside.pop("input_ids")
        dtype = next(self.parameters()).dtype
        hidden_BTD = self._frame.first_hidden(ids_BT, beside, dtype, self.training)
        return {HIDDEN: hidden_BTD, **beside} if beside else hidden_BTD


class Block(nn.Module):
    """One decoder layer: hidden [B, T, D], alone or in a dict with what `Embedding` passes on, ->
    the same, and the logits of its routers where it has some."""

    def __init__(
        self,
        config: PretrainedConfig,
        index: int,
        seed: int,
        key: tuple[int | str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.block = _materialize(
            config, f"{family_of(config).blocks}.{index}", seed, *(key or ("block", index))
        )
        self.index = index
        self.context = context_of(config)
        self._router_logits = listen(self.block, routers_of(config))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the layer; the mask is made once, outside. Blocks of one shape share the
        compiled code."""
        self.block.compile(*args, **kwargs)

    def forward(self, state: State) -> State:
        call = self.context.call(state, self.index)
        try:
            output = self.block(hidden_of(state), *call.args, **call.kwargs)
            hidden_BTD = output[0] if isinstance(output, tuple | list) else output
            after = {**state, HIDDEN: hidden_BTD} if isinstance(state, dict) else hidden_BTD
            return with_logits(after, self.index, self._router_logits)
        finally:
            # checkpointing ends a recomputation as soon as it has what it needs, inside a block:
            # what was heard by then must not count in the next forward
            self._router_logits.clear()


class Readout(nn.Module):
    """Final norm and unembedding: hidden [B, T, D] -> logits [B, T, V]."""

    def __init__(self, config: PretrainedConfig, seed: int, kernel: str = "torch") -> None:
        super().__init__()
        family = family_of(config)
        self.kernel = kernel
        self.norm = final_norm(config, seed, "norm")
        self.readout: nn.Linear = _materialize(config, family.readout, seed, "readout")
        self.rule = LogitRule.of(config)

    def forward(self, state: State) -> Tensor:
        return self.rule(self.readout(self.norm(hidden_of(state))))

    def loss(self, state: State, labels_BT: Tensor) -> Tensor:
        """The scalar loss of `heads.lm_loss`; the engine calls this instead of `forward` followed
        by a loss function."""
        hidden_ND = hidden_of(state)[:, :-1].flatten(0, 1)
        targets_N = labels_BT[:, 1:].flatten()
        loss = readout_loss(self.norm(hidden_ND), self.readout, targets_N, self.kernel, self.rule)
        return loss / count_targets(labels_BT).clamp(min=1)


def final_norm(config: PretrainedConfig, *key: int | str) -> nn.Module:
    """What a model of this family has between its blocks and its readout."""
    name = family_of(config).norm
    return nn.Identity() if name is None else _materialize(config, name, *key)


def make_head(
    config: PretrainedConfig,
    segment: int,
    seed: int,
    head: HeadConfig,
    parts: Sequence[int],
    counts_V: Tensor | None = None,
) -> AuxiliaryHead:
    """The auxiliary head of a segment: the family's own blocks and norm, and a linear readout.

    Args:
        parts: layer boundaries of the segments; layer 0 is the embedding.
        counts_V: how often each token comes, for a head with the frequent part of the vocabulary;
            default all alike, so that the lowest ids are taken.
    """
    family = family_of(config)
    first = parts[segment + 1] - 1  # block that follows the segment
    private = []
    for number in range(head_blocks(config, segment, head, parts)):
        key = (
            ("head block", segment, number)
            if head.blocks_from == "new"
            else ("block", first + number)
        )
        private.append(Block(config, first + number, seed, key))
        private[-1].requires_grad_(head.blocks_from != "next_tracked")
    norm = final_norm(config, seed, "norm" if head.init == "model" else "head norm", segment)
    down = None
    if head.readout == "shared" or head.init == "model":
        readout = _materialize(config, family.readout, seed, "readout").requires_grad_(
            head.readout == "private"
        )
    else:
        with seeded(seed, "head readout", segment):
            bias = skeleton(config).get_output_embeddings().bias is not None
            width, classes = head.rank or config.hidden_size, head.classes(config.vocab_size)
            readout = _new_linear(config, width, classes, bias)
            if head.rank:
                down = _new_linear(config, config.hidden_size, head.rank)
    if head.adapter:
        down = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(down.weight)
    frequent = sampled = companion = None
    if head.vocabulary is not None:
        counts_V = torch.zeros(config.vocab_size) if counts_V is None else counts_V
        if head.rare_samples is None:
            frequent = FrequentPart(counts_V, head.vocabulary)
        else:
            sampled = SampledSoftmax(counts_V, head.vocabulary, head.rare_samples)
    if head.companion:
        with seeded(seed, "head companion", segment):
            foresee = _new_linear(config, config.hidden_size, config.hidden_size)
        companion = Companion(foresee, head.companion)
    return AuxiliaryHead(
        norm,
        readout,
        private,
        down,
        head.temperature,
        head.token_fraction,
        head.kernel,
        LogitRule.of(config),
        routers_of(config),
        frequent,
        sampled,
        companion,
    )


def _new_linear(
    config: PretrainedConfig, width: int, features: int, bias: bool = False
) -> nn.Linear:
    """Its weights drawn as the family draws them."""
    linear = nn.Linear(width, features, bias=bias)
    skeleton(config)._init_weights(linear)
    return linear


def head_blocks(
    config: PretrainedConfig, segment: int, head: HeadConfig, parts: Sequence[int]
) -> int:
    """Private blocks in the head of `segment`: as many as asked for, and as there are to be copied
    or above it."""
    last = parts[segment + 2] if head.blocks_from == "next_tracked" else parts[-1]
    return head.blocks_of(segment, min(last - 1, num_blocks(config)) - (parts[segment + 1] - 1))
