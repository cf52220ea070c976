"""A drawing as SVG text."""

from __future__ import annotations

from html import escape
from typing import Any

from ds_local.charts.style import CSS


class Svg:
    """A drawing of `width` x `height` units. Elements are styled by the classes of `style.CSS`.

    Args:
        label: what is to be seen, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.data: dict[str, Any] | None = None  # of a chart whose values a page shows
        self._parts: list[str] = []

    def add(self, tag: str, body: str = "", **attributes: float | str | None) -> None:
        """An element; `cls` is its class, underscores in names become hyphens, None is left
        out."""
        named = (
            f' {"class" if name == "cls" else name.replace("_", "-")}="{_value(value)}"'
            for name, value in attributes.items()
            if value is not None
        )
        self._parts.append(f"<{tag}{''.join(named)}" + (f">{body}</{tag}>" if body else "/>"))

    def rect(
        self, x: float, y: float, w: float, h: float, tip: str = "", **more: float | str | None
    ) -> None:
        body = f"<title>{escape(tip)}</title>" if tip else ""
        self.add("rect", body, x=x, y=y, width=max(w, 0.0), height=h, **more)

    def text(
        self,
        x: float,
        y: float,
        text: object,
        size: float = 12,
        cls: str = "ink",
        anchor: str | None = None,
        **more: float | str | None,
    ) -> None:
        self.add(
            "text", escape(str(text)), x=x, y=y, font_size=size, cls=cls, text_anchor=anchor, **more
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, **more: float | str | None) -> None:
        more.setdefault("cls", "rule")
        self.add("line", "", x1=x1, y1=y1, x2=x2, y2=y2, **more)

    def embed(self, other: Svg, x: float, y: float) -> None:
        """Another drawing as a part of this one, which becomes high enough for it."""
        body = "".join(other._parts)
        self._parts.append(f'<g transform="translate({_value(x)} {_value(y)})">{body}</g>')
        self.height = max(self.height, y + other.height)

    def inline(self) -> str:
        """For a page that has the style already."""
        body = "".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_value(self.width)} '
            f'{_value(self.height)}" role="img" aria-label="{escape(self.label)}">{body}</svg>'
        )

    def file(self) -> str:
        """As a file of its own, on a card that is light or dark as the screen is."""
        card = Svg(self.width, self.height, self.label)
        card.add("style", CSS)
        card.rect(0.5, 0.5, self.width - 1, self.height - 1, rx=8, cls="card")
        card._parts += self._parts
        sized = f'<svg width="{_value(self.width)}" height="{_value(self.height)}" '
        return card.inline().replace("<svg ", sized, 1) + "\n"


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text is."""
    return 0.56 * size * len(text)


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".")
