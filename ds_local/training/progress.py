"""What the console shows while a run trains: a bar, and a line for each validation.

Where the console is no terminal (a log file), there is a line for each report instead of the bar.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from ds_local.checkpoints.metrics_file import perplexity
from ds_local.engine.reports import SegmentReport
from ds_local.links.logs import say
from ds_local.training.callbacks import Callback, Run, Validation
from ds_local.training.pace import Pace
from ds_local.training.samples import sample_line

_RECENT = 50  # reports that the pace on the line is of
_WORTH_NAMING = 0.1  # idle share of a stage from which on the line says what it waits for


class Progress(Callback):
    """The console of rank 0.

    Args:
        begins_at, ends_at: steps of this start.
        pace: of the speeds on the line.
    """

    def __init__(self, begins_at: int, ends_at: int, pace: Pace) -> None:
        self._pace = pace
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._first = True
        self._bar = tqdm(
            total=ends_at,
            initial=begins_at,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=None,  # where there is no terminal
        )

    def on_report(self, run: Run, reports: Sequence[SegmentReport]) -> None:
        if len(self._seconds) == 1 and self._first:
            self._seconds.clear()  # the first one pays for the start
            self._first = False
        self._seconds.append(max(report.seconds for report in reports))
        step, mean = reports[0].step, sum(self._seconds) / len(self._seconds)
        line = progress_line(reports, self._pace.figures(step - 1, mean))
        if self._bar.disable:
            say(f"step {step}/{run.max_steps} | {line}")
        else:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(step - self._bar.n)

    def on_validation(self, run: Run, validation: Validation) -> None:
        say(validation_line(validation))
        for row in validation.samples.values():
            say(sample_line(validation.step, row))

    def close(self) -> None:
        self._bar.close()


def progress_line(reports: Sequence[SegmentReport], speeds: Mapping[str, float | None]) -> str:
    """Losses of all segments, learning rate, gradient norm, speed, who waits most and for what, and
    what was not finite.

    Args:
        speeds: as `Pace.figures` gives them.
    """
    parts = [f"loss {' '.join(map(_loss, (r.loss for r in reports)))}"]
    rates = [r.lr for r in reports if r.lr is not None]
    parts += [f"lr {max(rates):.3g}"] if rates else []
    norms = [r.grad_norm for r in reports if r.grad_norm is not None]
    parts += [f"norm {' '.join(f'{norm:.3g}' for norm in norms)}"] if norms else []
    parts.append(_speed(reports, speeds))
    most = max(reports, key=lambda r: r.idle_share)
    idle = sum(r.idle_share for r in reports) / len(reports)
    waits = f"idle {idle:.0%}, most on stage {most.stage} {most.idle_share:.0%}"
    named = most.slowest_link is not None and most.idle_share >= _WORTH_NAMING
    parts.append(waits + (f" for the {most.slowest_link}" if named else ""))
    events = [
        f"{r.nonfinite} of segment {r.segment} at step {r.nonfinite_step}, {r.skipped} skipped"
        for r in reports
        if r.nonfinite
    ]
    parts += [f"not finite: {'; '.join(events)}"] if events else []
    return " | ".join(parts)


def _speed(reports: Sequence[SegmentReport], speeds: Mapping[str, float | None]) -> str:
    words = f"{speeds['tokens_per_second']:,.0f} tokens/s"
    if speeds["mfu"] is not None:  # on devices of which the peak is known
        held = max(r.memory_bytes or 0 for r in reports) / 2**30
        each = f"{speeds['device_tokens_per_second']:,.0f} a device"
        words += f" ({each}, MFU {speeds['mfu']:.0%}, {held:.1f} GiB)"
    return words


def validation_line(validation: Validation) -> str:
    """Losses of all segments, perplexity of the full model, and how that stands."""
    losses = " ".join(_loss(loss) for _, loss in sorted(validation.losses.items()))
    words = f"step {validation.step}: validation loss {losses}"
    if math.isfinite(validation.loss):
        words += f", perplexity {perplexity(validation.loss):,.2f}"
    bad = [s for s, loss in sorted(validation.losses.items()) if not math.isfinite(loss)]
    if bad:
        words += f"; that of segments {bad} is not finite"
    return words + ("; the best so far" if validation.is_best and validation.step else "")


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"
