"""Reading: the order is a pure function of (seed, step), whatever the layout."""

import json
import shutil

import datasets
import pytest
import torch
from test_corpus import tokenizer, words  # noqa: F401 - a fixture

from ds_local.data.corpus import prepare
from ds_local.data.dataset import (
    BatchShape,
    TokenData,
    step_indices,
    training_batches,
    validation_batches,
)
from ds_local.errors import DataError
from ds_local.model.heads import IGNORE


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):  # noqa: F811
    place = tmp_path_factory.mktemp("data")
    (place / "a.txt").write_text(words(4000))
    prepare([str(place / "a.txt")], tokenizer, 16, place / "data", progress=False)
    return place / "data"


def test_every_epoch_is_another_permutation():
    epochs = [
        [i for step in range(e * 5, e * 5 + 5) for i in step_indices(20, 0, step, 4)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert step_indices(20, 0, 7, 4) == step_indices(20, 0, 7, 4) != step_indices(20, 1, 7, 4)


def test_steps_may_span_the_end_of_an_epoch():
    ids = [i for step in range(10) for i in step_indices(7, 3, step, 3)]
    assert sorted(ids[:7]) == sorted(ids[7:14]) == list(range(7))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_replicas_and_micro_batches_share_out_the_same_step(folder):
    data = TokenData(folder)
    whole = take(training_batches(data, 5, 0, BatchShape(8, 1, 1, 0)), 3)
    for shape in ((2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)):
        size, count, replicas = shape
        parts = [
            training_batches(data, 5, 0, BatchShape(size, count, replicas, r))
            for r in range(replicas)
        ]
        for ids, _ in whole:
            pieces = [next(part)[0] for _ in range(count) for part in parts]
            assert torch.equal(torch.cat(pieces), ids)


def test_resuming_at_a_step_gives_the_batches_of_that_step(folder):
    data = TokenData(folder)
    shape = BatchShape(2, 3, 1, 0)
    straight = take(training_batches(data, 5, 0, shape), 30)
    resumed = take(training_batches(data, 5, 7, shape), 9)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(straight[21:], resumed, strict=True))


def test_validation_covers_every_sequence_once_and_fills_up_with_what_does_not_count(folder):
    data = TokenData(folder)
    total = data.num_sequences("validation")
    for size, replicas in ((4, 1), (3, 2), (7, 3)):
        seen = 0
        for replica in range(replicas):
            for ids, labels in validation_batches(data, BatchShape(size, 1, replicas, replica)):
                assert ids.shape == labels.shape == (size, 16)
                counts = (labels != IGNORE).any(1)
                seen += int(counts.sum())
                assert torch.equal(labels[counts], ids[counts])
        assert seen == total
    some = validation_batches(data, BatchShape(2, 1, 1, 0), max_sequences=3)
    assert sum(int((labels != IGNORE).any(1).sum()) for _, labels in some) == 3


def test_ids_beyond_the_vocabulary_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    facts = json.loads((copy / "prepared.json").read_text())
    (copy / "prepared.json").write_text(json.dumps({**facts, "vocab_size": 100}))
    with pytest.raises(DataError, match="belongs to another tokenizer"):
        TokenData(copy).sequences("train", range(20))


@pytest.mark.parametrize(
    "damage",
    ["no facts", "half facts", "truncated", "missing sequences", "other format", "nothing"],
)
def test_damaged_folders_are_refused(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "data")
    facts = json.loads((copy / "prepared.json").read_text())
    arrow = next((copy / "train").glob("*.arrow"))
    if damage == "no facts":
        (copy / "prepared.json").unlink()
    elif damage == "half facts":
        (copy / "prepared.json").write_text("{")
    elif damage == "truncated":
        arrow.write_bytes(arrow.read_bytes()[:1000])
    elif damage == "missing sequences":
        datasets.load_from_disk(str(copy))["train"].select(range(3)).save_to_disk(
            str(tmp_path / "few")
        )
        shutil.rmtree(copy / "train")
        shutil.copytree(tmp_path / "few", copy / "train")
    elif damage == "other format":
        (copy / "prepared.json").write_text(json.dumps({**facts, "format": 99}))
    else:
        shutil.rmtree(copy)
    with pytest.raises(DataError):
        TokenData(copy).sequences("train", [0])
