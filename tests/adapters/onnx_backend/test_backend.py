"""What ONNX Runtime alone has: its formats, and providers over the one graph for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for package in ("onnxruntime", "onnxruntime_genai", "onnx_ir"):
    pytest.importorskip(package, reason="needs the onnx extra")

import onnxruntime

from adapters.base import BackendError, ConfigError
from adapters.onnx_backend import session
from tests.adapters.conformance import GREEDY, MAX_BATCH, SAMPLED, Driver, onnx_backend, scratch, tiny_llama

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_format_that_it_has_not_is_a_sentence(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"DTYPE={dtype}: BACKEND=onnx has fp32 and int4"):
        onnx_backend(dtype=dtype)


@pytest.mark.parametrize("provider", ["cuda", "coreml", "dml"])
def test_a_provider_that_is_not_here_is_a_sentence_before_the_export(provider: str, tmp_path: Path) -> None:
    if session.PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("it is here")
    with pytest.raises(ConfigError, match=f"ONNX_PROVIDER={provider}: this onnxruntime was built with cpu"):
        onnx_backend(onnx_provider=provider, artifacts_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_every_provider_runs_the_graph_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package for CPUs has a second provider, without kernels: every operator then runs on the CPU."""
    second = "AzureExecutionProvider"
    if second not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no second provider")
    monkeypatch.setitem(session.PROVIDERS, "dml", second)
    backend: Any = onnx_backend(onnx_provider="dml")
    assert backend._decoder._session.get_providers() == [second, "CPUExecutionProvider"]
    assert backend.info.device == "dml"
    driver, plain = Driver(backend), Driver(onnx_backend())
    seq, mate = driver.start(20, SAMPLED), driver.start(9)
    driver.steps(4, seq, mate)
    assert seq.output_token_ids == plain.alone(seq)
    folders = sorted(path.name for path in Path(scratch().name, "artifacts/models").glob("tiny-llama-*fp32"))
    assert [name.partition("-onnx-")[2] for name in folders] == ["cpu-fp32"]


def test_a_provider_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime itself says so in its log and goes on with the CPU."""

    class OnTheCpu(onnxruntime.InferenceSession):  # type: ignore[misc]
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*session.PROVIDERS.values()])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCpu)
    with pytest.raises(BackendError, match="onnxruntime cannot start its CUDAExecutionProvider"):
        onnx_backend(onnx_provider="cuda")


def test_int4_weights_give_the_same_tokens_in_company() -> None:
    backend = onnx_backend(model=f"{tiny_llama()}:int4")
    assert (backend.info.dtype, backend.info.details["kv_type"]) == ("int4", "f32")
    driver = Driver(backend)
    together = [driver.start(5 + salt, params, salt=salt) for salt, params in enumerate([GREEDY, SAMPLED])]
    assert len(together) <= MAX_BATCH
    driver.steps(4, *together)
    for seq in together:
        assert seq.output_token_ids == driver.alone(seq)
