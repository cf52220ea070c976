"""The pages that the quality study writes."""

from study_runs import run_of

from ds_local.study.summary import summary
from ds_local.study.tables import END, START, markdown, write_between


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "quality.md"
    write_between(page, "one\n")
    text = page.read_text()
    assert text.count(START) == text.count(END) == 1
    page.write_text("before\n" + text + "after\n")
    write_between(page, "two\n")
    assert page.read_text() == "before\n" + text.replace("one", "two") + "after\n"


def test_a_line_for_each_row():
    machine = {"device": "cpu", "processor": "x"}
    results = [
        run_of("backprop", seed=seed)._asdict()
        | {"loss": loss, "tokens": 10, "curve": [(10, loss)], "machine": machine}
        for seed, loss in ((1, 2.0), (2, 2.5))
    ]
    text = markdown({"cpu": summary("cpu", results)})
    assert "### Preset cpu: steps of 2,048 tokens" in text
    assert (
        "| backprop | 4 | 3,000 | 0.008 | 2 | 2.2500 (2.0000-2.5000) | 9.488 | +0.0 % | 0.0% "
        "| 1.00 / 1.00 / 1.00, 1.00 / 1.00 |"
    ) in text
