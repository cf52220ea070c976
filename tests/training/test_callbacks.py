"""How a run stands after its validations; what is no callback."""

import math

import pytest

import ds_local
from ds_local.errors import ConfigError
from ds_local.training.callbacks import Standing, check_callbacks


def after(*losses):
    standing = Standing()
    for loss in losses:
        standing = standing.after(loss)
    return standing


def test_the_least_loss_and_how_many_came_since():
    assert after() == (math.inf, 0)
    assert after(3.0) == (3.0, 0)
    assert after(3.0, 2.0) == (2.0, 0)
    assert after(3.0, 2.0, 2.5, 2.1) == (2.0, 2)
    assert after(3.0, 4.0, 2.0) == (2.0, 0)


def test_the_same_loss_again_is_no_better():
    assert after(2.0, 2.0) == (2.0, 1)


def test_a_loss_that_is_not_finite_is_worse_than_any():
    assert after(2.0, math.nan, math.inf) == (2.0, 2)
    assert after(math.nan) == (math.inf, 1)
    assert after(math.nan, 5.0) == (5.0, 0)


def test_of_a_runs_rows_the_full_model_counts():
    rows = [
        {"split": split, "step": step, "segment": segment, "loss": loss}
        for split, step, segment, loss in [
            ("validation", 0, 0, 1.0),
            ("validation", 0, 1, 3.0),
            ("train", 1, 1, 0.5),
            ("validation", 5, 0, 9.0),
            ("validation", 5, 1, 2.0),
            ("validation", 10, 1, None),
            ("validation", 15, 1, 2.25),
        ]
    ]
    assert Standing.of(rows) == (2.0, 2)


@pytest.mark.parametrize("segments", [(4, 2), (2, 4)])
def test_the_full_model_is_that_of_its_time(segments):
    """A resumed run has other segments than it had."""
    rows = [
        {"split": "validation", "step": step, "segment": segment, "loss": loss + count - segment}
        for count, losses in zip(segments, ((5.0, 4.0), (4.5, 4.6)), strict=True)
        for step, loss in enumerate(losses, 0 if count == segments[0] else 2)
        for segment in range(count)
    ]
    assert Standing.of(rows) == (5.0, 2)  # losses here are one above those given

    assert Standing.of([]) == Standing()


class Misspelt(ds_local.Callback):
    def on_validate(self, run, validation):
        raise AssertionError


class Right(ds_local.Callback):
    def on_validation(self, run, validation):
        raise AssertionError


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Misspelt(), r"Misspelt\.on_validate is never called; did you mean 'on_validation'\?"),
        (Right, "derived from ds_local.Callback"),  # the class, not an object
        (print, "derived from ds_local.Callback"),
    ],
)
def test_what_would_never_be_called_is_refused(callback, words):
    check_callbacks([Right()])
    with pytest.raises(ConfigError, match=words):
        check_callbacks([Right(), callback])
