"""Pages of one file each, which need nothing else and no network, and tables in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from ds_local.charts.style import CSS, KINDS, page_variables
from ds_local.charts.timelines import Band, draw_bands

PAGE_MARK = "written by ds_local"  # near the beginning of every page
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:14px/1.5 system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}
.lead{color:var(--faint);margin:0 0 16px}
.box{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:10px;
  margin:0 0 14px;overflow-x:auto}
.box>svg{display:block;width:100%;height:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:14px}
.pair{margin:0 0 14px}.pair>.box{margin:0}
table{border-collapse:collapse}td,th{padding:3px 12px 3px 0;text-align:left;vertical-align:top}
th{color:var(--faint);font-weight:500}td.n,th.n{text-align:right}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;margin:0}
summary{cursor:pointer;color:var(--faint)}
td.bad{color:#d65a5a;font-weight:600}
#tip{position:absolute;z-index:9;background:var(--ink);color:var(--card);border-radius:5px;
  padding:4px 8px;font-size:12.5px;pointer-events:none;white-space:pre}
#lanes{width:100%;display:block;cursor:crosshair}
button{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--edge);
  border-radius:6px;padding:3px 12px;margin-right:6px;cursor:pointer}
.keys span{display:inline-block;margin-right:18px}
.keys i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px}
"""


def page(title: str, body: str, script: str = "", data: Any = None) -> str:
    """A whole page.

    Args:
        body: HTML.
        script: name of a file beside this one, which finds `data` in the element #data.
    """
    code = f"<script>{(Path(__file__).parent / script).read_text()}</script>" if script else ""
    kept = (
        "" if data is None else f'<script type="application/json" id="data">{_json(data)}</script>'
    )
    return (
        f'<!doctype html>\n<!-- {PAGE_MARK} -->\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{page_variables()}{_CSS}{CSS}</style></head>\n"
        f'<body><main>{body}</main><div id="tip" hidden></div>{kept}{code}</body></html>\n'
    )


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box, as HTML.

    Args:
        columns: (head, class of the cells), "n" for numbers.
        rows: cells, texts or elements.
    """
    made = Element("table")
    for tag, cells in (("th", [head for head, _ in columns]), *(("td", row) for row in rows)):
        line = SubElement(made, "tr")
        for (_, kind), cell in zip(columns, cells, strict=True):
            place = SubElement(line, tag, {"class": kind} if kind else {})
            if isinstance(cell, Element):
                place.append(cell)
            else:
                place.text = str(cell)
    return f"<div class='box'>{tostring(made, 'unicode', method='html')}</div>"


_STILL = 5_000  # pieces of a still picture


def timeline_page(title: str, lead: str, bands: Sequence[Band]) -> str:
    """Bands to zoom and to point at. Without scripts they are a still picture."""
    tips: dict[str, int] = {}
    shown = [
        {
            "title": band.title,
            "note": band.note,
            "stages": band.num_stages,
            "end": max(p.end for p in band.pieces),
            "pieces": [(*p[:6], tips.setdefault(p.tip, len(tips))) for p in band.pieces],
        }
        for band in bands
    ]
    kinds = {piece.kind for band in bands for piece in band.pieces}
    keys = "".join(
        f'<span><i style="background:{color}"></i>{kind} {name}</span>'
        for kind, (name, color, _) in KINDS.items()
        if kind in kinds
    )
    buttons = "".join(
        f'<button data-do="{action}" aria-label="{name}">{sign}</button>'
        for action, name, sign in (
            ("in", "zoom in", "+"),
            ("out", "zoom out", "\u2212"),
            ("back", "earlier", "\u2190"),
            ("on", "later", "\u2192"),
            ("whole", "all", "all"),
        )
    )
    few = sum(len(band.pieces) for band in bands) <= _STILL
    still = draw_bands(bands, title, 1140).inline() if few else "This page needs scripts."
    body = (
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"
        f"<p>{buttons}</p><div class='box'><canvas id='lanes'></canvas><noscript>{still}</noscript>"
        f"</div><p class='keys'>{keys}<span><i style='background:var(--track)'></i>idle</span></p>"
    )
    end = max(piece.end for band in bands for piece in band.pieces)
    data = {"bands": shown, "kinds": KINDS, "tips": list(tips), "end": end}
    return page(title, body, "timeline.js", data)


def _json(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")
