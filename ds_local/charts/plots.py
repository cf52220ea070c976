"""Curves and bars, with the names beside what they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ds_local.charts.svg import Svg, text_width

Place = Callable[[float, float], tuple[float, float]]  # from values to the drawing


class Curve(NamedTuple):
    """Points (x, y) of one series, in the order of x; a y of None breaks the line."""

    name: str
    color: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False  # a few measurements, not a line of many
    spread: Sequence[
        tuple[float, float]
    ] = ()  # (lowest, highest) of each point, if there are several


class Mark(NamedTuple):
    """Something that happened at one x."""

    x: float
    text: str
    bad: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """(value, text) of round numbers from `low` to `high`."""
    if not high > low:
        return [(low, number(low))]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [(n * step, number(n * step, step)) for n in range(first, last + 1)]


def number(value: float, step: float | None = None) -> str:
    """Short, with thousands and millions as k and M."""
    size = max(abs(value), abs(step or 0))
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = {"G": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{value / unit:.6g}{letter}" if value else "0"
    if value and size < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{round(value, 10):.6g}"


def legend(svg: Svg, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """Squares with names, (class of the square, name), in as many lines as they need; the drawing
    becomes as high as that."""
    at = x
    for cls, name in entries:
        wide = 17 + text_width(name) + 14
        if at > x and at + wide > svg.width:
            at, y = x, y + 19
        svg.rect(at, y, 12, 12, rx=2, cls=cls)
        svg.text(at + 17, y + 10.5, name, 12, "ink")
        at += wide
    svg.height = max(svg.height, y + 24)


def chart(
    title: str,
    curves: Sequence[Curve],
    x_name: str,
    y_name: str,
    marks: Sequence[Mark] = (),
    size: tuple[float, float] = (860, 280),
    y_range: tuple[float | None, float | None] = (None, None),
    percent: bool = False,
    shades: Sequence[tuple[float, float, str]] = (),
    x_ticks: Sequence[tuple[float, str]] = (),
) -> Svg:
    """Curves over one axis, each with its name at its end.

    Args:
        marks: vertical lines; bad ones are crosses at the bottom.
        y_range: ends of the y axis, None: from the data.
        percent: y is a share.
        shades: (from x, to x, name) of stretches to tell apart.
        x_ticks: (x, text); default round numbers.
    """
    width, height = size
    shown = [c for c in curves if any(y is not None for _, y in c.points)]
    longest = max((text_width(c.name, 11.5) for c in shown), default=0)
    left, right, top, bottom = 58, longest + 22, 50, 40
    svg = Svg(width, height, title)
    svg.text(16, 22, title, 14, "ink title")
    svg.text(16, 40, y_name, 11, "faint")
    if not shown:
        svg.text(width / 2, height / 2, "nothing was measured", 12, "faint", "middle")
        return svg
    xs = [x for c in shown for x, _ in c.points] + [m.x for m in marks]
    xs += [x for shade in shades for x in shade[:2]]
    ys = [y for c in shown for _, y in c.points if y is not None]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _ends(ys, y_range)
    across = (width - left - right) / ((x_high - x_low) or 1)
    up = (height - top - bottom) / ((y_high - y_low) or 1)

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, y_low), y_high)
        return left + (x - x_low) * across, height - bottom - (inside - y_low) * up

    for odd, (start, stop, name) in enumerate(shades):
        x0, x1 = place(start, y_low)[0], place(stop, y_low)[0]
        if odd % 2 == 0:
            svg.rect(x0, top, x1 - x0, height - top - bottom, cls="track")
        svg.text(x0 + 5, height - bottom - 7, _fit(name, x1 - x0 - 8, 11), 11, "faint")
    for y, text in ticks(y_low, y_high, int(height / 45)):
        at = place(x_low, y)[1]
        svg.line(left, at, width - right, at)
        shown_text = f"{y:.0%}" if percent else text
        svg.text(left - 7, at + 4, shown_text, 11, "faint", "end")
    for x, text in x_ticks or ticks(x_low, x_high, 8):
        at = place(x, y_low)[0]
        svg.line(at, height - bottom, at, height - bottom + 4)
        svg.text(at, height - bottom + 17, text, 11, "faint", "middle")
    svg.text(width - right, height - 8, x_name, 11, "faint", "end")
    for mark in marks:
        at = place(mark.x, y_low)[0]
        if mark.bad:
            svg.text(at, height - bottom - 4, "\u00d7", 17, "I", "middle")
        else:
            svg.line(at, top, at, height - bottom, cls="rule dash")
    for curve in shown:
        _curve(svg, curve, place)
    svg.data = {
        "width": width,
        "left": left,
        "right": width - right,
        "top": top,
        "bottom": height - bottom,
        "from": x_low,
        "to": x_high,
        "x": x_name,
        "percent": percent,
        "curves": [{"name": _full_name(c), "points": c.points} for c in shown],
    }
    _names(svg, shown, place, width - right + 6, (top, height - bottom))
    return svg


def _full_name(curve: Curve) -> str:
    return f"{curve.name} measured" if curve.dots and curve.name else curve.name


def _curve(svg: Svg, curve: Curve, place: Place) -> None:
    parts, pen = [], "M"
    for (x, _), (low, high) in zip(curve.points, curve.spread, strict=False):
        (at, bottom), (_, top) = place(x, low), place(x, high)
        svg.line(at, bottom, at, top, cls=None, stroke=curve.color, stroke_width=1.2)
    for x, y in curve.points:
        if y is None:
            pen = "M"
            continue
        px, py = place(x, y)
        parts.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
        if curve.dots:
            svg.add("circle", cx=px, cy=py, r=3.2, fill=curve.color)
    opacity = None if curve.dots else 0.75
    wide = 1.8 if curve.dots else 1.3
    svg.add(
        "path",
        d="".join(parts),
        fill="none",
        stroke=curve.color,
        stroke_width=wide,
        stroke_opacity=opacity,
        stroke_linejoin="round",
    )


def _names(
    svg: Svg, curves: Sequence[Curve], place: Place, x: float, limits: tuple[float, float]
) -> None:
    """Names at the ends of the curves, moved apart where they would lie on each other."""
    ends = []
    for curve in curves:
        last = next(((x, y) for x, y in reversed(curve.points) if y is not None), None)
        if last is not None and curve.name:
            ends.append((place(*last)[1] + 4, curve))
    ends.sort(key=lambda end: end[0])
    step = min(14.0, (limits[1] - limits[0]) / max(len(ends), 1))
    ys: list[float] = []
    for y, _ in ends:
        ys.append(max(y, ys[-1] + step) if ys else y)
    overflow = ys[-1] - limits[1] if ys else 0.0
    for n in reversed(range(len(ys))):
        if overflow > 0:
            ys[n] -= overflow
            overflow = ys[n - 1] + step - ys[n] if n else 0.0
    for y, (_, curve) in zip(ys, ends, strict=True):
        svg.add("text", curve.name, x=x, y=y, font_size=11.5, fill=curve.color)


def bars(
    title: str,
    names: Sequence[str],
    parts: Sequence[Sequence[tuple[str, float, str]]],
    unit: str,
    width: float = 860,
    entries: Sequence[tuple[str, str]] = (),
) -> Svg:
    """A bar a name, each made of parts (class, value, tip).

    Args:
        unit: name of the x axis.
        entries: of the legend.
    """
    row, top, left = 24, 38, 90
    height = top + row * len(names) + 44 + (22 if entries else 0)
    svg = Svg(width, height, title)
    svg.text(16, 22, title, 14, "ink title")
    longest = max((sum(v for _, v, _ in one) for one in parts), default=0.0) or 1.0
    scale = (width - left - 24) / longest
    for n, (name, one) in enumerate(zip(names, parts, strict=True)):
        y, x = top + n * row, float(left)
        svg.text(left - 8, y + 16, name, 11.5, "faint", "end")
        for cls, value, tip in one:
            svg.rect(x, y + 3, value * scale, row - 6, tip, rx=2, cls=cls)
            x += value * scale
    base = top + row * len(names)
    for tick, text in ticks(0.0, longest, 8):
        svg.line(left + tick * scale, base, left + tick * scale, base + 5)
        svg.text(left + tick * scale, base + 17, text, 11, "faint", "middle")
    svg.text(width - 24, base + 32, unit, 11, "faint", "end")
    if entries:
        legend(svg, left, base + 38, entries)
    return svg


def _ends(ys: Sequence[float], asked: tuple[float | None, float | None]) -> tuple[float, float]:
    """Of the y axis: a rare peak, as at the start of a run, does not flatten all the rest."""
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return (
        low - room if asked[0] is None else asked[0],
        high + room if asked[1] is None else asked[1],
    )


def _fit(text: str, width: float, size: float) -> str:
    """As much of a text as there is room for."""
    most = int(width / (0.56 * size))
    return text if len(text) <= most else text[: max(most - 1, 0)] + "\u2026" if most > 3 else ""
