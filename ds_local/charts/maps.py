"""Maps: a cell for each pair of conditions, in the colour of what is best there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ds_local.charts.style import SERIES, colors_of
from ds_local.charts.svg import Svg, text_width


class Panel(NamedTuple):
    """One map: `cells[row][column]` are values by name, the least is best."""

    title: str
    cells: Sequence[Sequence[Mapping[str, float]]]


def best(values: Mapping[str, float]) -> str:
    """The name with the least value, the first of equals."""
    return min(values, key=lambda name: values[name])


def draw_map(
    title: str,
    panels: Sequence[Panel],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    value: str,
    width: float = 860,
) -> Svg:
    """Panels beside each other, a row and a column for each condition; in a cell stands the best
    value.

    Args:
        rows, columns: name of the axis, and of each row from the bottom, column from the left.
        value: what the numbers are.
    """
    won = {best(cell) for panel in panels for row in panel.cells for cell in row}
    names = [name for name in panels[0].cells[0][0] if name in won]
    colors = colors_of(names)
    left, top, gap = 54.0, 84.0, 16.0
    cell_w = (width - left - 14 - gap * (len(panels) - 1)) / len(panels) / len(columns[1])
    cell_h = 27.0
    svg = Svg(width, top + cell_h * len(rows[1]) + 64, title)
    svg.text(16, 24, title, 14, "ink title")
    at = 16.0
    for name in names:
        svg.rect(at, 38, 12, 12, rx=2, fill=colors[name])
        svg.text(at + 17, 48.5, name)
        at += 17 + text_width(name) + 22
    bottom = top + cell_h * len(rows[1])
    for n, label in enumerate(rows[1]):
        svg.text(left - 8, bottom - n * cell_h - 9, label, 11, "faint", "end")
    svg.text(16, bottom + 34, f"up: {rows[0]}; to the right: {columns[0]}", 11.5, "faint")
    svg.text(16, bottom + 51, f"in the cells: {value}", 11.5, "faint")
    for number, panel in enumerate(panels):
        x0 = left + number * (cell_w * len(columns[1]) + gap)
        svg.text(x0, top - 8, panel.title, 12.5, "ink title")
        for n, label in enumerate(columns[1]):
            svg.text(x0 + (n + 0.5) * cell_w, bottom + 14, label, 10.5, "faint", "middle")
        for n, row in enumerate(panel.cells):
            for m, cell in enumerate(row):
                name, x, y = best(cell), x0 + m * cell_w, bottom - (n + 1) * cell_h
                tip = ", ".join(f"{other}: {value:.2f}" for other, value in cell.items())
                svg.rect(x + 0.5, y + 0.5, cell_w - 1, cell_h - 1, tip, fill=colors[name], rx=2)
                text = f"{cell[name]:.2f}".removeprefix("0")
                ink = "onB" if colors[name] == SERIES[1] else "onF"
                svg.text(x + cell_w / 2, y + 17, text, 10.5, ink, "middle")
    return svg
