"""What stands behind the progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from ds_local.engine.reports import SegmentReport


def progress_line(reports: Sequence[SegmentReport], tokens_per_second: float) -> str:
    """Losses of all segments, pace, who waits most and for what, and what was not finite."""
    losses = " ".join(f"{r.loss:.3f}" if r.loss is not None else "-" for r in reports)
    most = max(reports, key=lambda r: r.idle_share)
    idle = sum(r.idle_share for r in reports) / len(reports)
    waits = f"idle {idle:.0%}, most on stage {most.stage} {most.idle_share:.0%}"
    waits += f" for the {most.slowest_link}" if most.slowest_link else ""
    events = [
        f"{r.nonfinite} of segment {r.segment} at step {r.nonfinite_step}, {r.skipped} skipped"
        for r in reports
        if r.nonfinite
    ]
    waits += f" | not finite: {'; '.join(events)}" if events else ""
    return f"loss {losses} | {tokens_per_second:,.0f} tokens/s | {waits}"
