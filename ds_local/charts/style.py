"""The colours of every picture and page, for light and dark screens."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = {
    "F": ("forward", "#4c78a8", "#ffffff"),
    "B": ("backward, both gradients", "#f2a541", "#1f2328"),
    "I": ("input gradient only", "#e45756", "#ffffff"),
    "W": ("weight gradient only", "#72b7b2", "#1f2328"),
    "U": ("update", "#9673c9", "#ffffff"),
}  # kind of an action -> (its name, its colour, the colour of a letter on it)

SERIES = ("#4c8dd6", "#e8862e", "#3fa66b", "#d65a5a", "#9673c9", "#a0785a", "#d977b8", "#7f8a94")

_LIGHT = {
    "card": "#ffffff",
    "edge": "#d0d7de",
    "track": "#eef1f4",
    "ink": "#1f2328",
    "faint": "#59636e",
    "page": "#f6f8fa",
}
_DARK = {
    "card": "#151b23",
    "edge": "#3d444d",
    "track": "#242c37",
    "ink": "#f0f6fc",
    "faint": "#9198a1",
    "page": "#0d1117",
}
_FILLS = ("card", "track", "ink", "faint")


def color_of(index: int, count: int) -> str:
    """Of one of `count` series in an order, as segments have one: from a list, or when there are
    too many for it from a scale between blue and orange."""
    if count <= len(SERIES):
        return SERIES[index]
    return f"hsl({215 + 175 * index / (count - 1):.0f} 62% 55%)"


_OF_SCHEMES = {"backprop": 0, "chunked": 1, "local": 2, "torch": 3, "DeepSpeed": 4, "mixed": 6}


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Colours of schemes and other pipelines, the same in every picture; where a picture shows
    several of a kind, the first has it and the others one of those left."""
    found: dict[str, str] = {}
    wanted = {
        name: SERIES[at] for name in names if (at := _OF_SCHEMES.get(_kind(name))) is not None
    }
    left = [color for color in reversed(SERIES) if color not in wanted.values()]
    for name in names:
        color = wanted.get(name)
        free = color is not None and color not in found.values()
        found[name] = color if free and color else left.pop(0) if left else SERIES[-1]
    return found


def color_of_kind(name: str) -> str:
    """Of all schemes that a name like this begins alike."""
    return SERIES[_OF_SCHEMES.get(_kind(name), 5)]


def _kind(name: str) -> str:
    return name.split()[0].rstrip(",") if name else ""


def _of_scheme(colors: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{colors[name]}}}" for name in _FILLS)
    return (
        fills
        + f".card{{stroke:{colors['edge']}}}.rule{{stroke:{colors['edge']}}}"
        + f".gap{{stroke:{colors['card']}}}.strong{{stroke:{colors['ink']}}}"
    )


def _css() -> str:
    kinds = "".join(
        f".{kind}{{fill:{color}}}.on{kind}{{fill:{ink}}}" for kind, (_, color, ink) in KINDS.items()
    )
    fixed = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        ".title{font-weight:600}.late{opacity:.62}.dash{stroke-dasharray:3 3}"
    )
    dark = f"@media (prefers-color-scheme:dark){{{_of_scheme(_DARK)}}}"
    return fixed + _of_scheme(_LIGHT) + kinds + dark


CSS = _css()  # of SVG elements, in a file of its own or inside a page


def page_variables() -> str:
    """The same colours as CSS variables, for pages."""

    def block(colors: dict[str, str]) -> str:
        return ":root{" + "".join(f"--{name}:{color};" for name, color in colors.items()) + "}"

    return (
        ":root{color-scheme:light dark}"
        + block(_LIGHT)
        + f"@media (prefers-color-scheme:dark){{{block(_DARK)}}}"
    )
