"""Methods of the quality study: a scheme, the scheme of its end, heads and a learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ds_local.config.catalog import BACKPROP, SCHEMES, dropped_losses, head_of
from ds_local.config.catalog import section_of as scheme_of

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
    # the share of the steps in which auxiliary losses are dropped one by one, the lowest first
    dropped_by: float = 0.0

    @property
    def has_exits(self) -> bool:
        """Do auxiliary heads learn to the end, and the whole vocabulary?"""
        partial = "vocabulary" in self.head and "rare_samples" not in self.head
        return not (self.tail or self.dropped_by or partial)


def of(scheme: str, tail: float = 0.0, **more: Any) -> Method:
    """With a scheme by its name in the table of schemes, and its end too."""
    if "end" in more:
        more["end"] = SCHEMES[more["end"]].section
    return Method(SCHEMES[scheme].section, tail, **more)


EIGHTH = {"token_fraction": 0.125}
QUARTER = {"token_fraction": 0.25}
SHARED = {"readout": "shared", "temperature": True}
METHODS = {
    "backprop": of("backprop"),
    "local": of("local"),
    "local, shared readout": of("local", head=SHARED),
    "local, shared readout, adapter": of("local", head={**SHARED, "adapter": True}),
    "local, one private block": of("local", head={"blocks": 1}),
    "local, one tracked block": of("local", head={"blocks": 1, "blocks_from": "next_tracked"}),
    "local, 1/8 of the tokens": of("local", head=EIGHTH),
    "local, rank 16": of("local", head={"rank": 16}),
    "overlapping 2": of("overlapping 2"),
    "interlocking 2": of("interlocking 2"),
    "interlocking 3": of("interlocking 3"),
    "chunked 2": of("chunked 2"),
    "chunked 2, backprop tail 20 %": of("chunked 2", 0.2),
    "chunked 2, backprop tail 40 %": of("chunked 2", 0.4),
    "chunked 2, one private block": of("chunked 2", head={"blocks": 1}),
    "chunked 2, half corrected": of("chunked 2, half corrected"),
    "chunked 2, last 40 % half corrected": of("chunked 2", 0.4, end="chunked 2, half corrected"),
    "chunked 2, last 70 % half corrected": of("chunked 2", 0.7, end="chunked 2, half corrected"),
    "shifted chunks 2": of("shifted chunks 2"),
    "chunked 2, a quarter backprop": of("chunked 2, a quarter backprop"),
    "chunked 2, a quarter backprop, tail 20 %": of("chunked 2, a quarter backprop", 0.2),
    "chunked 2, a quarter backprop, tail 40 %": of("chunked 2, a quarter backprop", 0.4),
    "local, backprop tail 5 %": of("local", 0.05),
    "local, backprop tail 10 %": of("local", 0.1),
    "local, backprop tail 20 %": of("local", 0.2),
    "local, backprop tail 40 %": of("local", 0.4),
    "local, one backprop step in 8": of("local, one backprop step in 8"),
    "mixed 1/8": of("mixed 1/8", micro_batches=8),
    "mixed 1/4": of("mixed 1/4"),
    "mixed 1/2": of("mixed 1/2"),
    "mixed 1/8, tail 20 %": of("mixed 1/8", 0.2, micro_batches=8),
    "mixed 1/4, tail 10 %": of("mixed 1/4", 0.1),
    "mixed 1/4, tail 20 %": of("mixed 1/4", 0.2),
    "mixed 1/4, last 40 % half corrected": of("mixed 1/4", 0.4, end="mixed 1/2, corrected"),
    "mixed 1/4, tail 40 %": of("mixed 1/4", 0.4),
    "mixed 1/2, tail 10 %": of("mixed 1/2", 0.1),
    "mixed 1/2, tail 20 %": of("mixed 1/2", 0.2),
    "mixed 1/4, tail 20 %, 1/8 of the tokens": of("mixed 1/4", 0.2, head=EIGHTH),
    "mixed 1/4, tail 20 %, 1/16 of the tokens": of(
        "mixed 1/4", 0.2, head={"token_fraction": 0.0625}
    ),
    "mixed 1/4, tail 20 %, one private block": of("mixed 1/4", 0.2, head={"blocks": 1}),
    "mixed 1/4, tail 20 %, shared readout": of("mixed 1/4", 0.2, head=SHARED),
    "mixed 1/4, tail 20 %, block, 1/8 of the tokens": of(
        "mixed 1/4", 0.2, head={"blocks": 1, **EIGHTH}
    ),
}
METHODS |= {"backprop, WSD": of("backprop", schedule=WSD)} | {
    f"{scheme}{tail}, WSD": of(scheme, share, schedule=WSD)
    for scheme in ("local", "chunked 2")
    for share, tail in (
        (0.0, ""),
        (0.1, ", backprop tail 10 %"),
        (0.2, ", backprop tail 20 %"),
        (0.3, ", backprop tail 30 %"),
        (0.4, ", backprop tail 40 %"),
    )
}
METHODS |= {
    "first chunk alone, rest fresh, backprop tail 40 %, WSD": of(
        "chunked 2", 0.4, schedule=WSD, renew="fresh"
    ),
    "first chunk alone, rest copied, backprop tail 40 %, WSD": of(
        "chunked 2", 0.4, schedule=WSD, renew="copied"
    ),
}
# tried in both schemes, under both schedules, with a tail and without
HEADS: dict[str, dict[str, Any]] = {
    "1/8 of the vocabulary": {"vocabulary": 1 / 8},
    "1/16 of the vocabulary, 1/32 drawn": {"vocabulary": 1 / 16, "rare_samples": 1 / 32},
    "1/32 of the vocabulary, 1/32 drawn": {"vocabulary": 1 / 32, "rare_samples": 1 / 32},
    "shared readout, 1/16 of the vocabulary, 1/32 drawn": {
        **SHARED,
        "vocabulary": 1 / 16,
        "rare_samples": 1 / 32,
    },
    "1/8 of the tokens": EIGHTH,
    "1/4 of the tokens": QUARTER,
    "1/8 of the tokens, companion": {**EIGHTH, "companion": 1.0},
    "shared readout": SHARED,
    "shared readout, refreshed every 10": {**SHARED, "refresh_every": 10},
    "shared readout, refreshed every 50": {**SHARED, "refresh_every": 50},
    "shared readout, adapter": {**SHARED, "adapter": True},
    "rank 16": {"rank": 16},
    "one private block": {"blocks": 1},
}
METHODS |= {
    f"{scheme}, {name}{tail}{end}": of(scheme, share, head=head, schedule=schedule)
    for scheme in ("local", "chunked 2")
    for schedule, end in ((COSINE, ""), (WSD, ", WSD"))
    for name, head in HEADS.items()
    for share, tail in ((0.0, ""), (0.4, ", tail 40 %"))
}
METHODS |= {
    "deep supervision": of("deep supervision"),
    "deep supervision, dropped by half": of("deep supervision", dropped_by=0.5),
    "deep supervision, WSD": of("deep supervision", schedule=WSD),
    "deep supervision, dropped by half, WSD": of("deep supervision", dropped_by=0.5, schedule=WSD),
}
AHEAD, PREDICTED = "backprop, run ahead", "backprop, run ahead, predicted"
CHUNKS_AHEAD = "chunked 2, run ahead"
METHODS |= {
    AHEAD: of(AHEAD),
    PREDICTED: of(PREDICTED),
    f"{AHEAD}, rates discounted": of(f"{AHEAD}, rates discounted"),
    f"{AHEAD}, backprop tail 20 %": of(AHEAD, 0.2),
    f"{PREDICTED}, backprop tail 20 %": of(PREDICTED, 0.2),
    f"{AHEAD}, at most one": of(f"{AHEAD}, at most one"),
    CHUNKS_AHEAD: of(CHUNKS_AHEAD),
    f"{CHUNKS_AHEAD}, backprop tail 40 %": of(CHUNKS_AHEAD, 0.4),
}
for _count in (1, 2, 8, 16):  # micro-batches a step: the delay is a segment's lead divided by it
    METHODS |= {
        f"{name}, {_count} micro-batches": of(name, micro_batches=_count)
        for name in (AHEAD, PREDICTED, CHUNKS_AHEAD, "chunked 2", "backprop")
    }


def shown(method: str) -> str:
    """A method's name where people read it: that of its scheme, and what is added to it."""
    return method.replace(", backprop tail", ", tail")


TAILS = sorted({method.tail for method in METHODS.values() if method.tail})


def switch_step(steps: int, tail: float) -> int:
    """The step at which a tail of so large a share begins."""
    return round(steps * (1 - tail))


def section_of(
    method: Method, num_segments: int, num_micro_batches: int, steps: int, vocab_size: int
) -> dict[str, Any]:
    """The "local_parallel" section of a method, for one process that holds all segments."""
    scheme, end = (scheme_of(one, num_micro_batches) for one in (method.scheme, method.end))
    if method.tail:
        scheme = {"phases": [{**scheme, "until_step": switch_step(steps, method.tail)}, end]}
    if method.dropped_by:
        scheme = {"phases": dropped_losses(num_segments, steps, method.dropped_by)}
    return {
        **scheme,
        "num_stages": 1,
        "segments_per_stage": num_segments,
        "head": head_of(method.head, vocab_size),
    }
