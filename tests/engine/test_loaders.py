"""What may be passed as training_data."""

import itertools

import pytest
import torch
from sentences import assert_one_sentence
from torch.utils.data import DataLoader, IterableDataset

from ds_local.engine.loaders import begun, data_for, iterator_of
from ds_local.errors import ConfigError


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return ((torch.tensor([i]), torch.tensor([-i])) for i in range(self.count))


class Plain:
    """Iterable, but no torch class."""

    def __iter__(self):
        return iter(Stream(12))


@pytest.mark.parametrize("source", [Stream(12), Plain()], ids=["torch", "plain"])
def test_replicas_share_a_stream_and_start_it_again(source):
    for replica, numbers in (
        (0, [[0, 1], [4, 5], [8, 9], [0, 1]]),
        (1, [[2, 3], [6, 7], [10, 11], [2, 3]]),
    ):
        data, loader = data_for(source, 2, None, replica, 2)
        assert data is None
        batches = list(itertools.islice(loader, 4))
        assert [inputs.flatten().tolist() for inputs, _ in batches] == numbers
        assert [labels.flatten().tolist() for _, labels in batches] == [
            [-i for i in of] for of in numbers
        ]


def test_a_collate_function_is_used():
    _, loader = data_for(Stream(4), 2, len, 0, 1)
    assert next(loader) == 2


def test_a_data_set_with_a_length_is_left_to_deepspeed():
    samples = [(torch.ones(1), torch.ones(1))]
    assert data_for(samples, 2, None, 0, 1) == (samples, None)
    assert data_for(None, 2, None, 0, 1) == (None, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (DataLoader(Stream(4)), ["DataLoader", "train_batch(iter(loader))"]),
        (iter([1]), ["list_iterator", "train_batch(iter(loader))"]),
        ([], ["empty list"]),
        ("data/python", ["str", "__getitem__"]),
        (7, ["int", "__len__"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_other_things_are_refused(given, words):
    with pytest.raises(ConfigError) as error:
        data_for(given, 2, None, 0, 1)
    assert_one_sentence(error.value, "training_data", *words)


def test_training_reads_from_what_remembers_how_far_it_has_come():
    iterator = iter([1, 2])
    assert iterator_of(iterator) is iterator
    for given, words in (
        (DataLoader(Stream(4)), ["DataLoader, which is no iterator", "RepeatingLoader"]),
        ([1], ["list, which is no iterator"]),
        (3, ["int; give an iterator"]),
    ):
        with pytest.raises(ConfigError) as error:
            iterator_of(given)
        assert_one_sentence(error.value, "train_batch got", *words)


def test_an_evaluation_begins_a_loader():
    iterator = iter([1, 2])
    assert begun(None) is None
    assert begun(iterator) is iterator
    assert list(begun([1, 2])) == [1, 2]
