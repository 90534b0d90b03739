"""Where the corpus and its material lie: in `data` of a checkout, inside this package once installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "data"

DATA = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent / "data"
