"""A Hugging Face causal language model as a list of pipeline layers: embedding, blocks, readout.

The layers wrap Hugging Face's own modules and call them by keyword, with the causal mask and the
positions computed on the spot from the hidden state's shape, so that one tensor is all that travels
between stages. Where a micro-batch has a mask or positions of its own, layers pass a dict of these
and the hidden state. Every module is taken from a real `PreTrainedModel`: a block built from a bare
config has no attention implementation and silently sees the future.

A family of models is one entry of `families.FAMILIES`. Shapes: B sequences, T tokens, D hidden, V
vocabulary.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.pytorch_utils import Conv1D

from ds_local.config.sections import HeadConfig
from ds_local.model.families import (
    attention_of,
    config_dict,
    family_of,
    num_blocks,
    skeleton,
)
from ds_local.model.heads import (
    HIDDEN,
    AuxiliaryHead,
    State,
    count_targets,
    hidden_of,
    linear_cross_entropy,
)
from ds_local.model.seeds import seeded
from ds_local.model.split_linear import SPLITTABLE, casts, linear


def _materialize(config: PretrainedConfig, name: str, *key: int | str) -> nn.Module:
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


class _Context:
    """What every block of a stage shares besides weights: causal mask and rotary embedding, kept
    per sequence length."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = skeleton(
            config
        ).config  # names the attention implementation, without which there is no mask
        rotary = family_of(config).rotary
        # built anew, not copied: its frequencies are computed, and computed ones are not in the
        # skeleton
        self.rotary = (
            None
            if rotary is None
            else type(skeleton(config).get_submodule(rotary))(config=self.config)
        )
        self._kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        # the newest mask or positions that a micro-batch gave, and what came of them
        self._newest: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def kwargs(self, state: State, attention: str) -> dict[str, Any]:
        """What a block takes besides the hidden state."""
        hidden_BTD = hidden_of(state)
        if isinstance(state, dict):
            return self._of_given(state, hidden_BTD, attention)
        key = (
            attention,
            hidden_BTD.shape[0],
            hidden_BTD.shape[1],
            hidden_BTD.dtype,
            hidden_BTD.device,
        )
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = self._build(hidden_BTD.detach(), attention)
        return self._kept[key]

    def _of_given(self, state: dict[str, Tensor], hidden_BTD: Tensor, attention: str) -> Any:
        """Kept for the next block of the same micro-batch."""
        given = {name: tensor for name, tensor in state.items() if name != HIDDEN}
        known, kwargs = self._newest.get(attention, ({}, {}))
        if known.keys() != given.keys() or any(known[name] is not given[name] for name in given):
            with torch.no_grad():
                kwargs = self._build(hidden_BTD.detach(), attention, **given)
            self._newest[attention] = given, kwargs
        return kwargs

    def _build(
        self,
        hidden_BTD: Tensor,
        attention: str,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        if position_ids is None:
            position_ids = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        make_mask = (
            create_sliding_window_causal_mask
            if attention == "sliding_attention"
            else create_causal_mask
        )
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        kwargs: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        if self.rotary is not None:
            self.rotary.to(hidden_BTD.device)
            kwargs["position_embeddings"] = self.rotary(hidden_BTD, position_ids)
        return kwargs


@functools.lru_cache(maxsize=4)
def _context_of(config_json: str) -> _Context:
    return _Context(AutoConfig.for_model(**json.loads(config_json)))


class Embedding(nn.Module):
    """Token ids [B, T] -> hidden [B, T, D].

    A dict of `input_ids`, and `attention_mask` or `position_ids` or both, becomes the same dict
    with the hidden state in the place of the ids.
    """

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        super().__init__()
        family = family_of(config)
        self.tokens = _materialize(config, family.tokens, seed, "tokens")
        self.positions = None
        if family.positions:
            self.positions = _materialize(config, family.positions, seed, "positions")
        self.dropout = (
            copy.deepcopy(skeleton(config).get_submodule(family.dropout))
            if family.dropout
            else None
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a lookup gains nothing, and compiled for a GPU its gradient would be summed in
        any order."""

    def forward(self, inputs: Tensor | dict[str, Tensor]) -> State:
        beside = dict(inputs) if isinstance(inputs, dict) else {"input_ids": inputs}
        ids_BT = beside.pop("input_ids")
        hidden_BTD = self.tokens(ids_BT)
        if self.positions is not None:
            in_order = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            hidden_BTD = hidden_BTD + self.positions(beside.get("position_ids", in_order))
        if self.dropout is not None:
            hidden_BTD = self.dropout(hidden_BTD)
        return {HIDDEN: hidden_BTD, **beside} if beside else hidden_BTD


class Block(nn.Module):
    """One decoder layer: hidden [B, T, D], alone or in a dict with what `Embedding` passes on, ->
    the same."""

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
        self.attention = attention_of(config, index)
        self.context = _context_of(json.dumps(config_dict(config), sort_keys=True))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the layer; the mask is made once, outside. Blocks of one shape share the
        compiled code."""
        self.block.compile(*args, **kwargs)

    def forward(self, state: State) -> State:
        hidden_BTD = self.block(hidden_of(state), **self.context.kwargs(state, self.attention))
        return {**state, HIDDEN: hidden_BTD} if isinstance(state, dict) else hidden_BTD


class Readout(nn.Module):
    """Final norm and unembedding: hidden [B, T, D] -> logits [B, T, V]."""

    def __init__(self, config: PretrainedConfig, seed: int, kernel: str = "torch") -> None:
        super().__init__()
        family = family_of(config)
        self.kernel = kernel
        self.norm = _materialize(config, family.norm, seed, "norm")
        self.readout = _materialize(config, family.readout, seed, "readout")

    def forward(self, state: State) -> Tensor:
        return self.readout(self.norm(hidden_of(state)))

    def loss(self, state: State, labels_BT: Tensor) -> Tensor:
        """The scalar loss of `heads.lm_loss`; the engine calls this instead of `forward` followed
        by a loss function."""
        hidden_ND = hidden_of(state)[:, :-1].flatten(0, 1)
        targets_N = labels_BT[:, 1:].flatten()
        weight_VD: Tensor = self.readout.weight  # type: ignore[assignment]
        loss = linear_cross_entropy(self.norm(hidden_ND), weight_VD, targets_N, self.kernel)
        return loss / count_targets(labels_BT).clamp(min=1)


def make_head(
    config: PretrainedConfig, segment: int, seed: int, head: HeadConfig, parts: Sequence[int]
) -> AuxiliaryHead:
    """The auxiliary head of a segment: the family's own blocks and norm, and a linear readout.

    Args:
        parts: layer boundaries of the segments; layer 0 is the embedding.
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
    norm = _materialize(
        config, family.norm, seed, "norm" if head.init == "model" else "head norm", segment
    )
    down = None
    if head.readout == "shared" or head.init == "model":
        readout = _materialize(config, family.readout, seed, "readout").requires_grad_(
            head.readout == "private"
        )
    else:
        with seeded(seed, "head readout", segment):
            readout = nn.Linear(head.rank or config.hidden_size, config.vocab_size, bias=False)
            skeleton(config)._init_weights(readout)
            if head.rank:
                down = nn.Linear(config.hidden_size, head.rank, bias=False)
                skeleton(config)._init_weights(down)
    if head.adapter:
        down = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(down.weight)
    return AuxiliaryHead(
        norm, readout, private, down, head.temperature, head.token_fraction, head.kernel
    )


def head_blocks(
    config: PretrainedConfig, segment: int, head: HeadConfig, parts: Sequence[int]
) -> int:
    """Private blocks in the head of `segment`: as many as asked for, and as there are to be copied
    or above it."""
    last = parts[segment + 2] if head.blocks_from == "next_tracked" else parts[-1]
    return head.blocks_of(segment, min(last - 1, num_blocks(config)) - (parts[segment + 1] - 1))


def forward_flops(config: PretrainedConfig, seq_len: int) -> tuple[float, float]:
    """(one block, readout): floating-point operations of a forward pass per token, matrix products
    only."""
    model = skeleton(config)
    block = model.get_submodule(f"{family_of(config).blocks}.0")
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    attention = 4 * seq_len * config.hidden_size  # scores and their product with the values
    return 2.0 * matrices + attention, 2.0 * config.vocab_size * config.hidden_size
