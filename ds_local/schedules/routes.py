"""Which loss trains which segment: every depth-wise scheme as one table.

A model of K segments (in depth order) has up to K losses: loss l is computed from the output of
segment l, by an auxiliary head, or by the model's own readout for l = K - 1. A scheme is a table
`weights[l][s]`: how much the gradient of loss l counts in the update of segment s. From the table
follow the heads to build, the gradient messages between segments and the autograd passes each
segment runs; `list_scheduler.py` orders them, `executor.py` executes them.

The modes, with their sources:
    backprop           loss K-1 trains everything (the reference)
    local              every loss trains its own segment (greedy; Laskin et al. 2020, arXiv
                       2012.03837)
    chunked            full backpropagation inside a chunk of `window` segments, one loss at its top
                       (same paper)
    shifted_chunked    chunked, and the boundaries move by one segment every optimizer step
    overlapping        loss l trains the `window` segments up to l, so a segment hears several
                       losses (same paper)
    interlocking       segment s is trained by loss min(s + window - 1, K - 1) and by nothing else
                       (Gomez et al. 2022, JMLR 23)
    deep_supervision   every loss trains every segment below it, with weights

Pure Python: no torch, no DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from ds_local.config.scheme import DEFAULT_WINDOW, WINDOWED
from ds_local.errors import RouteError

Weights = dict[int, dict[int, float]]  # loss -> segment -> weight; absent means 0


class Pass(NamedTuple):
    """One autograd pass of one segment over one micro-batch.

    The gradient at the segment's output is the sum of `coefficient * gradient of loss` over
    `reads`; a loss with the segment's own number comes from its head, any other from the segment
    above.
    """

    reads: tuple[tuple[int, float], ...]  # (loss, coefficient)
    weights: bool  # parameter gradients wanted? Without them the pass costs one input gradient only
    sends: (
        int | None
    )  # the loss that the message to the segment below is named after; None: no message
    send_scale: float = 1.0


class _Source(NamedTuple):
    """A gradient that reaches a segment: its own loss, or a message from above that may carry
    several losses."""

    loss: int  # the nearest loss in it; messages are named after it
    furthest: int


@dataclass(frozen=True)
class Routes:
    """The table of one scheme, and all that follows from it. Build it with `make_routes`."""

    mode: str
    num_segments: int
    weights: Weights
    loss_weights: dict[int, float]  # factor on each loss before its gradient is taken

    @property
    def losses(self) -> tuple[int, ...]:
        """Segments that compute a loss; the others need neither head nor labels."""
        return tuple(sorted(self.weights))

    def scaled_auxiliary(self, factor: float) -> Routes:
        """The table with every loss but the model's own times `factor`; 0 leaves them out."""
        kept = {
            loss: row
            for loss, row in self.weights.items()
            if factor or loss == self.num_segments - 1
        }
        factors = {
            loss: self.loss_weights[loss] * (1.0 if loss == self.num_segments - 1 else factor)
            for loss in kept
        }
        return Routes(
            self.mode if factor else f"{self.mode} without auxiliary losses",
            self.num_segments,
            kept,
            factors,
        )

    @cached_property
    def passes(self) -> tuple[tuple[Pass, ...], ...]:
        """For each segment its passes over one micro-batch, those that send first."""
        return tuple(passes for passes, _ in self._derived)

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """For each segment how many segments up its furthest gradient comes from (0: from its own
        loss alone)."""
        return tuple(furthest - segment for segment, (_, furthest) in enumerate(self._derived))

    def messages(self, segment: int) -> tuple[int, ...]:
        """The losses whose gradient messages leave `segment` downwards, one message each per
        micro-batch."""
        return tuple(p.sends for p in self.passes[segment] if p.sends is not None)

    @cached_property
    def _derived(self) -> list[tuple[tuple[Pass, ...], int]]:
        """(passes, furthest loss that reaches the segment) for each segment, worked out from the
        top down."""
        derived: list[tuple[tuple[Pass, ...], int]] = []
        from_above: list[_Source] = []
        for segment in reversed(range(self.num_segments)):
            own = [_Source(segment, segment)] if segment in self.weights else []
            sources = own + from_above
            passes, from_above = self._passes_of(segment, sources)
            derived.append((passes, max((s.furthest for s in sources), default=segment)))
        return derived[::-1]

    def _passes_of(
        self, segment: int, sources: list[_Source]
    ) -> tuple[tuple[Pass, ...], list[_Source]]:
        """The passes of one segment over the gradients that reach it, and what it sends on.

        Gradients that train this segment and go on below in the same proportions share one full
        pass. Otherwise each gradient that goes on is passed on by itself as soon as it is there,
        and the weights get one pass over the sum.
        """
        training = [s for s in sources if segment in self.weights[s.loss]]
        going_on = [s for s in sources if any(below < segment for below in self.weights[s.loss])]
        reads = tuple((s.loss, self.weights[s.loss][segment]) for s in training)
        if training and self._same_proportions(training, segment):
            joint = _Source(training[0].loss, max(s.furthest for s in training))
            sends = joint.loss if training[0] in going_on else None
            merged = (
                [Pass(reads, True, sends, 1.0 / reads[0][1])]
                if sends is not None
                else [Pass(reads, True, None)]
            )
            alone = [s for s in going_on if s not in training]
            sent = alone + ([joint] if sends is not None else [])
        else:
            merged = [Pass(reads, True, None)] if training else []
            alone = sent = going_on
        return tuple([Pass(((s.loss, 1.0),), False, s.loss) for s in alone] + merged), sent

    def _same_proportions(self, sources: Sequence[_Source], segment: int) -> bool:
        """Do all `sources` count in equal proportions for this segment and for every one below?"""
        first, *others = (self.weights[s.loss] for s in sources)
        for other in others:
            ratio = other[segment] / first[segment]
            below = {s for s in first.keys() | other.keys() if s <= segment}
            if not all(math.isclose(other.get(s, 0.0), ratio * first.get(s, 0.0)) for s in below):
                return False
        return True

    def __str__(self) -> str:
        lines = [
            f"{self.mode}, {self.num_segments} segments",
            "segment   " + " ".join(f"{s:>4}" for s in range(self.num_segments)),
        ]
        for loss in self.losses:
            row = self.weights[loss]
            cells = [
                f"{row[s] * self.loss_weights[loss]:>4.3g}" if s in row else "   ."
                for s in range(self.num_segments)
            ]
            lines.append(f"loss {loss:<4} " + " ".join(cells))
        return "\n".join(lines)


