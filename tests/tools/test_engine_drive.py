"""Prompts through the engine without HTTP, on the backend that has no weights."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.base import BackendConfig
from adapters.null_backend import NullBackend
from services.engine.spec import EngineSpec
from tools.engine_drive import Work, drive, drive_spec


@pytest.mark.parametrize(
    ("variant", "most_rows"), [("baseline", 1), ("static", 2), ("dynamic", 2), ("continuous", 2)]
)
def test_all_prompts_are_answered(variant: str, most_rows: int) -> None:
    backend = NullBackend(BackendConfig(max_batch_size=4, max_model_len=64))
    tokens: dict[int, int] = {}
    rows: list[int] = []

    def watch(report: Any) -> None:
        for update in report.updates:
            tokens[update.seq_id] = tokens.get(update.seq_id, 0) + len(update.token_ids)
        if report.record:
            rows.append(report.record.num_rows)

    work = [Work([1, 2, 3], max_tokens) for max_tokens in (3, 5, 2, 4, 6)]
    drive(backend, variant, work, max_batch=2, publish=watch)
    assert tokens == dict(enumerate([3, 5, 2, 4, 6]))
    assert max(rows) == most_rows


def test_one_at_a_time_nobody_waits() -> None:
    config = BackendConfig(max_batch_size=4, max_model_len=64)
    seen: list[tuple[int, int]] = []
    tokens: dict[int, int] = {}

    def watch(report: Any) -> None:
        seen.append((report.num_running, report.queue_depth))
        for update in report.updates:
            tokens[update.seq_id] = tokens.get(update.seq_id, 0) + len(update.token_ids)

    work = [Work([1, 2, 3], max_tokens) for max_tokens in (3, 1, 2)]
    drive_spec(NullBackend(config), EngineSpec("static", config), work, watch, one_at_a_time=True)
    assert tokens == {0: 3, 1: 1, 2: 2}
    assert set(seen) == {(1, 0), (0, 0)}
