"""Every error of ours. The message is one sentence: what is wrong, the values, the remedy.

Whatever is not a `DsLocalError` is a fault of the program or of a user's layer, and keeps its
traceback. Each class is also the built-in one that callers would expect.
"""

from __future__ import annotations


class DsLocalError(Exception):
    """Base of all errors of ours."""


class ConfigError(DsLocalError, ValueError):
    """A configuration that cannot work; the message names the key, the values and the remedy."""


class UnsupportedDeepSpeed(ConfigError):
    """A DeepSpeed whose pipeline engine is another one than this package extends."""


class RouteError(DsLocalError, ValueError):
    """A row that makes no sense for this number of segments."""


class ScheduleError(DsLocalError, ValueError):
    """A schedule that is incomplete or would deadlock; the message carries the grid."""


class DataError(DsLocalError, ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


class OutOfData(DataError, RuntimeError):
    """A loader that ended before the step had its micro-batches."""


class UnsupportedModel(DsLocalError, ValueError):
    """A model that cannot be cut into pipeline layers."""


class WeightsError(DsLocalError, ValueError):
    """Pretrained weights that cannot be used; the message names the file and the tensor."""


class OutputError(DsLocalError, OSError):
    """A file or folder that cannot be written, or is not ours to replace; the message names it."""


class ExportError(DsLocalError, ValueError):
    """A checkpoint that cannot be turned into a model; the message names the file or tensor."""


class CheckpointError(DsLocalError, RuntimeError):
    """A checkpoint that is missing, incomplete or damaged; the message names file and remedy."""


class MoveError(CheckpointError):
    """An optimizer's state that does not go into this run, whatever its layout."""


class NonFiniteError(DsLocalError, RuntimeError):
    """Losses, gradients or activations that are not finite, for more steps in a row than
    "on_nonfinite" allows; the message names step, stage and segment."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written, on any rank; the one before it is whole."""


class RunError(DsLocalError, RuntimeError):
    """A run folder that is in use, or whose run this start would not continue."""


class ClusterError(DsLocalError, RuntimeError):
    """The machines cannot run the job together; the message names host, rank and remedy."""


class TransportError(DsLocalError, RuntimeError):
    """A neighbour is gone, silent, or sent something else than expected; the message names it.

    `reason` is what the stage that failed first said, if this rank has been told.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class LostConnection(TransportError):
    """A rank that is waited for is gone, or came too late.

    `late`: the limit has passed; otherwise the connection broke.
    """

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


def first_line(error: BaseException) -> str:
    """What a foreign error says, for a sentence of ours: its first line, or else its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def counted(number: int, noun: str) -> str:
    """For a sentence: "1 stage", "4 stages"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
