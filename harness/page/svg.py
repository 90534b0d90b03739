"""Elements of SVG, each escaped where it is made: an arm or a prompt may be called `<b>`.

All of it is `Markup`, so the page's template takes a drawing as it is. A drawing stands alone as a file too.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

INK, GRID = "#222222", "#DDDDDD"
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"


def element(name: str, *inside: str, **attributes: float | str) -> Markup:
    """`stroke_width` is written as `stroke-width`, and a float to a tenth."""
    written = "".join(
        f' {key.replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}>{Markup().join(inside)}</{name}>")


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
    fill: str = INK,
    **more: str,
) -> Markup:
    return element(
        "text", words, x=x, y=y, text_anchor=anchor, font_size=size, font_weight=weight, fill=fill, **more
    )


def drawing(width: float, height: float, title: str, parts: Sequence[Markup]) -> Markup:
    """A whole `<svg>` on white. `title` is what a screen reader says."""
    return element(
        "svg",
        element("title", title),
        element("rect", width=width, height=height, fill="#FFFFFF"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        font_family=_FONT,
    )
