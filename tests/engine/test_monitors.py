"""What monitors are told: every point once, at steps that rise."""

from types import SimpleNamespace

from ds_local.engine.monitors import Points, take_monitor


class Monitor:
    def __init__(self):
        self.told = []

    def write_events(self, points):
        self.told += points


def reports(step, *losses):
    return [
        SimpleNamespace(
            step=step,
            segment=n,
            stage=n,
            loss=loss,
            router_loss=None,
            grad_norm=None,
            lr=0.5,
            idle_share=0.0,
            skipped=0,
        )
        for n, loss in enumerate(losses)
    ]


def test_a_step_and_a_validation():
    points = Points(monitor := Monitor(), 8, [0, 1])
    points.validated(0, {0: 4.0, 1: 3.0})
    points.trained(reports(2, None, 2.5))
    points.validated(2, {0: 2.0, 1: 1.0})
    assert monitor.told == [
        ("Validation/stage_0/segment_0/loss", 4.0, 0),
        ("Validation/stage_1/segment_1/loss", 3.0, 0),
        ("Train/Samples/eval_loss", 3.0, 0),
        ("Train/stage_0/segment_0/lr", 0.5, 16),
        ("Train/stage_0/segment_0/idle_share", 0.0, 16),
        ("Train/stage_0/segment_0/skipped", 0, 16),
        ("Train/stage_1/segment_1/loss", 2.5, 16),
        ("Train/stage_1/segment_1/lr", 0.5, 16),
        ("Train/stage_1/segment_1/idle_share", 0.0, 16),
        ("Train/stage_1/segment_1/skipped", 0, 16),
        ("Train/Samples/train_loss", 2.5, 16),
        ("Train/Samples/lr", 0.5, 16),
        ("Validation/stage_0/segment_0/loss", 2.0, 16),
        ("Validation/stage_1/segment_1/loss", 1.0, 16),
        ("Train/Samples/eval_loss", 1.0, 16),
    ]


def test_what_an_earlier_start_has_told_is_not_told_again():
    points = Points(monitor := Monitor(), 1, [0])
    points.skip_until(train=7, validation=5)
    for step in (4, 6, 8):
        points.trained(reports(step, 1.0))
        points.validated(step, {0: 1.0})
    points.validated(8, {0: 1.0})
    told = [(tag.partition("/")[0], step) for tag, _, step in monitor.told if tag.endswith("/loss")]
    assert told == [("Validation", 6), ("Train", 8), ("Validation", 8)]


def test_an_evaluation_without_losses_and_a_run_without_monitors():
    points = Points(monitor := Monitor(), 1, [0])
    points.validated(3, {})
    assert monitor.told == []
    Points(None, 1, [0]).trained(reports(3, 1.0))


def test_csv_files_that_are_there_get_no_second_header(tmp_path):
    (tmp_path / "Train_Samples_lr.csv").touch()
    csv = SimpleNamespace(log_dir=str(tmp_path), filenames=[])
    monitor = SimpleNamespace(enabled=True, csv_monitor=csv)
    assert take_monitor(monitor) is monitor
    assert (monitor.enabled, csv.filenames) == (False, ["Train_Samples_lr"])
    assert take_monitor(SimpleNamespace(enabled=False)) is None
