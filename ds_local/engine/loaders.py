"""What may be passed as `training_data` and to `train_batch`, and how a data set that is only a
stream is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.runtime.dataloader import RepeatingLoader
from torch.utils.data import DataLoader, IterableDataset

from ds_local.errors import ConfigError


def data_for(
    training_data: Any, batch_size: int, collate_fn: Any, replica: int, num_replicas: int
) -> tuple[Any, RepeatingLoader | None]:
    """(what DeepSpeed itself can load, a loader of ours for a stream); one of them is None.

    Args:
        batch_size: sequences in a micro-batch.

    Raises:
        ConfigError: for what is no data set.
    """
    kind = type(training_data).__name__
    if training_data is None:
        return None, None
    if isinstance(training_data, DataLoader | RepeatingLoader) or hasattr(
        training_data, "__next__"
    ):
        raise ConfigError(
            f"training_data is a {kind}; pass the data set itself, or leave it out and call "
            "train_batch(iter(loader))"
        )
    if not isinstance(training_data, str | IterableDataset) and all(
        hasattr(training_data, method) for method in ("__getitem__", "__len__")
    ):
        if not len(training_data):
            raise ConfigError(f"training_data is an empty {kind}; pass one with samples")
        return training_data, None
    if isinstance(training_data, str) or not hasattr(training_data, "__iter__"):
        raise ConfigError(
            f"training_data is a {kind}; pass a data set with __getitem__ and __len__, or one to "
            "iterate over"
        )
    share = _Share(training_data, batch_size, replica, num_replicas)
    loader = DataLoader(share, batch_size, collate_fn=collate_fn, drop_last=True)
    return None, RepeatingLoader(loader)


def iterator_of(data: Any) -> Iterator[Any]:
    """What `train_batch` reads from, which must remember how far it has come.

    Raises:
        ConfigError: for a loader or list, which would begin anew in each step.
    """
    if hasattr(data, "__next__"):
        return data
    kind = type(data).__name__
    raise ConfigError(
        f"train_batch got {kind}, which is no iterator; call iter(...) on it once before the "
        "loop, or deepspeed.utils.RepeatingLoader to go through it again and again"
        if hasattr(data, "__iter__")
        else f"train_batch got {kind}; give an iterator of micro-batches"
    )


def begun(data: Any) -> Any:
    """What `eval_batch` reads from: an iterator, or the beginning of a loader; None stays None."""
    return data if data is None or hasattr(data, "__next__") else iter(data)


class _Share(IterableDataset[Any]):
    """One replica's samples of a stream: of every `num_replicas` micro-batches one."""

    def __init__(
        self, samples: Iterable[Any], batch_size: int, replica: int, num_replicas: int
    ) -> None:
        self._samples, self._batch_size = samples, batch_size
        self._replica, self._num_replicas = replica, num_replicas

    def __iter__(self) -> Iterator[Any]:
        for number, sample in enumerate(self._samples):
            if number // self._batch_size % self._num_replicas == self._replica:
                yield sample