def _backprop(num_segments: int, window: int, combine: str) -> Weights:
    return {num_segments - 1: dict.fromkeys(range(num_segments), 1.0)}


def _chunks(num_segments: int, boundaries: Sequence[int]) -> Weights:
    """Full backpropagation between neighbouring boundaries."""
    return {
        stop - 1: dict.fromkeys(range(start, stop), 1.0) for start, stop in pairwise(boundaries)
    }


def _chunked(num_segments: int, window: int, combine: str, shift: int = 0) -> Weights:
    boundaries = sorted({0, *range(shift, num_segments, window), num_segments})
    return _chunks(num_segments, boundaries)


def _overlapping(num_segments: int, window: int, combine: str) -> Weights:
    table: Weights = {loss: {} for loss in range(num_segments)}
    for segment in range(num_segments):
        losses = range(segment, min(segment + window, num_segments))
        for loss in losses:
            table[loss][segment] = 1.0 if combine == "sum" else 1.0 / len(losses)
    return table


def _interlocking(num_segments: int, window: int, combine: str) -> Weights:
    table: Weights = {}
    for segment in range(num_segments):
        table.setdefault(min(segment + window - 1, num_segments - 1), {})[segment] = 1.0
    return table


def _deep_supervision(num_segments: int, window: int, combine: str) -> Weights:
    return {loss: dict.fromkeys(range(loss + 1), 1.0) for loss in range(num_segments)}


_TABLES: dict[str, Callable[..., Weights]] = {
    "backprop": _backprop,
    "local": lambda num_segments, window, combine: _chunked(num_segments, 1, combine),
    "chunked": _chunked,
    "shifted_chunked": _chunked,
    "overlapping": _overlapping,
    "interlocking": _interlocking,
    "deep_supervision": _deep_supervision,
}
MODES = tuple(_TABLES)


