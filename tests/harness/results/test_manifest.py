"""Manifests of every age come back whole, and what is none is told in one sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import LabError
from harness.results.manifest import ComparisonManifest, RunManifest, read_manifest
from harness.results.record import MANIFEST_KEY
from tests.harness.made_rows import made_manifest, made_row

MEASURED = Path(__file__).parents[3] / "docs" / "measured" / "compare-lab-26m.parquet"
RAW: bytes = pq.read_schema(MEASURED).metadata[MANIFEST_KEY]


def first_run() -> dict[str, Any]:
    run: dict[str, Any] = json.loads(RAW)["runs"][0]
    return run


def read_run(facts: dict[str, Any]) -> RunManifest:
    manifest = read_manifest(json.dumps(facts).encode())
    assert isinstance(manifest, RunManifest)
    return manifest


def test_a_file_written_before_comes_back_key_for_key() -> None:
    manifest = read_manifest(RAW)
    assert isinstance(manifest, ComparisonManifest)
    assert json.loads(manifest.to_json()) == json.loads(RAW)
    first = manifest.runs[0]
    assert first.service is not None
    assert (first.service.backend, first.service.strategy["max_batch"]) == ("torch", 16)
    assert first.engine_text == "torch on cpu, bfloat16, 1 engine thread(s)"
    assert first.schedule.load.concurrency == 16


def test_a_run_comes_back() -> None:
    manifest = made_manifest([made_row()])
    assert read_manifest(manifest.to_json()) == manifest


def test_keys_that_came_later_may_be_missing() -> None:
    facts = first_run()
    for name in ("shape", "shard", "part_digest"):
        del facts["schedule"][name]
    for name in ("floor", "path"):
        del facts[name]
    del facts["repeats"][0]["round_trip_s"]
    for name in ("start_at", "processes", "floor"):
        del facts["settings"][name]
    manifest = read_run(facts)
    assert (manifest.schedule.shard, manifest.schedule.part_digest, manifest.floor) == ((0, 1), None, None)
    assert json.loads(manifest.to_json()) == facts


def test_keys_that_are_not_known_are_kept() -> None:
    facts = first_run() | {"weather": "fine"}
    facts["host"]["kernel"] = {"release": "9.1"}
    facts["repeats"][0]["steps"]["num_preempted"] = 3
    facts["schedule"]["shape"] = {"burst": 2.0}
    assert json.loads(read_run(facts).to_json()) == facts


def test_what_was_set_in_memory_alone_is_not_written() -> None:
    manifest = made_manifest([made_row()])
    manifest.own_arm, manifest.file = "static", "a.parquet"
    assert not {"own_arm", "file"} & json.loads(manifest.to_json()).keys()


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, "schema_version: Field required"),
        ([], "all of it: Input should be a valid dictionary"),
        (first_run() | {"schema_version": 99}, "schema_version: Input should be less than or equal to 1"),
        (first_run() | {"repeats": [{"repeat": 0}]}, "repeats.0.ended_at: Field required"),
        (
            first_run() | {"started_at": "2026-01-1T00:01:00+00:00"},
            "started_at: Value error, Invalid isoformat",
        ),
        (
            first_run() | {"started_at": "2026-01-01T00:01:00"},
            "started_at: Value error, '2026-01-01T00:01:00' has",
        ),
        (json.loads(RAW) | {"runs": []}, "runs: List should have at least 1 item"),
        (
            first_run() | {"schedule": first_run()["schedule"] | {"arrivals": "poisson"}},
            "schedule: Value error, an open loop has a rate",
        ),
        (
            first_run() | {"schedule": first_run()["schedule"] | {"arrivals": "tidal"}},
            "schedule.arrivals: Input should be 'closed'",
        ),
    ],
)
def test_what_is_no_manifest_is_told_by_its_first_fault(facts: Any, sentence: str) -> None:
    with pytest.raises(LabError) as caught:
        read_manifest(json.dumps(facts).encode())
    assert f"the manifest cannot be read: {sentence}" in str(caught.value)
    assert "\n" not in str(caught.value)


SMALL = json.dumps(json.loads(RAW) | {"runs": [first_run()]}).encode()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=4,
)


def check_readable(raw: bytes) -> None:
    """Nothing but a LabError is raised; what is read can be written and read again."""
    with suppress(LabError):
        manifest = read_manifest(raw)
        assert read_manifest(manifest.to_json()).schema_version == manifest.schema_version


@given(end=st.integers(0, len(SMALL)))
def test_a_manifest_that_was_cut_off(end: int) -> None:
    check_readable(SMALL[:end])


@given(at=st.integers(0, len(SMALL) - 1), put=st.binary(max_size=4), num=st.integers(0, 40))
def test_a_manifest_with_other_bytes_in_it(at: int, put: bytes, num: int) -> None:
    check_readable(SMALL[:at] + put + SMALL[at + num :])


@given(data=st.data(), value=VALUES)
def test_a_manifest_with_another_value_in_it(data: st.DataObject, value: Any) -> None:
    facts: Any = json.loads(SMALL)
    place = facts
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    check_readable(json.dumps(facts).encode())
