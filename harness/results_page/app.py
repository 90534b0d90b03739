"""The page and its API over HTTP. Only GET, only on this machine, and nothing that a file says is run.

A browser tab of another site may send requests to a port of this machine, so a name of the host that is not
this machine's is refused, and no other site may read an answer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from adapters.base import LabError
from harness.comparing.combine import read_result
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.data import ReportData, load_report
from harness.page.explanations import PHASE_COLOURS
from harness.page.files import TEMPLATES, render_page
from harness.page.summary import as_json
from harness.results.cost import read_price
from harness.results.manifest import ComparisonManifest
from harness.results.slo import Slo
from harness.results_page.index import COLUMNS, ResultIndex
from harness.results_page.live import LiveSteps

HOSTS = ["127.0.0.1", "localhost", "[::1]"]
MAX_FILES = 20
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "script-src 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Ids = Annotated[list[str], Query(alias="id", min_length=1, max_length=MAX_FILES)]


def make_app(folder: Path, live: LiveSteps | None = None) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    index = ResultIndex(folder)

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    def page() -> HTMLResponse:
        told = {"folder": str(folder), "columns": COLUMNS[1:], "is_live": bool(live), "phases": PHASE_COLOURS}
        return HTMLResponse(TEMPLATES.get_template("results.html.j2").render(told, lines=index.search()))

    @app.get("/api/results")
    def results(text: str = "", level: str = "", model: str = "", format: str = "json") -> Response:
        lines = index.search(text, level, model)
        return Response(to_csv(lines), media_type="text/csv") if format == "csv" else JSONResponse(lines)

    @app.get("/api/live")
    def live_steps(after: Annotated[int | None, Query(ge=0, lt=2**53)] = None) -> JSONResponse:
        if live is None:
            raise HTTPException(404, "nothing is watched: lab results --watch URL")
        return JSONResponse(live.since(after))

    def loaded(ids: list[str]) -> ReportData:
        known = {line["id"]: path for path, line in index.read()}
        if not known.keys() >= set(ids):
            raise HTTPException(404, "no such result")
        paths = [known[file_id] for file_id in ids]
        try:
            files = [read_result(path) for path in paths]
            # Pictures of steps are read from beside the file, wherever it says that it was written.
            for file, path in zip(files, paths, strict=True):
                told = file.manifest
                for run in told.runs if isinstance(told, ComparisonManifest) else [told]:
                    run.path = _beside(run.path, path, folder)
            price = read_price(None, None)
            return load_report(files, slo=Slo(), price=price, reference=None, margin=DEFAULT_MARGIN)
        except LabError as error:
            raise HTTPException(422, str(error)) from error
        except Exception as error:  # rows and manifests of others may hold anything
            raise HTTPException(422, f"cannot be shown: {type(error).__name__}") from error

    @app.get("/report")
    def report(ids: Ids) -> HTMLResponse:
        return HTMLResponse(render_page(loaded(ids)).encode(errors="replace"))

    @app.get("/api/report")
    def report_json(ids: Ids) -> JSONResponse:
        return JSONResponse(as_json(loaded(ids)))

    return app


def _beside(told: str | None, path: Path, folder: Path) -> str:
    """Where the file of a run is: the place that it tells, if that is inside the folder."""
    there = Path(told or path).resolve()
    return str(there if there.is_relative_to(folder.resolve()) else path)


def to_csv(lines: list[dict[str, str]]) -> str:
    """A cell that a spreadsheet would take for a formula begins with an apostrophe."""
    written = io.StringIO()
    table = csv.DictWriter(written, COLUMNS)
    table.writeheader()
    for line in lines:
        table.writerow({n: f"'{v}" if v[:1] in ("=", "+", "-", "@", "\t") else v for n, v in line.items()})
    return written.getvalue()
