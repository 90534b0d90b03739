"""`make dash-pictures`: each dashboard of a running Grafana as a person sees it, through a headless Chromium.

A panel that is out of the window is never drawn, so the window is as tall as the dashboard.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from adapters.base import ConfigError, LabError
from harness.results.output_dir import make_folder
from tools.dashboards.live import LIVE
from tools.dashboards.panels import Json
from tools.dashboards.results import RESULTS

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 20_000
"""Of the page's own time, for its queries to be answered and drawn."""
ROW_PX = 38
HEAD_PX = 120
VIEWS = {"wide": (1600, "light"), "dark": (1600, "dark"), "phone": (420, "light")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make dash-pictures", description=__doc__)
    parser.add_argument("--grafana", default="http://localhost:3000", metavar="URL")
    parser.add_argument("--out", type=Path, default=Path("results/dashboards"), metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        program = next(filter(None, map(shutil.which, CHROMIUM)), None)
        if program is None:
            raise ConfigError("needs Chromium: on Debian `apt-get install chromium`")
        _check_answers(args.grafana)
        make_folder(args.out)
        for board in (LIVE, RESULTS):
            for view in VIEWS:
                print(take(program, args.grafana, board, view, args.out), flush=True)
    except LabError as error:
        print(f"dash-pictures: {error}", file=sys.stderr)
        return 2
    return 0


def take(program: str, grafana: str, board: Json, view: str, out: Path) -> Path:
    """
    Raises:
        LabError: Chromium made no picture.
    """
    width, theme = VIEWS[view]
    path = (out / f"{board['uid']}-{view}.png").resolve()
    path.unlink(missing_ok=True)
    words = [program, "--headless", "--no-sandbox", "--hide-scrollbars", f"--virtual-time-budget={WAIT_MS}"]
    words += [f"--window-size={width},{height(board, is_narrow=view == 'phone')}", f"--screenshot={path}"]
    url = f"{grafana.rstrip('/')}/d/{board['uid']}?kiosk&theme={theme}"
    made = subprocess.run([*words, url], capture_output=True, text=True, timeout=180, check=False)
    if not path.exists():
        raise LabError(f"no picture of {url}: {made.stderr.strip().splitlines()[-1:]}")
    return path


def _check_answers(grafana: str) -> None:
    """
    Raises:
        ConfigError: no Grafana answers there, of which Chromium would take a picture too.
    """
    try:
        httpx.get(f"{grafana.rstrip('/')}/api/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no Grafana answers at {grafana}: {error}") from error


def height(board: Json, *, is_narrow: bool) -> int:
    """In pixels. In a narrow window panels stand below one another."""
    grids = [panel["gridPos"] for panel in board["panels"]]
    rows: int = sum(g["h"] for g in grids) if is_narrow else max(g["y"] + g["h"] for g in grids)
    return HEAD_PX + ROW_PX * rows


if __name__ == "__main__":
    sys.exit(main())
