"""The pages that the quality study writes."""

from study_runs import run_of

from ds_local.study.picture import COMPARED, SMALL, compared, gaps_chart
from ds_local.study.summary import summary
from ds_local.study.tables import END, START, markdown, short_markdown, write_between


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "quality.md"
    write_between(page, "one\n")
    text = page.read_text()
    assert text.count(START) == text.count(END) == 1
    page.write_text("before\n" + text + "after\n")
    write_between(page, "two\n")
    assert page.read_text() == "before\n" + text.replace("one", "two") + "after\n"


def rows_of(losses):
    """Rows of preset cpu: method -> its losses, one a seed."""
    machine = {"device": "cpu", "processor": "x"}
    results = [
        run_of(method, seed=seed)._asdict()
        | {"loss": loss, "tokens": 10, "curve": [(10, loss)], "machine": machine}
        for method, of in losses.items()
        for seed, loss in enumerate(of)
    ]
    return summary("cpu", results)


def test_a_line_for_each_row():
    text = markdown({"cpu": rows_of({"backprop": [2.0, 2.5]})})
    assert "### Preset cpu: steps of 2,048 tokens" in text
    assert (
        "| backprop | 4 | 3,000 | 0.008 | 2 | 2.2500 (2.0000-2.5000) | 9.488 | +0.0 % | 0.0% "
        "| 1.00 / 1.00 / 1.00, 1.00 / 1.00 |"
    ) in text


def test_the_page_has_what_is_compared_with_the_spread_of_its_seeds():
    rows = rows_of(
        {"backprop": [2.0, 2.5], "chunked 2, backprop tail 40 %": [2.05, 2.6], "overlapping 2": [3]}
    )
    text = short_markdown(rows)
    assert "**Steps of 2,048 tokens, 3,000 of them:**" in text
    assert "| chunked 2, tail 40 % | 2 | +7.8 % (+5.1 to +10.5) | - | - | - | - |" in text
    assert "overlapping" not in text
    assert all(line.count("|") == 8 for line in text.splitlines() if line.startswith("|"))
    assert list(compared(rows, SMALL)) == list(COMPARED[:2])
    drawn = gaps_chart(rows)
    assert "chunked 2, tail 40 %" in drawn
    assert "overlapping" not in drawn
