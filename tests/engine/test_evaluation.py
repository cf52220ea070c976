"""Losses without training, summed by weight; whole evaluations are in tests/dist/test_engine.py."""

import torch

from ds_local.engine.evaluation import evaluate, mean_losses


class Executor:
    """Hands on what the data holds, for every segment."""

    device = torch.device("cpu")
    run_ends = False

    def __init__(self):
        self.seen = []

    def forward_only(self, data, segment, micro_batch):
        self.seen.append((segment, micro_batch))
        value, labels = next(data) if segment == 0 else self.kept
        self.kept = value, labels
        return torch.tensor(value + segment), labels


class Module:
    """Two segments on this stage of a model of three."""

    num_segments, local_segments = 3, (0, 1)

    def has_loss(self, segment):
        return segment == 1

    def loss_of(self, segment, hidden, labels):
        return hidden

    def weight_of(self, labels):
        return labels


def test_losses_are_weighted_as_their_micro_batches():
    executor = Executor()
    sums, logits = evaluate(executor, Module(), iter([(1.0, 1.0), (4.0, 3.0)]), 2)
    assert sums.tolist() == [[0, 2.0 * 1 + 5.0 * 3, 0], [0, 4.0, 0]]
    assert logits is None
    assert executor.seen == [(0, -1), (1, -1), (0, -2), (1, -2)]  # never those of training


def test_who_stops_takes_this_micro_batch_and_no_other():
    executor = Executor()
    sums, _ = evaluate(
        executor, Module(), iter([(1.0, 1.0)] * 5), 5, stop=lambda: len(executor.seen) >= 2
    )
    assert len(executor.seen) == 4
    assert sums[1, 1] == 2
    assert executor.run_ends


def test_without_losses_only_the_layers_run():
    sums, _ = evaluate(Executor(), Module(), iter([(1.0, 1.0)]), 1, compute_loss=False)
    assert not sums.any()


def test_a_segment_without_a_loss_has_no_mean():
    sums = torch.tensor([[6.0, 0.0, 8.0], [2.0, 0.0, 4.0]])
    assert mean_losses(sums) == ({0: 3.0, 2: 2.0}, 2.0)
    assert mean_losses(torch.zeros(2, 2)) == ({}, 0.0)  # NaN is a loss that came out so