def make_routes(
    mode: str,
    num_segments: int,
    window: int | None = None,
    combine: str = "sum",
    weights: Sequence[float] | None = None,
    step: int = 0,
) -> Routes:
    """The table of `mode` for `num_segments` segments.

    Args:
        window: segments in a chunk (chunked, shifted_chunked), losses a segment hears (overlapping,
            k) or the distance of the loss plus one (interlocking, N); 1 to `num_segments`. Default
            2, at most `num_segments`.
        combine: "sum" or "mean" of the losses a segment hears (overlapping).
        weights: one factor per loss (deep_supervision), default all 1; a loss with weight 0 is not
            computed.
        step: optimizer step, counted from 0; only shifted_chunked depends on it.

    Raises:
        RouteError: when the combination makes no sense, with the remedy.
    """
    if num_segments < 1:
        raise RouteError(f"a model needs at least 1 segment, got {num_segments}")
    if mode not in _TABLES:
        raise RouteError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    takes_window = mode in WINDOWED
    if not takes_window and window is not None:
        raise RouteError(f"mode {mode!r} takes no window, got window = {window}; leave it out")
    if combine not in ("sum", "mean") or (combine == "mean" and mode != "overlapping"):
        raise RouteError(
            f'combine is "sum" or, for mode "overlapping", "mean"; got {combine!r} with mode '
            f"{mode!r}"
        )
    if weights is not None and mode != "deep_supervision":
        raise RouteError(
            f'weights belong to mode "deep_supervision", got them with mode {mode!r}; leave them '
            f"out"
        )
    if window is None:
        window = min(DEFAULT_WINDOW, num_segments)
    if not 1 <= window <= num_segments:
        raise RouteError(
            f"window is {window} but the model has {num_segments} segments; choose 1 to "
            f"{num_segments}"
        )

    shift = {"shift": step % window} if mode == "shifted_chunked" else {}
    table = _TABLES[mode](num_segments, window, combine, **shift)
    factors = _loss_weights(weights, num_segments)
    table = {loss: row for loss, row in table.items() if factors[loss] != 0.0}
    name = f"{mode}({window}{', mean' if combine == 'mean' else ''})" if takes_window else mode
    return Routes(name, num_segments, table, {loss: factors[loss] for loss in table})


def corrected(few: Routes, rest: Routes, ratio: float, strength: float) -> Routes:
    """The table of a few micro-batches of a step that make up for what the rest of them learn from:
    a control variate.

    The gradient of the few counts `1 + e` times, and what the table of the rest gives on the same
    micro-batches is taken off `e` times, with e = strength * (ratio - 1). At strength 1 the
    gradient of a step is then, in the mean, that of the few alone, and the rest only take noise out
    of it, as far as the two kinds of gradient agree from micro-batch to micro-batch (unbiased
    truncation, as Tallec & Ollivier 2017, arXiv 1705.08209, do it over time by other means).

    Args:
        ratio: all micro-batches of a step / the few.
        strength: 0 (the table of the few as it is) to 1.

    Raises:
        RouteError: when a loss carries a weight of its own, which could not be taken off.
    """
    if any(factor != 1.0 for routes in (few, rest) for factor in routes.loss_weights.values()):
        raise RouteError(
            "correction works between rows whose losses all count 1; leave weights out of the mix"
        )
    extra = strength * (ratio - 1)
    table: Weights = {}
    for loss in sorted(few.weights | rest.weights):
        ours, theirs = few.weights.get(loss, {}), rest.weights.get(loss, {})
        row = {
            s: ours.get(s, 0.0) + extra * (ours.get(s, 0.0) - theirs.get(s, 0.0))
            for s in sorted(ours | theirs)
        }
        table[loss] = {s: weight for s, weight in row.items() if weight}
    table = {loss: row for loss, row in table.items() if row}
    return Routes(f"{few.mode}, corrected", few.num_segments, table, dict.fromkeys(table, 1.0))


def _loss_weights(weights: Sequence[float] | None, num_segments: int) -> list[float]:
    if weights is None:
        return [1.0] * num_segments
    factors = [float(w) for w in weights]
    if len(factors) != num_segments:
        raise RouteError(
            f"weights has {len(factors)} entries but the model has {num_segments} segments; give "
            "one per segment"
        )
    if any(not math.isfinite(w) or w < 0 for w in factors) or factors[-1] == 0:
        raise RouteError(
            f"weights are {factors}; they must be finite and >= 0, and the last one > 0 or the "
            "readout never learns"
        )
    return factors
