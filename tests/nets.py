"""Nets whose layers pass on all sorts of values, and what training them should do: one process, one
graph over the whole model, without stages, messages or schedules.

A net has eight layers in four segments. Each kind is a function from (layer, what the layer below
passed on) to what the layer passes on; `inputs` of layer 0 is the data.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, PARTS = 6, [0, 2, 4, 6, 8]
LAYERS, SEGMENTS = PARTS[-1], len(PARTS) - 1


class Pair(NamedTuple):
    hidden: Any
    beside: Any


class Layer(nn.Module):
    """Three linear maps, of which a kind uses what it needs."""

    def __init__(self, kind: str, number: int) -> None:
        super().__init__()
        self.kind, self.number = kind, number
        with torch.random.fork_rng():
            torch.manual_seed(100 + number)
            self.main, self.side, self.unread = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if kind == "frozen below" and number < 3:
            self.requires_grad_(False)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def forward(self, inputs: Any) -> Any:
        return KINDS[self.kind][0](self, inputs)


class Head(nn.Module):
    def __init__(self, kind: str, segment: int) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(200 + segment)
            self.readout = nn.Linear(WIDTH, WIDTH)

    def forward(self, outputs: Any, labels: Any) -> torch.Tensor:
        hidden = KINDS[self.kind][1](outputs)
        if self.kind.startswith("in place"):
            F.relu(hidden, inplace=True)
            labels.mul_(0.5)
        return F.mse_loss(self.readout(hidden), labels)


def loss_of(kind: str, outputs: Any, labels: Any) -> torch.Tensor:
    hidden = KINDS[kind][1](outputs)
    return F.mse_loss(hidden.mul_(0.9) if kind.startswith("in place") else hidden, labels)


# --- kinds --------------------------------------------------------------------------------------


def _plain(layer, x):
    return torch.tanh(layer.main(x))


def _without_gradient_first(layer, inputs):
    x0, h = (inputs, inputs) if layer.is_first else inputs
    return x0, torch.tanh(layer.main(h) + x0)


def _with_gradient_first(layer, inputs):
    e, h = (layer.side(inputs), inputs) if layer.is_first else inputs
    return e, torch.tanh(layer.main(h) * e)


def _unread(layer, inputs):
    h = inputs if layer.is_first else inputs[1]
    return layer.unread(h), torch.tanh(layer.main(h)), torch.ones(3)


def _unread_by_the_head(layer, inputs):
    h, aux = (inputs, 0.0) if layer.is_first else inputs
    return torch.tanh(layer.main(h) + aux), layer.side(h)


def _read_now_and_then(layer, inputs):
    """The second value is read by every third layer alone, and may have no gradient."""
    h, aux = (inputs, inputs) if layer.is_first else inputs
    if layer.number % 3 == 2:
        h = h + aux
    return torch.tanh(layer.main(h)), aux if layer.number % 4 else layer.side(h)


def _all_sorts(layer, inputs):
    mask = torch.ones(4, 1, dtype=torch.bool)
    if layer.is_first:
        inputs = None, True, inputs, 3, "word", mask, torch.arange(4), 0.5, inputs, 1 + 2j, ()
    nothing, flag, h, number, word, mask, index, factor, x0, z, empty = inputs
    assert nothing is None
    assert flag is True
    assert word == "word"
    assert empty == ()
    assert type(number) is int
    assert number == 3 + layer.number
    assert type(factor) is float
    assert z == 1 + 2j
    assert index.dtype == torch.int64
    assert mask.dtype == torch.bool
    h = torch.tanh(layer.main(h) * mask * factor + x0[index])
    return None, True, h, number + 1, word, mask, index, factor * 0.99, x0, z, empty


def _dicts(layer, inputs):
    if layer.is_first:
        inputs = {"x0": inputs, "nested": ([inputs, None], {"h": inputs, 7: inputs.shape})}
    (beside, _), inner = inputs["nested"]
    h = torch.tanh(layer.main(inner["h"]) + beside)
    assert type(inner[7]) is torch.Size
    assert inner[7] == h.shape
    nested = [layer.side(h), None], OrderedDict(h=h) | {7: inner[7]}
    assert layer.is_first or isinstance(inner, OrderedDict)
    return {"nested": nested, "x0": inputs["x0"]}


def _named(layer, inputs):
    local = namedtuple("local", "mask word")
    h, beside = (
        (inputs, local(inputs > 0, "w")) if layer.is_first else (inputs.hidden, inputs.beside)
    )
    assert beside.word == "w"
    return Pair(torch.tanh(layer.main(h)) * beside.mask, beside)


def _complex(layer, inputs):
    z = torch.complex(inputs, inputs) if layer.is_first else inputs
    return torch.complex(torch.tanh(layer.main(z.real)), layer.side(z.imag))


def _twice(layer, inputs):
    a, b, part = (inputs, inputs, inputs[:, :2]) if layer.is_first else inputs
    h = torch.tanh(layer.main(a) + b)
    h = h + F.pad(part, (0, WIDTH - 2))
    return h, h, h[:, 1:3]


def _identity(layer, inputs):
    """The third segment hands everything through."""
    return inputs if layer.number in (4, 5) else torch.tanh(layer.main(inputs))


def _in_place_first(layer, x):
    if layer.number % 2 == 0:
        x = F.relu(x, inplace=True)
    return torch.tanh(layer.main(x)) if layer.number in (1, 3, 5) else layer.main(x)


def _in_place_tuple(layer, inputs):
    h, x0 = (inputs, inputs * 0.5) if layer.is_first else inputs
    if layer.number % 2 == 0:
        h.add_(layer.side.bias)
        x0.mul_(1.5)
    return layer.main(h) + x0, x0


def _scalar(layer, inputs):
    """One number that learns, beside the hidden state."""
    h, gain = (inputs, layer.side.bias[0]) if layer.is_first else inputs
    return torch.tanh(layer.main(h) * gain), gain * 1.1


def _column_major(layer, x):
    return torch.tanh(layer.main(x)).t().contiguous().t()


def _same(outputs):
    return outputs


# kind -> (what a layer does, where the hidden state is in what it passes on)
KINDS: dict[str, tuple[Any, Any]] = {
    "one tensor": (_plain, _same),
    "frozen below": (_plain, _same),
    "without gradient first": (_without_gradient_first, lambda o: o[1]),
    "with gradient first": (_with_gradient_first, lambda o: o[1]),
    "unread": (_unread, lambda o: o[1]),
    "unread by the head": (_unread_by_the_head, lambda o: o[0]),
    "read now and then": (_read_now_and_then, lambda o: o[0]),
    "all sorts": (_all_sorts, lambda o: o[2]),
    "dicts": (_dicts, lambda o: o["nested"][1]["h"]),
    "named tuples": (_named, lambda o: o.hidden),
    "complex": (_complex, lambda o: o.real + o.imag),
    "the same twice": (_twice, lambda o: o[0] + o[1]),
    "identity": (_identity, _same),
    "a scalar": (_scalar, lambda o: o[0]),
    "column major": (_column_major, _same),
    "in place first": (_in_place_first, _same),
    "in place, in a tuple": (_in_place_tuple, lambda o: o[0]),
}


def data(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step * 100 + micro_batch)
    x = torch.randn(4, WIDTH, generator=generator)
    return x, torch.sin(x.flip(1))


TOGETHER = "all together"  # in one net, in a dict
ALONE = ["one tensor", "without gradient first", "complex", "in place first"]


class LayersTogether(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(kind, number) for kind in KINDS])

    def forward(self, inputs: Any) -> Any:
        first = not isinstance(inputs, dict)
        return {
            layer.kind: layer(inputs.clone() if first else inputs[layer.kind])
            for layer in self.layers
        }


class HeadsTogether(nn.Module):
    def __init__(self, segment: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(kind, segment) for kind in KINDS])

    def forward(self, outputs: Any, labels: Any) -> torch.Tensor:
        return sum(head(outputs[head.kind], labels.clone()) for head in self.heads)


def make_layer(kind: str, number: int) -> nn.Module:
    return LayersTogether(number) if kind == TOGETHER else Layer(kind, number)


def make_head(kind: str, segment: int) -> nn.Module:
    return HeadsTogether(segment) if kind == TOGETHER else Head(kind, segment)


def make_loss(kind: str) -> Any:
    if kind == TOGETHER:
        return lambda outputs, labels: sum(loss_of(k, outputs[k], labels) for k in KINDS)
    return functools.partial(loss_of, kind)


def copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, copy(part)) for key, part in value.items())
    if isinstance(value, tuple | list):
        parts = map(copy, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# --- the reference ------------------------------------------------------------------------------


class Net:
    """All layers and heads of a kind in one process."""

    def __init__(self, kind: str, optimizer: Any) -> None:
        self.kind = kind
        self.layers = [make_layer(kind, number) for number in range(LAYERS)]
        self.heads = [make_head(kind, segment) for segment in range(SEGMENTS - 1)]
        self.optimizer = optimizer([p for m in [*self.layers, *self.heads] for p in m.parameters()])

    def losses(self, x: Any, y: Any) -> list[torch.Tensor]:
        """Nobody sees what somebody else does in place: segments and heads get copies."""
        state, losses = x, []
        for segment in range(SEGMENTS):
            state = copy(state)
            for layer in self.layers[PARTS[segment] : PARTS[segment + 1]]:
                state = layer(state)
            last = segment == SEGMENTS - 1
            losses.append(
                (make_loss(self.kind) if last else self.heads[segment])(copy(state), copy(y))
            )
        return losses

    def step(self, micro_batches: list[Any], tables: list[dict[int, dict[int, float]]]) -> None:
        """One optimizer step; a parameter that no loss reaches has no gradient."""
        gradients: dict[Any, torch.Tensor] = {}
        for (x, y), table in zip(micro_batches, tables, strict=True):
            losses = self.losses(x, y)
            for loss, row in table.items():
                parts = [
                    (self.layers[PARTS[s] : PARTS[s + 1]], weight) for s, weight in row.items()
                ]
                for modules, weight in [(self.heads[loss : loss + 1], 1.0), *parts]:
                    self._add(losses[loss], modules, weight / len(tables), gradients)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def _add(loss, modules, weight, gradients) -> None:
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        if not parameters or not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[parameter] = gradients.get(parameter, 0.0) + gradient * weight

    def state(self) -> dict[str, torch.Tensor]:
        layers = {f"{i}.{n}": p for i, m in enumerate(self.layers) for n, p in m.named_parameters()}
        heads = {
            f"heads.{i}.{n}": p for i, m in enumerate(self.heads) for n, p in m.named_parameters()
        }
        return {name: p.detach().clone() for name, p in (layers | heads).items()}
