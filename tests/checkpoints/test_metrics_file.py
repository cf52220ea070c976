"""metrics.jsonl is strict JSON, and no null is without a word."""

import json
import math

from ds_local.checkpoints.metrics_file import MetricsFile


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_what_is_not_finite_is_null_with_a_word(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    rows = [
        {"step": 1, "seconds": 1.0, "loss": 2.5, "nonfinite": None},
        {"step": 2, "seconds": 2.0, "loss": math.nan, "grad_norm": math.inf, "nonfinite": "loss"},
        {"step": 3, "seconds": 3.0, "loss": None, "has_loss": False},
        {"step": 4, "seconds": 4.0, "loss": -math.inf, "gradient_cosine": math.nan},
    ]
    file.write(rows)

    def read():
        lines = file.path.read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    expected = [
        rows[0],
        rows[1] | {"loss": None, "grad_norm": None},
        rows[2],
        rows[3] | {"loss": None, "gradient_cosine": None, "nonfinite": "loss, gradient_cosine"},
    ]
    assert read() == expected
    assert file.keep_until(3) == 3.0
    assert read() == expected[:3]


def test_an_older_file_with_nan_is_read_and_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 1.0, "loss": NaN}\n')
    file = MetricsFile(path)
    file.keep_until(1)
    mended = {"step": 1, "seconds": 1.0, "loss": None, "nonfinite": "loss"}
    assert json.loads(path.read_text(), parse_constant=refuse) == mended
