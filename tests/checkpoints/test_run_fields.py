"""The reference of a run's files."""

from launch import unknown_fields

from ds_local.checkpoints.run_fields import METRICS, SPLITS
from ds_local.engine.reports import SegmentReport
from ds_local.training.diagnostics import FIGURES


def test_what_a_segment_reports_and_what_diagnostics_measure_is_explained():
    figures = set(SegmentReport.__dataclass_fields__) - {"seconds"} | {"step_seconds"}
    assert figures <= {name for name, field in METRICS.items() if "train" in field.splits}
    assert set(FIGURES) <= {n for n, field in METRICS.items() if "diagnostics" in field.splits}
    assert all(set(field.splits) <= SPLITS.keys() for field in METRICS.values())


def test_a_field_in_the_wrong_kind_of_row_is_unknown():
    assert unknown_fields({"split": "train", "lr": 1.0, "step": 3}) == set()
    assert unknown_fields({"split": "validation", "lr": 1.0, "colour": 2}) == {"lr", "colour"}
