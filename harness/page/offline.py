"""What a page needs to open offline: its template, and the library that draws, both inside the page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def templates(folder: Path) -> Environment:
    """Whatever comes from outside is escaped; a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


@cache
def vega() -> Markup:
    """Vega, Vega-Lite and Vega-Embed; 0.9 MB."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return Markup(re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE))
