"""The vLLM backend: whose row computes, how prompts are cut, what a full cache does, how loading fails."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.base import BackendError, ConfigError, SamplingParams
from tests.adapters.configs import make_config
from tests.adapters.conformance import (
    GREEDY,
    MAX_MODEL_LEN,
    SAMPLED,
    Driver,
    fail_next_step,
    tiny_llama,
    vllm_backend,
)

pytest.importorskip("vllm", reason="needs the environment of adapters/vllm_backend")
pytestmark = pytest.mark.engines


@pytest.fixture
def driver() -> Iterator[Driver]:
    backend = vllm_backend(max_step_tokens=64)
    yield Driver(backend)
    backend.close()


def computed(driver: Driver, seq_id: int) -> Any:
    backend: Any = driver.backend
    return backend._scheduler.num_computed(backend._requests._requests[seq_id].request_id)


def test_a_row_that_is_left_out_is_not_computed(driver: Driver) -> None:
    paused, busy = driver.start(30), driver.start(20)
    driver.step(paused, busy)
    driver.steps(3, busy)
    assert (computed(driver, paused.seq_id), computed(driver, busy.seq_id)) == (30, 23)
    driver.steps(2, paused, busy)
    assert (computed(driver, paused.seq_id), computed(driver, busy.seq_id)) == (32, 25)


def test_a_prompt_above_the_budget_takes_a_step_of_vllm_for_each_piece(driver: Driver) -> None:
    long, mate = driver.start(200), driver.start(9)
    driver.step(mate)
    driver.step(mate, (long, 48))
    assert computed(driver, long.seq_id) == 63  # vLLM's budget of 64, less the mate's row
    driver.step(mate, long)
    assert computed(driver, long.seq_id) == 200
    assert computed(driver, mate.seq_id) == 11
    for seq in (long, mate):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_seeded_prompt_above_the_budget_is_answered(driver: Driver) -> None:
    """A generator of a CPU cannot be wound back, which vLLM asks of it."""
    long, mate = driver.start(200, SAMPLED), driver.start(90, SAMPLED)
    driver.step(mate, (long, 48))
    driver.steps(6, mate, long)
    for seq in (long, mate):
        assert seq.output_token_ids == driver.alone(seq)


def test_dead_rows_give_way_where_the_cache_is_full(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(vllm_backend(vllm_cache_tokens=MAX_MODEL_LEN))
    dead, live = driver.start(220), driver.start(210)
    driver.step(dead, live)
    with caplog.at_level(logging.INFO):
        for _ in range(50):
            driver.step(live, dead=[dead])
        answer = list(live.output_token_ids)
        assert answer == driver.alone(live)
        driver.backend.close()
    assert "preempted sequences, 1 until now" in caplog.text
    assert "preempted 1 times" in caplog.text


def test_a_prompt_whose_piece_failed_is_computed_anew(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has counted the piece as computed by then."""
    long, mate = driver.start(150), driver.start(9)
    driver.step(mate)
    driver.step(mate, (long, 48))
    fail_next_step(driver.backend, monkeypatch)
    with pytest.raises(BackendError, match="a step of vLLM failed: RuntimeError: planted"):
        driver.step(mate, (long, 64))
    driver.step((long, 64))
    driver.step(mate)
    driver.steps(4, mate, long)
    for seq in (long, mate):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_dead_row_of_a_failed_step_is_no_longer_computed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no room left for a request that begins anew."""
    dead, live = driver.start(MAX_MODEL_LEN), driver.start(9)
    driver.step(dead, live)
    fail_next_step(driver.backend, monkeypatch)
    with pytest.raises(BackendError):
        driver.step(live, dead=[dead])
    driver.steps(3, live, dead=[dead])
    assert live.output_token_ids == driver.alone(live)


def test_its_figures_are_those_of_vllm_s_scheduler(driver: Driver) -> None:
    backend: Any = driver.backend
    sequences = [driver.start(9), driver.start(33)]
    driver.step(*sequences)
    told = backend.figures()
    driver.step(sequences[0])
    driver.release(*sequences)
    assert told["kv_usage_ratio"] == pytest.approx(3 / backend.info.details["num_kv_blocks"], rel=0.1)
    assert (told["requests"], told["scheduled_requests"], told["preemptions"]) == (2, 2, 0)
    after = backend.figures()
    assert after["kv_usage_ratio"] == 0.0
    assert after["kv_usage_peak_ratio"] == told["kv_usage_ratio"]
    assert (after["requests"], after["scheduled_requests"]) == (0, 1)


@pytest.mark.parametrize(("device", "is_said"), [("auto", True), ("cpu", False)])
def test_a_gpu_that_is_left_out_is_said(
    device: str, is_said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from adapters.vllm_backend import loading

    monkeypatch.setattr(loading, "Gpu", lambda: SimpleNamespace(read=object))
    vllm_backend(device=device).close()
    assert ("there is a GPU, but this vLLM is the build for CPUs" in caplog.text) is is_said


def test_a_worker_that_is_not_known_is_a_sentence() -> None:
    from adapters.vllm_backend.cpu_generators import take_back_draws

    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=object()))
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    with pytest.raises(BackendError, match="vLLM computes with object, whose seeds"):
        take_back_draws(engine)


def test_live_rows_that_do_not_fit_are_a_sentence() -> None:
    driver = Driver(vllm_backend(vllm_cache_tokens=MAX_MODEL_LEN))
    with pytest.raises(BackendError, match="its cache is full"):
        driver.step(*(driver.start(150, salt=salt) for salt in range(4)))
    driver.backend.close()


def test_a_preempted_sequence_goes_on_as_before_unless_it_is_sampled(driver: Driver) -> None:
    """Its generator starts from the seed again."""
    for params, is_same in [(GREEDY, True), (SAMPLED, False)]:
        seq = driver.start(20, params)
        whole = driver.alone(seq, 16)
        driver.steps(8, seq)
        driver.release(seq)
        seq.num_computed_tokens = 0
        seq.num_prefill_tokens = seq.num_tokens
        driver.steps(8, seq)
        driver.release(seq)
        assert (seq.output_token_ids == whole) is is_same


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dtype": "int4"}, ConfigError, "computes in fp32, bf16 or fp16"),
        ({"device": "tpu"}, ConfigError, "DEVICE=tpu: this vLLM computes on"),
        ({"max_model_len": 1 << 20}, ConfigError, "is beyond the 2048 positions"),
        ({"vllm_cache_tokens": 5}, ConfigError, "VLLM_CACHE_TOKENS=5 is less than one sequence"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    from adapters.vllm_backend.backend import VllmBackend

    with pytest.raises(error, match=words):
        VllmBackend(make_config("vllm", model=tiny_llama(), num_threads=1, **changes))


def test_a_model_that_vllm_cannot_load_is_a_sentence(tmp_path: Path) -> None:
    from adapters.vllm_backend.backend import VllmBackend

    folder = shutil.copytree(tiny_llama(), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(BackendError, match="vLLM cannot load") as caught:
        VllmBackend(make_config("vllm", model=str(folder), num_threads=1, max_model_len=64))
    assert "\n" not in str(caught.value)


def test_sampled_params_reach_vllm() -> None:
    from adapters.vllm_backend.requests import vllm_params

    filters = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    params = SamplingParams(**filters, seed=-3, min_tokens=4, ending_token_ids=(7,))  # type: ignore[arg-type]
    made = vllm_params(params, 100, 1)
    told = (made.temperature, made.top_p, made.top_k, made.min_p, made.seed, made.min_tokens)
    assert told == (0.7, 0.9, 5, 0.1, -3, 3)
    assert made.all_stop_token_ids == {7}
    assert made.ignore_eos
