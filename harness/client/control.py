"""Calls beside the measured ones: is the server ready, what does it run, what did its steps look like.

They use httpx and are never made while answers stream, but for `/metrics` of a foreign server, once a
second. A server that is not ours gives None.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic_core import from_json

from adapters.base import LabError
from harness.client.target import root_path
from services.contract.status import Health, ModelCard, StepLine, Steps

_NUM_ROUND_TRIPS = 5
_MAX_PAGE_BYTES = 1 << 20


class Control:
    """An httpx client of one server."""

    def __init__(self, base_url: str, authorization: str | None = None) -> None:
        headers = {"Authorization": authorization} if authorization else {}
        # Proxies of the environment are for the web, not for a server under test.
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=10.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def health(self) -> Health | None:
        """The state of a service of ours; None while nothing answers."""
        try:
            return Health.model_validate_json(self._client.get("/health", timeout=2.0).content)
        except (httpx.HTTPError, ValueError):
            return None

    def round_trip_s(self) -> float | None:
        """The median of a few calls that cost the server next to nothing; None where they fail."""
        times: list[float] = []
        try:
            for _ in range(_NUM_ROUND_TRIPS + 1):
                started_s = perf_counter()
                self._client.get("/health")
                times.append(perf_counter() - started_s)
        except httpx.HTTPError:
            return None
        return median(times[1:])  # the first one opened the connection

    def model_card(self) -> ModelCard | None:
        """What a service of ours runs; None for a foreign server.

        Raises:
            LabError: nothing answers at all.
        """
        try:
            response = self._client.get("/model")
        except httpx.HTTPError as error:
            raise LabError(f"no server answers at {self._client.base_url}: {error}") from error
        try:
            return ModelCard.model_validate_json(response.content) if response.is_success else None
        except ValueError:
            return None

    def page(self, path: str, until_s: float) -> Any:
        """What a foreign server has at `path`: decoded JSON, or text that is none.

        None where nothing is to be had before `until_s`, on the clock of `time.perf_counter`.
        """
        left_s = until_s - perf_counter()
        if left_s <= 0:
            return None
        body = b""
        try:
            url = self._client.base_url.copy_with(path=path)
            with self._client.stream("GET", url, timeout=left_s) as response:
                if not response.is_success:
                    return None
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > _MAX_PAGE_BYTES or perf_counter() > until_s:
                        return None
        except httpx.HTTPError:
            return None
        try:
            return from_json(body)
        except ValueError:
            return body.decode("utf-8", "replace")

    def metrics_text(self) -> str:
        """`/metrics` of a foreign server, which stands beside its `/v1`.

        Raises:
            LookupError: it gives none; the message says why.
        """
        url = self._client.base_url
        path = root_path(url.path.rstrip("/"))
        try:
            response = self._client.get(url.copy_with(path=f"{path}/metrics"), timeout=2.0)
        except httpx.HTTPError as error:
            raise LookupError(f"its /metrics does not answer ({type(error).__name__})") from error
        if not response.is_success:
            raise LookupError(f"its /metrics answers {response.status_code}")
        return response.text

    def next_step(self) -> int | None:
        """The number that the next step will get; None where there is no step log."""
        page = self._steps(2**31 - 1)
        return page.next if page else None

    def steps_since(self, first: int) -> tuple[list[StepLine], int]:
        """All steps from `first` on that the log still holds, and how many it has lost."""
        lines: list[StepLine] = []
        num_dropped = 0
        while (page := self._steps(first)) is not None:
            num_dropped += page.num_dropped
            lines.extend(page.steps)
            if not page.steps or page.next <= first:
                break
            first = page.next
        return lines, num_dropped

    def _steps(self, after: int) -> Steps | None:
        try:
            response = self._client.get("/steps", params={"after": after})
            return Steps.model_validate_json(response.content) if response.is_success else None
        except (httpx.HTTPError, ValueError):
            return None
