"""What a run's report says to look at next."""

from __future__ import annotations

from statistics import median

from ds_local.checkpoints.metrics_file import of_full_model
from ds_local.training.run_record import RunRecord

_IDLE = 0.05  # share of a step that is not worth a word


def what_next(run: RunRecord) -> list[str]:
    """Sentences on what deserves a look, the most urgent first."""
    found = []
    if run.events:
        first = min(run.events, key=lambda row: row["nonfinite_step"])
        found.append(
            f"Numbers were not finite, {len(run.events)} times in the reports, first at step "
            f"{first['nonfinite_step']}: {first['nonfinite']} of segment {first['segment']}, stage "
            f"{first['stage']}. Look at the gradient norm and the learning rate just before."
        )
    whole = of_full_model(run.validation)
    losses = [(row["step"], row["loss"]) for row in whole if row["loss"]]
    if len(losses) > 1:
        step, best = min(losses, key=lambda point: point[1])
        if losses[-1][1] > best * 1.01:
            found.append(
                f"The validation loss of the full model was best at step {step} ({best:.4f}) and "
                f"is {losses[-1][1]:.4f} now: it overfits, or the learning rate is too high."
            )
    found += _on_norms(run)
    found += _on_idle(run)
    if run.costs is None:
        found.append(
            "train.py --profile measures what each stage's work takes; this page then shows a step "
            "as executed, and simulate.py --profile what another schedule would take."
        )
    return found


def _on_norms(run: RunRecord) -> list[str]:
    found = []
    for segment in run.segments:
        values = [y for _, y in run.points("train", segment, "grad_norm")[1:] if y is not None]
        if len(values) > 10 and max(values[len(values) // 10 :]) > 10 * median(values):
            found.append(
                f"The gradient norm of segment {segment} had a peak of {max(values):.3g}, "
                f"{max(values) / median(values):.0f} times its median: lower the learning rate, or "
                "gradient_clipping."
            )
    return found


def _on_idle(run: RunRecord) -> list[str]:
    """The idlest stage, and why."""
    shares = {stage: run.mean("idle_share", stage) for stage in run.stages_now}
    known = {stage: share for stage, share in shares.items() if share is not None}
    if not known:
        return []
    idlest = max(known, key=lambda stage: known[stage])
    busiest = min(known, key=lambda stage: known[stage])
    share = known[idlest]
    if share < _IDLE:
        return [f"No stage waits much: the idlest, stage {idlest}, {share:.1%} of its time."]
    text = f"Stage {idlest} is the idlest: it waits {share:.0%} of its time"
    waits = run.waits(idlest)
    link = next(iter(waits), None)
    text += f", mostly for the {link}." if link else "."
    expected = run.expected_idle
    explained = expected is not None and expected[idlest] >= 0.7 * share
    if explained and expected is not None:
        text += (
            f" The schedule alone explains {expected[idlest]:.0%}: more micro-batches a step, "
            "split_backward, or a scheme with fewer gradient messages would shorten it."
        )
    elif known[busiest] < share / 2:
        text += (
            f" Stage {busiest} waits least ({known[busiest]:.0%}), so it has the most work: give "
            "it fewer layers (partition with a profile, or parts) or a cheaper head."
        )
    else:
        text += " All stages wait alike: the links are slow, or the machine is shared."
    return [text]
