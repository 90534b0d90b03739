"""What OpenVINO alone has: its settings, its formats, what it says of itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from adapters.base import ConfigError
from tests.adapters.conformance import (
    CUT,
    GREEDY,
    MAX_BATCH,
    MAX_MODEL_LEN,
    SAMPLED,
    Driver,
    openvino_backend,
    tiny_llama,
)

pytest.importorskip("openvino_genai", reason="needs the openvino extra")
pytestmark = pytest.mark.engines


def test_its_settings_reach_it_and_are_told() -> None:
    backend = openvino_backend(
        ov_kv_type="u8",
        ov_cache_tokens=MAX_MODEL_LEN,
        ov_max_num_batched_tokens=32,
        ov_dynamic_split_fuse=False,
        ov_prefix_caching=True,
    )
    info = backend.info
    assert (info.kv_capacity_tokens, info.dtype) == (MAX_MODEL_LEN, "fp32")
    told = {name: info.details[name] for name in ("kv_type", "num_kv_blocks", "max_num_batched_tokens")}
    assert told == {
        "kv_type": "u8",
        "num_kv_blocks": MAX_MODEL_LEN // 32 + MAX_BATCH,
        "max_num_batched_tokens": 32,
    }
    assert (info.details["dynamic_split_fuse"], info.details["prefix_caching"]) == (False, True)
    driver = Driver(backend)
    driver.steps(3, driver.start(9))
    backend.close()


@pytest.mark.parametrize("setting", [{"ov_max_num_batched_tokens": 32}, {"ov_prefix_caching": True}])
def test_a_setting_changes_no_token(setting: dict[str, Any]) -> None:
    driver = Driver(openvino_backend(**setting))
    for params in (GREEDY, SAMPLED):
        seq, mate = driver.start(2 * CUT + 5, params), driver.start(9, params)
        driver.step(mate, (seq, CUT))
        driver.steps(4, mate, seq)
        for one in (seq, mate):
            assert one.output_token_ids == driver.alone(one)
    driver.backend.close()


def test_its_figures_are_those_of_its_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    backend: Any = openvino_backend()
    driver = Driver(backend)
    sequences = [driver.start(9), driver.start(33)]
    driver.steps(2, *sequences)
    told = backend.figures()
    num_blocks = backend.info.details["num_kv_blocks"]
    assert told["kv_usage_peak_ratio"] == pytest.approx(3 / num_blocks)
    assert (told["requests"], told["scheduled_requests"]) == (2, 2)
    with caplog.at_level(logging.INFO):
        backend.close()
    assert "OpenVINO used up to 6% of its KV blocks" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int4"}, "DTYPE=int4: BACKEND=openvino computes in fp32, bf16 or fp16"),
        ({"device": "tpu"}, "DEVICE=tpu: OpenVINO finds .*cpu.* here"),
        ({"max_model_len": 1 << 20}, "is beyond the 2048 positions"),
        ({"ov_cache_tokens": 5}, "OV_CACHE_TOKENS=5 is less than one sequence"),
        ({"model": f"{Path(__file__).parent}:int4"}, "int4"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        openvino_backend(**changes)
    assert "\n" not in str(caught.value)


def test_the_format_after_the_colon_is_that_of_the_weights() -> None:
    backend = openvino_backend(model=f"{tiny_llama()}:fp16", dtype="auto")
    assert backend.info.details["weights"] == "f16"
    backend.close()
