"""Weights that a stage uses, or trains, and does not hold alone.

A function among the layers, or the loss, may use weights from around it: nothing would train or
save them here. A head may be made of a layer that another stage holds: each stage would train a
copy of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ds_local.errors import ConfigError
from ds_local.links.trees import Tree


class ForeignWeights:
    """Looks once at the graph of each segment's layers, and of its loss.

    Args:
        module: of this stage.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: set[tuple[str, int]] = set()

    def look(self, what: str, segment: int, outputs: Any) -> None:
        """Raises ConfigError when a backward pass from `outputs` would end in weights that the
        stage does not hold.

        Args:
            what: computed the outputs, for the sentence.
        """
        if (what, segment) in self._seen:
            return
        learning = [slot for slot in Tree.of(outputs, strict=False).slots if slot.requires_grad]
        if not learning:
            return
        self._seen.add((what, segment))
        own = {id(parameter) for parameter in self._module.parameters()}
        foreign = [leaf for leaf in _leaves(learning) if id(leaf) not in own]
        if foreign:
            shapes = ", ".join(str(list(weights.shape)) for weights in foreign[:3])
            raise ConfigError(
                f"in {what} of segment {segment} are weights of shape {shapes} that no layer of "
                "its stage holds, so nothing would train or save them; use an nn.Module that holds "
                "weights of its own, as a layer there"
            )


def _leaves(tensors: Sequence[Tensor]) -> Iterator[nn.Parameter]:
    """The parameters that a backward pass ends in."""
    found = {id(t.grad_fn): t.grad_fn for t in tensors if t.grad_fn is not None}
    nodes: list[Any] = list(found.values())
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            yield leaf
        for below, _ in node.next_functions:
            if below is not None and id(below) not in found:
                found[id(below)] = below
                nodes.append(below)


def check_untied(
    layers: Sequence[Any], own: Mapping[int, Any], heads: Mapping[str, nn.Module]
) -> None:
    """No layer or head of this stage has weights of a layer of another one.

    Args:
        layers: of the whole model.
        own: layers of this stage as they are built, by number.
        heads: of this stage, by segment.

    Raises:
        ConfigError: naming both.
    """
    elsewhere = {
        id(parameter): number
        for number, layer in enumerate(layers)
        if isinstance(layer, nn.Module) and number not in own
        for parameter in layer.parameters()
    }
    named = {f"layer {number}": layer for number, layer in own.items()}
    named |= {f"the head of segment {segment}": head for segment, head in heads.items()}
    for name, one in named.items():
        for parameter in one.parameters() if isinstance(one, nn.Module) else ():
            if id(parameter) in elsewhere:
                raise ConfigError(
                    f"{name} shares weights with layer {elsewhere[id(parameter)]}, which another "
                    "stage holds: each stage would train a copy of its own; give it weights of its "
                    "own, such as a copy.deepcopy"
                )
