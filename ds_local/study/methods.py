"""Methods of the quality study: a scheme, the scheme of its end, heads and a learning rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

LOCAL, BACKPROP = {"mode": "local"}, {"mode": "backprop"}
CHUNKED = {"mode": "chunked", "window": 2}
COSINE, WSD = "cosine", "WSD"  # warm-up, stable, decay: a line to nothing over the last part
DECAY = 0.2  # of the steps of a WSD run


class Method(NamedTuple):
    """A scheme, the share of the steps at the end that follow another one, and the options of the
    heads."""

    scheme: dict[str, Any]
    tail: float = 0.0
    head: Mapping[str, Any] = MappingProxyType({})
    micro_batches: int | None = None
    end: dict[str, Any] = BACKPROP  # the scheme of the tail
    schedule: str = COSINE  # of the learning rate
    # what the segments above the first chunk begin the tail with, instead of what they have learnt
    renew: str = ""


def mixed(share: float, rest: dict[str, Any] = LOCAL, correction: float = 0.0) -> dict[str, Any]:
    """A share of each step's micro-batches runs backpropagation; `section_of` fills in how many
    these are."""
    return {"mix": [{"mode": "backprop", "share": share}, rest], "correction": correction}


EIGHTH = {"token_fraction": 0.125}
QUARTER = {"token_fraction": 0.25}
SHARED = {"readout": "shared", "temperature": True}
METHODS = {
    "backprop": Method(BACKPROP),
    "local": Method(LOCAL),
    "local, shared readout": Method(LOCAL, 0.0, SHARED),
    "local, one private block": Method(LOCAL, 0.0, {"blocks": 1}),
    "local, one tracked block": Method(LOCAL, 0.0, {"blocks": 1, "blocks_from": "next_tracked"}),
    "local, 1/8 of the tokens": Method(LOCAL, 0.0, EIGHTH),
    "local, rank 16": Method(LOCAL, 0.0, {"rank": 16}),
    "overlapping 2": Method({"mode": "overlapping", "window": 2}),
    "interlocking 2": Method({"mode": "interlocking", "window": 2}),
    "interlocking 3": Method({"mode": "interlocking", "window": 3}),
    "chunked 2": Method(CHUNKED),
    "chunked 2, backprop tail 20 %": Method(CHUNKED, 0.2),
    "chunked 2, backprop tail 40 %": Method(CHUNKED, 0.4),
    "chunked 2, one private block": Method(CHUNKED, 0.0, {"blocks": 1}),
    "chunked 2, half corrected": Method(mixed(1 / 2, CHUNKED, 1.0)),
    "chunked 2, last 40 % half corrected": Method(CHUNKED, 0.4, end=mixed(1 / 2, CHUNKED, 1.0)),
    "chunked 2, last 70 % half corrected": Method(CHUNKED, 0.7, end=mixed(1 / 2, CHUNKED, 1.0)),
    "shifted chunks 2": Method({"mode": "shifted_chunked", "window": 2}),
    "chunked 2, a quarter backprop": Method(mixed(1 / 4, CHUNKED)),
    "chunked 2, a quarter backprop, tail 20 %": Method(mixed(1 / 4, CHUNKED), 0.2),
    "chunked 2, a quarter backprop, tail 40 %": Method(mixed(1 / 4, CHUNKED), 0.4),
    "local, backprop tail 5 %": Method(LOCAL, 0.05),
    "local, backprop tail 10 %": Method(LOCAL, 0.1),
    "local, backprop tail 20 %": Method(LOCAL, 0.2),
    "local, backprop tail 40 %": Method(LOCAL, 0.4),
    "local, one backprop step in 8": Method(
        {"phases": [{**LOCAL, "until_step": 7}, BACKPROP], "cycle_steps": 8}
    ),
    "mixed 1/8": Method(mixed(1 / 8), 0.0, {}, 8),
    "mixed 1/4": Method(mixed(1 / 4)),
    "mixed 1/2": Method(mixed(1 / 2)),
    "mixed 1/8, tail 20 %": Method(mixed(1 / 8), 0.2, {}, 8),
    "mixed 1/4, tail 10 %": Method(mixed(1 / 4), 0.1),
    "mixed 1/4, tail 20 %": Method(mixed(1 / 4), 0.2),
    "mixed 1/4, last 40 % half corrected": Method(mixed(1 / 4), 0.4, end=mixed(1 / 2, LOCAL, 1.0)),
    "mixed 1/4, tail 40 %": Method(mixed(1 / 4), 0.4),
    "mixed 1/2, tail 10 %": Method(mixed(1 / 2), 0.1),
    "mixed 1/2, tail 20 %": Method(mixed(1 / 2), 0.2),
    "mixed 1/4, tail 20 %, 1/8 of the tokens": Method(mixed(1 / 4), 0.2, EIGHTH),
    "mixed 1/4, tail 20 %, 1/16 of the tokens": Method(
        mixed(1 / 4), 0.2, {"token_fraction": 0.0625}
    ),
    "mixed 1/4, tail 20 %, one private block": Method(mixed(1 / 4), 0.2, {"blocks": 1}),
    "mixed 1/4, tail 20 %, shared readout": Method(mixed(1 / 4), 0.2, SHARED),
    "mixed 1/4, tail 20 %, block, 1/8 of the tokens": Method(
        mixed(1 / 4), 0.2, {"blocks": 1, **EIGHTH}
    ),
}
YARDSTICKS = {COSINE: "backprop", WSD: "backprop, WSD"}  # what a row's gap is to
METHODS |= {
    "backprop, WSD": Method(BACKPROP, schedule=WSD),
    "chunked 2, WSD": Method(CHUNKED, schedule=WSD),
    "chunked 2, backprop tail 40 %, WSD": Method(CHUNKED, 0.4, schedule=WSD),
    "first chunk alone, rest fresh, backprop tail 40 %, WSD": Method(
        CHUNKED, 0.4, schedule=WSD, renew="fresh"
    ),
    "first chunk alone, rest copied, backprop tail 40 %, WSD": Method(
        CHUNKED, 0.4, schedule=WSD, renew="copied"
    ),
    "local, WSD": Method(LOCAL, schedule=WSD),
    "local, backprop tail 40 %, WSD": Method(LOCAL, 0.4, schedule=WSD),
    "chunked 2, shared readout": Method(CHUNKED, 0.0, SHARED),
    "chunked 2, shared readout, tail 40 %": Method(CHUNKED, 0.4, SHARED),
    "chunked 2, 1/4 of the tokens": Method(CHUNKED, 0.0, QUARTER),
    "chunked 2, rank 16": Method(CHUNKED, 0.0, {"rank": 16}),
}
AHEAD = {"mode": "backprop", "run_ahead": "auto"}
PREDICTED = AHEAD | {"predict_weights": True}
METHODS |= {
    "run ahead": Method(AHEAD),
    "run ahead, predicted": Method(PREDICTED),
    "run ahead, rates discounted": Method(AHEAD | {"delay_discount": 0.5}),
    "run ahead, backprop tail 20 %": Method(AHEAD, 0.2),
    "run ahead, predicted, backprop tail 20 %": Method(PREDICTED, 0.2),
    "run ahead, at most one": Method(AHEAD | {"run_ahead": 1}),
}
for _count in (1, 2, 8, 16):  # micro-batches a step: the delay is a segment's lead divided by it
    METHODS |= {
        f"run ahead, {_count} micro-batches": Method(AHEAD, 0.0, {}, _count),
        f"run ahead, predicted, {_count} micro-batches": Method(PREDICTED, 0.0, {}, _count),
    }
TAILS = sorted({method.tail for method in METHODS.values() if method.tail})


def switch_step(steps: int, tail: float) -> int:
    """The step at which a tail of so large a share begins."""
    return round(steps * (1 - tail))


def section_of(
    method: Method, num_segments: int, num_micro_batches: int, steps: int
) -> dict[str, Any]:
    """The "local_parallel" section of a method, for one process that holds all segments."""
    scheme, end = json.loads(json.dumps([method.scheme, method.end]))
    for entry in [*scheme.get("mix", ()), *end.get("mix", ())]:
        if "share" in entry:
            entry["micro_batches"] = max(1, round(entry.pop("share") * num_micro_batches))
    if method.tail:
        scheme = {"phases": [{**scheme, "until_step": switch_step(steps, method.tail)}, end]}
    return {
        **scheme,
        "num_stages": 1,
        "segments_per_stage": num_segments,
        "head": dict(method.head),
    }
