"""The loss that keeps experts in use: what a mixture of experts adds to the loss of its tokens.

It is the library's own function, over the routers of the layers that learn from one loss.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from ds_local.errors import UnsupportedModel
from ds_local.model.anatomy import config_json, config_of, family_of, skeleton
from ds_local.model.state import HIDDEN, State
from ds_local.schedules.routes import Pass, Routes

_LOGITS = "router_logits"  # the library's name; in a state the block's number follows
_COUNTS = ("num_experts", "num_experts_per_tok")  # attributes of its causal LMs
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class Routers:
    """The routers in a model's blocks.

    Args:
        places: their classes, and the place of the logits among what one returns.
        function: the library's router loss.
        num_experts, top_k: what it is computed with.
        coefficient: of the router loss in the loss.
    """

    places: Mapping[type[nn.Module], int]
    function: Callable[..., Any]
    num_experts: int
    top_k: int
    coefficient: float

    def loss(self, logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The router loss (scalar) of some layers, before its coefficient.

        Args:
            logits: of each router, [B * T, experts].
            mask: [B, T], of the tokens that count.
        """
        flat = tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in logits)
        counts = mask if mask is not None and mask.dim() == 2 else None
        loss: Tensor = self.function(flat, self.num_experts, self.top_k, counts)
        return loss


def routers_of(config: PretrainedConfig) -> Routers | None:
    """None for a model without a router loss: one without experts, or whose experts the library
    balances otherwise.

    Raises:
        UnsupportedModel: when it has one that cannot be computed for some of its layers.
    """
    return _routers_of(config_json(config))


@functools.lru_cache(maxsize=16)
def _routers_of(text: str) -> Routers | None:
    config = config_of(text)
    model = skeleton(config)
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    # what the library's `output_router_logits` gives; it has no public name
    recorders = (getattr(model, "_can_record_outputs", None) or {}).get(_LOGITS) or []
    recorders = recorders if isinstance(recorders, list) else [recorders]
    kinds: Any = {getattr(r, "target_class", r): getattr(r, "index", 0) for r in recorders}
    blocks = model.get_submodule(family_of(config).blocks)
    if function is None or not any(type(module) in kinds for module in blocks.modules()):
        return None
    coefficients = [getattr(model, name) for name in _COEFFICIENTS if hasattr(model, name)]
    num_experts, top_k = (getattr(model, name, None) for name in _COUNTS)
    if list(inspect.signature(function).parameters) != _ARGUMENTS or not (
        coefficients and isinstance(num_experts, int) and isinstance(top_k, int)
    ):
        raise UnsupportedModel("its router loss is computed in a way that is not known here")
    return Routers(kinds, function, num_experts, top_k, coefficients[0])


class Heard(list[Tensor]):
    """Logits of the routers in a block, while it runs; a hook."""

    routers: Routers

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        place = self.routers.places[type(module)]
        self.append(output[place] if isinstance(output, tuple) else output)


def listen(block: nn.Module, routers: Routers | None) -> Heard:
    """What gets the logits of the block's routers whenever it runs."""
    heard = Heard()
    if routers is not None:
        heard.routers = routers
        for module in block.modules():
            if type(module) in routers.places:
                module.register_forward_hook(heard)
    return heard


def with_logits(state: State, index: int, heard: Heard) -> State:
    """The state, and what was heard in block `index`."""
    if not heard:
        return state
    named = {f"{_LOGITS}.{index}.{n}": logits for n, logits in enumerate(heard)}
    return (state if isinstance(state, dict) else {HIDDEN: state}) | named


def without_logits(state: Any, routers: Routers | None) -> tuple[Any, Tensor | None]:
    """(what travels, the router loss of the blocks that made this state)."""
    if routers is None or not isinstance(state, dict):
        return state, None
    logits = [value for name, value in state.items() if name.startswith(_LOGITS)]
    rest = {name: value for name, value in state.items() if not name.startswith(_LOGITS)}
    loss = routers.loss(logits, rest.get("attention_mask")) if logits else None
    return rest[HIDDEN] if rest.keys() == {HIDDEN} else rest, loss


def share_of(routes: Routes, segment: int, which: int, parts: Sequence[int]) -> float:
    """How much a segment's router loss counts in one of its passes. Each loss has one router loss,
    dealt out among the blocks that it trains: so a segment that learns from one loss of its own has
    its router loss whole, and a model that learns from one loss has one router loss. A pass counts
    the losses that its gradient is made of; what it sends on trains the segments below.

    Args:
        which: number of the pass.
        parts: layer boundaries of the segments, with the embedding and the readout.
    """
    ends = (0, len(parts) - 2)
    sizes = [parts[s + 1] - parts[s] - ends.count(s) for s in range(len(parts) - 1)]
    return sum(
        factor
        * routes.loss_weights[loss]
        * sizes[segment]
        / sum(sizes[trained] for trained in routes.weights[loss])
        for loss, factor in _made_of(routes, segment, routes.passes[segment][which]).items()
        if segment in routes.weights[loss]
    )


def _made_of(routes: Routes, segment: int, one: Pass) -> dict[int, float]:
    """The losses, and how often each counts, in the gradient that a pass reads. A message may carry
    several under the name of the nearest."""
    found: dict[int, float] = {}
    for name, factor in one.reads:
        carried = {name: 1.0}
        if name != segment:
            above = next(p for p in routes.passes[segment + 1] if p.sends == name)
            inner = _made_of(routes, segment + 1, above)
            carried = {loss: number * above.send_scale for loss, number in inner.items()}
        for loss, number in carried.items():
            found[loss] = found.get(loss, 0.0) + factor * number
    return found
