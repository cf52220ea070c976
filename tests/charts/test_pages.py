"""The time lines of `simulate`, as SVG and as a page to zoom and point at."""

import json
import re
from xml.etree.ElementTree import Element

import pytest
from browser import opened, shown

from ds_local.charts import pages
from ds_local.charts.timelines import Band, Piece
from ds_local.cli.simulate import main


def write_page(tmp_path, *more):
    page = tmp_path / "schedules.html"
    arguments = ["--stages", "2", "--micro-batches", "2", "--mode", "local", "--compare", "1f1b"]
    assert main([*arguments, "--html", str(page), *more]) == 0
    return page


def data_of(page):
    return json.loads(
        re.search(r'id="data">(.*?)</script>', page.read_text()).group(1).replace("<\\/", "</")
    )


def test_the_page_holds_every_action_of_every_step(tmp_path, capsys):
    data = data_of(write_page(tmp_path, "--steps", "3"))
    assert [band["title"] for band in data["bands"]] == ["local", "1F1B"]
    for band in data["bands"]:
        assert len(band["pieces"]) == 3 * 2 * 2 * 2  # steps, stages, micro-batches, F and B
        assert band["note"].startswith("3 steps take ")
    assert data["end"] == max(band["end"] for band in data["bands"]) == 27
    stage, step, kind, start, end, name, tip = data["bands"][0]["pieces"][0]
    assert (stage, step, kind, start, end, name) == (0, 0, "F", 0, 1, "0")
    assert data["tips"][tip] == "micro-batch 0, segment 0: forward"


def test_a_title_says_what_is_drawn(tmp_path, capsys):
    bands = data_of(write_page(tmp_path, "--steps", "1", "--head", "0.5"))["bands"]
    assert bands[0]["note"] == "one step takes 7.5; in a long run 7 a step, idle 7%"
    assert bands[0]["end"] == 7.5


def test_what_is_there_is_replaced_only_if_it_is_ours(tmp_path, capsys):
    page = write_page(tmp_path)
    write_page(tmp_path)
    page.write_text("<p>mine</p>")
    with pytest.raises(SystemExit):
        write_page(tmp_path)
    assert page.read_text() == "<p>mine</p>"


def test_it_works_in_a_browser(tmp_path, capsys):
    page = write_page(tmp_path)
    look = """
    const lanes = document.getElementById('lanes'), box = lanes.getBoundingClientRect();
    const tip = document.getElementById('tip');
    function point(x, y) {
      const at = {clientX: box.left + x, clientY: box.top + y};
      lanes.dispatchEvent(new MouseEvent('mousemove', at));
      show(tip.hidden ? 'nothing' : tip.textContent);
    }
    const wide = box.width - 70 - 16;
    point(70 + wide * 0.5 / 18, 34 + 13);
    point(70 + wide * 0.5 / 18, 34 + 26 + 13);
    point(5, 5);
    for (let n = 0; n < 3; n++) document.querySelector('[data-do=in]').click();
    document.querySelector('[data-do=on]').click();
    point(70, 34 + 13);
    const pixels = lanes.getContext('2d').getImageData(0, 0, lanes.width, lanes.height).data;
    show(new Set(new Uint32Array(pixels.buffer)).size > 10);
    """
    dom, complaints = opened(page, tmp_path, look)
    assert complaints == []
    first, second, nowhere, zoomed, drawn = shown(dom)
    assert first == "local · stage 0 · step 1 · micro-batch 0, segment 0: forward · 0 to 1 (1)"
    assert second == "local · stage 1 · idle · 0 to 1 (1)"
    assert nowhere == "nothing"
    # an eighth of 18 around the middle, moved on by a quarter of itself: begins at 8.4375
    what = "micro-batch 0, segment 0: backward, both gradients"
    assert zoomed == f"local · stage 0 · step 2 · {what} · 7 to 9 (2)"
    assert drawn == "true"


def test_a_page_is_marked_as_ours_and_data_cannot_end_it():
    text = pages.page("a < b", "<p>body</p>", data={"tip": "</script><!-- x"})
    assert pages.PAGE_MARK in text[:200]
    assert "<title>a &lt; b</title>" in text
    assert text.count("</script>") == 1
    held = re.search(r'id="data">(.*?)</script>', text).group(1)
    assert json.loads(held) == {"tip": "</script><!-- x"}
    assert "<!--" not in held


def test_numbers_that_json_does_not_know_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        pages.page("t", "", data=float("nan"))


def test_without_scripts_a_short_time_line_is_a_picture(monkeypatch):
    band = Band("t", "n", 1, [Piece(0, 0, "F", 0, 1, "0", "tip")])
    assert '<noscript><svg xmlns="http' in pages.timeline_page("t", "l", [band])
    monkeypatch.setattr(pages, "_STILL", 0)
    assert "<noscript>This page needs scripts.</noscript>" in pages.timeline_page("t", "l", [band])


def test_a_table_escapes_its_cells_and_its_heads():
    text = Element("pre")
    text.text = "<b>"
    assert pages.table([("a & b", ""), ("of", "n")], [["<i>", 1], [text, "-"]]) == (
        "<div class='box'><table><tr><th>a &amp; b</th><th class=\"n\">of</th></tr>"
        '<tr><td>&lt;i&gt;</td><td class="n">1</td></tr>'
        '<tr><td><pre>&lt;b&gt;</pre></td><td class="n">-</td></tr></table></div>'
    )
