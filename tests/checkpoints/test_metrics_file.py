"""metrics.jsonl: damage is set aside, nothing else is lost, and a full disk is outlived."""

import errno
import json
import math

import pytest
from killed import killed_everywhere
from small_disks import small_disk

from ds_local.checkpoints.metrics_file import MetricsFile


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_what_is_not_finite_is_null_with_a_word(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    figures = [
        {"loss": 2.5, "nonfinite": None},
        {"loss": math.nan, "grad_norm": math.inf, "nonfinite": "loss"},
        {"loss": None, "has_loss": False},
        {"loss": -math.inf, "gradient_cosine": math.nan},
    ]
    lines = [rows([step], seconds=float(step), **more)[0] for step, more in enumerate(figures, 1)]
    file.write(lines)

    def read():
        lines = file.path.read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    expected = [
        lines[0],
        lines[1] | {"loss": None, "grad_norm": None},
        lines[2],
        lines[3] | {"loss": None, "gradient_cosine": None, "nonfinite": "loss, gradient_cosine"},
    ]
    assert read() == expected
    assert file.keep_until(3) == (3.0, 0)
    assert read() == expected[:3]


def test_an_older_file_with_nan_is_read_and_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (row,) = rows([1], loss=math.nan)
    path.write_text(json.dumps(row) + "\n")
    file = MetricsFile(path)
    mended = row | {"loss": None, "nonfinite": "loss"}
    assert file.read() == [mended]
    file.keep_until(1)
    assert json.loads(path.read_text(), parse_constant=refuse) == mended


ROW = {"segment": 0, "stage": 0, "split": "train", "tokens": 8, "loss": 1.5}


def rows(steps, **more):
    return [{"step": step, "seconds": step / 2, **ROW, **more} for step in steps]


@pytest.fixture
def metrics(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.write(rows(range(1, 11))) is None
    return file


def steps(file):
    return [row["step"] for row in file.read()]


def test_rows_after_the_step_of_a_checkpoint_are_dropped(metrics):
    assert metrics.keep_until(6) == (3.0, 0)
    assert steps(metrics) == list(range(1, 7))
    metrics.write(rows([7]))
    assert steps(MetricsFile(metrics.path)) == list(range(1, 8))


DAMAGE = [
    b"\0\0\0\0",
    b'{"step": 3, "sec',
    b"\xff\xfe",
    b"[1]",
    b'{"step": 3}',
    b'{"step": 3, "seconds": 1.5, "loss": 2.0, "epoch": 1}',
    b"[" * 100_000,
    b'{"step": 3}{"step": 4}',
    b"null",
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: str(damage[:40]))
def test_a_damaged_line_is_set_aside_and_the_history_on_both_sides_stays(metrics, damage):
    lines = metrics.path.read_bytes().splitlines(keepends=True)
    lines[4] = damage + b"\n"
    metrics.path.write_bytes(b"".join(lines))
    kept = [1, 2, 3, 4, *range(6, 11)]
    assert steps(metrics) == kept
    assert metrics.keep_until(9) == (4.5, 1)
    assert steps(metrics) == kept[:-1]
    assert metrics.damaged_path.read_bytes() == damage + b"\n"
    assert metrics.keep_until(9) == (4.5, 0)


FOREIGN = [
    *({key: None} for key in ("step", "segment", "stage", "split", "tokens", "seconds")),
    *({key: "x"} for key in ("step", "segment", "stage", "tokens", "seconds", "loss")),
    {"step": True},
    {"step": 0},
    {"segment": -1},
    {"stage": 1.0},
    {"tokens": 10**400},
    {"split": ["train"]},
    {"seconds": -1.0},
    {"loss": {}},
    {"has_loss": None},
    {"grad_norm": "x"},
    {"step_seconds": [1]},
    {"slowest_link": 3},
]


@pytest.mark.parametrize("change", FOREIGN, ids=str)
def test_a_row_that_no_run_has_written_is_damaged(metrics, change):
    foreign = json.dumps(rows([4])[0] | change).encode()
    lines = metrics.path.read_bytes().splitlines(keepends=True)
    metrics.path.write_bytes(b"".join([*lines[:4], foreign + b"\n", *lines[4:]]))
    assert steps(metrics) == list(range(1, 11))
    assert metrics.keep_until(10) == (5.0, 1)
    assert metrics.damaged_path.read_bytes() == foreign + b"\n"


def test_rows_of_a_newer_version_are_kept(metrics):
    newer = rows([11], split="probe", sharpness=[1, 2]) + rows([0], split="validation")
    metrics.write(newer)
    assert metrics.keep_until(11) == (5.5, 0)
    assert metrics.read()[-2:] == newer


def test_a_half_written_last_line_spoils_no_later_one(metrics):
    text = metrics.path.read_bytes()
    metrics.path.write_bytes(text[:-9])
    assert metrics.keep_until(10)[1] == 1
    metrics.write(rows([10]))
    assert steps(metrics) == list(range(1, 11))
    metrics.path.write_bytes(text[:-1])  # whole but for its end
    assert metrics.keep_until(10)[1] == 0
    metrics.write(rows([11]))
    assert steps(metrics) == list(range(1, 12))


def test_killed_at_any_file_operation_of_a_clean_up_no_row_is_lost(metrics):
    text = metrics.path.read_bytes().replace(b'{"step": 4', b'{"step": x')
    kept = [1, 2, 3, 5, 6, 7, 8]
    metrics.path.write_bytes(text)
    points = 0
    for _ in killed_everywhere(
        lambda: MetricsFile(metrics.path).keep_until(8), metrics.path.parent
    ):
        points += 1
        MetricsFile(metrics.path).keep_until(8)
        assert steps(metrics) == kept
        assert b'{"step": x' in metrics.damaged_path.read_bytes()
        metrics.path.write_bytes(text)
    assert points > 4


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "small", "size=64k") as place:
        yield place


def test_rows_wait_for_room_on_a_full_disk(disk):
    file = MetricsFile(disk / "metrics.jsonl")
    file.write(rows([1]))
    (disk / "filler").write_bytes(b"x" * 59_000)
    for step in range(2, 40):
        error = file.write(rows([step], note="y" * 200))
    assert error is not None
    assert error.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        file.sync()
    assert file.path.read_bytes().endswith(b"\n")  # no half line
    assert all(json.loads(line) for line in file.path.read_text().splitlines())
    (disk / "filler").unlink()
    assert file.write(rows([40])) is None
    file.sync()
    assert steps(MetricsFile(file.path)) == list(range(1, 41))
