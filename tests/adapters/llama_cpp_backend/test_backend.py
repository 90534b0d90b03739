"""The llama.cpp backend: a sentence for each way in which loading fails, and what running promises."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from adapters.base import (
    BackendError,
    CapacityError,
    ConfigError,
    LabError,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    UnsupportedModel,
)
from adapters.models.gguf.store import resolve_gguf

pytest.importorskip("llama_cpp", reason="needs the llama extra")
gguf = pytest.importorskip("gguf", reason="needs the llama extra")

import llama_cpp.llama_cpp as C

from adapters.llama_cpp_backend import context
from adapters.llama_cpp_backend.backend import LlamaCppBackend
from adapters.llama_cpp_backend.loading import load_model, pick_gpu_layers
from tests.adapters.llama_files import answer, config

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


# Loading that fails


@pytest.fixture(scope="module")
def good_file(artifacts: Path) -> bytes:
    return resolve_gguf(config("lab-26m", artifacts)).path.read_bytes()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda good: None, ConfigError, r"model\.gguf does not exist"),
        (lambda good: b"", ConfigError, "is not a GGUF file"),
        (lambda good: b"<html>" * 100, ConfigError, "is not a GGUF file"),
        (lambda good: good[:300], BackendError, "is cut off or damaged"),
        (lambda good: good[: len(good) // 2], BackendError, "is cut off or damaged"),
        (lambda good: good[:-1], BackendError, "is cut off or damaged"),
        (
            lambda good: good.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0alien", 1),
            UnsupportedModel,
            "llama.cpp does not know its architecture.*alien",
        ),
    ],
    ids=["missing", "empty", "html", "cut in the header", "cut in half", "cut at the end", "architecture"],
)
def test_a_file_that_cannot_be_loaded_says_why(
    make: Any, error: type[LabError], message: str, good_file: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    content = make(good_file)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        LlamaCppBackend(config(path, tmp_path))


def test_a_recurrent_or_encoding_model_is_refused(
    good_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good_file)
    monkeypatch.setattr(C, "llama_model_is_recurrent", lambda model: True)
    with pytest.raises(UnsupportedModel, match="recurrent"):
        LlamaCppBackend(config(path, tmp_path))
    monkeypatch.setattr(C, "llama_model_has_encoder", lambda model: True)
    with pytest.raises(UnsupportedModel, match="encoder"):
        LlamaCppBackend(config(path, tmp_path))


@pytest.mark.parametrize(("free", "what"), [(100 << 20, "the weights of"), (290 << 20, "keys and values")])
def test_too_little_memory_is_noticed_first(
    free: int, what: str, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    changes = {"max_batch_size": 1, "max_model_len": 4096}
    with pytest.raises(BackendError, match=f"not enough memory: {what}.*lower MAX_BATCH or MAX_MODEL_LEN"):
        LlamaCppBackend(config("lab-26m", artifacts, kv_type="f32", **changes))


def test_a_cache_that_llama_cpp_cannot_reserve_is_reported(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(C, "llama_init_from_model", lambda model, params: None)
    with pytest.raises(BackendError, match=r"cannot reserve a cache of .* lower MAX_BATCH or MAX_MODEL_LEN"):
        LlamaCppBackend(config("lab-26m", artifacts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch_size": 1000}, "MAX_BATCH=1000, but llama.cpp runs 256"),
        ({"max_model_len": 5000}, "MAX_MODEL_LEN=5000 is beyond the 4096 positions"),
        ({"kv_type": "int3"}, "KV_TYPE=int3 is none of"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str, artifacts: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaCppBackend(config("lab-26m", artifacts, **changes))


# Running


def test_settings_reach_llama_cpp(artifacts: Path) -> None:
    changes = {"num_threads": 2, "n_ubatch": 96, "n_batch": 2000, "kv_type": "q8_0"}
    backend = LlamaCppBackend(config("lab-26m", artifacts, **changes, max_model_len=None))
    info = backend.info
    assert (info.num_threads, info.details["n_threads_batch"]) == (2, 2)
    assert (info.details["n_ubatch"], info.details["n_batch"]) == (96, 2000)
    assert (info.details["kv_type"], info.details["kv_cache"]) == ("q8_0", "split")
    assert (info.max_model_len, info.kv_capacity_tokens) == (4096, 4 * 4096)
    assert len(answer(backend, list(range(300)), 3)) == 3
    backend.close()


def test_layers_go_to_an_accelerator_where_the_build_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C, "llama_supports_gpu_offload", lambda: True)
    assert [pick_gpu_layers("auto", n) for n in (None, 0, 7)] == [-1, 0, 7]
    assert pick_gpu_layers("cpu", None) == 0
    monkeypatch.setattr(C, "llama_supports_gpu_offload", lambda: False)
    assert (pick_gpu_layers("auto", None), pick_gpu_layers("auto", 0)) == (0, 0)
    for device, asked, name in (("cuda", None, "DEVICE=cuda"), ("auto", 9, "N_GPU_LAYERS=9")):
        with pytest.raises(
            ConfigError, match=f"{name}, but this build of llama.cpp computes on the CPU only"
        ):
            pick_gpu_layers(device, asked)


def test_a_failed_step_leaves_the_cache_as_it_was(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LlamaCppBackend(config("lab-26m:f32", artifacts))
    prompt = list(range(1, 40))
    want = answer(backend, prompt, 6)
    seq = Sequence(1, prompt, SamplingParams())
    decode = C.llama_decode

    def failing(status: int) -> Any:
        """Computes the step, and then says that it failed."""
        return lambda context, batch: decode(context, batch) or status

    for place in range(6):
        chunk = ScheduledChunk(seq, seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens)
        if place in (0, 3):
            for status, error in ((1, CapacityError), (-3, BackendError)):
                monkeypatch.setattr(C, "llama_decode", failing(status))
                with pytest.raises(error):
                    backend.step([chunk])
            monkeypatch.undo()
        (output,) = backend.step([chunk])
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids += output.token_ids
    assert seq.output_token_ids == want
    backend.close()


def test_the_log_goes_to_pythons_logging_at_its_own_levels(
    artifacts: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = resolve_gguf(config("lab-26m", artifacts)).path
    with caplog.at_level(logging.DEBUG, logger="llama.cpp"):
        model = load_model(path)
        C.llama_model_free(model.pointer)
    records = [record for record in caplog.records if record.name == "llama.cpp"]
    assert any(r.levelno == logging.INFO and "general.architecture" in r.getMessage() for r in records)
    assert not any(r.levelno > logging.INFO and "general.architecture" in r.getMessage() for r in records)
    assert all("\n" not in record.getMessage() for record in records)
    with pytest.raises(ConfigError, match="MAX_MODEL_LEN"):
        LlamaCppBackend(config(path, artifacts, max_model_len=10**6))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_the_cache_is_shared_where_memory_is_short(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 << 30))
    limits = context.plan_context(
        config("lab-26m", artifacts, max_batch_size=256, max_model_len=4096),
        model := load_model(resolve_gguf(config("lab-26m", artifacts)).path),
    )
    C.llama_model_free(model.pointer)
    per_token = 8 * 2 * 4 * 64 * 2  # layers, keys and values, heads, width, fp16
    assert limits.unified
    assert 4096 <= limits.num_cells <= 0.8 * (4 << 30) / per_token < limits.num_cells + 256
