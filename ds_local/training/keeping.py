"""Which checkpoints a run keeps: the last few, and the best. The loop's own callbacks."""

from __future__ import annotations

from ds_local.checkpoints.rotation import remove_older
from ds_local.training.callbacks import Callback, Run, Validation

BEST = "best"  # the tag of the checkpoint with the least validation loss


class KeepLast(Callback):
    """Removes older checkpoints of the loop when a new one is whole.

    Args:
        count: of checkpoints that stay.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def on_save(self, run: Run, tag: str) -> None:
        if tag != BEST:
            remove_older(run.folder / "checkpoints", self.count)


class KeepBest(Callback):
    """Saves a checkpoint of its own at each validation that is the best so far, those before any
    training left out."""

    def on_validation(self, run: Run, validation: Validation) -> None:
        if validation.is_best and validation.step:
            run.save(BEST)
