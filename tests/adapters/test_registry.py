"""Backends by name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from adapters import registry
from adapters.base import Backend, BackendConfig, ConfigError


def test_a_name_becomes_a_loaded_backend() -> None:
    backend = registry.create_backend(BackendConfig(backend="null", max_batch_size=3))
    assert isinstance(backend, Backend)
    assert (backend.info.backend, backend.info.max_batch_size) == ("null", 3)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"'cuda'.*must be one of {', '.join(registry.BACKENDS)}"):
        registry.create_backend(BackendConfig(backend="cuda"))


@pytest.mark.parametrize(
    ("backend", "missing", "error", "words"),
    [
        ("torch", "torch", ConfigError, "needs the package torch: .*--extra torch"),
        ("llama_cpp", "llama_cpp", ConfigError, "needs the package llama_cpp: .*--extra llama`"),
        ("openvino", "openvino", ConfigError, "needs the package openvino: .*--extra openvino`"),
        ("onnx", "onnxruntime", ConfigError, "needs the package onnxruntime: .*--extra onnx`"),
        ("mlx", "mlx", ConfigError, "needs the package mlx: .*--extra mlx`"),
        ("vllm", "vllm", ConfigError, "needs the package vllm .*`make bench BACKEND=vllm` installs it into"),
        ("torch", "adapters.x", ModuleNotFoundError, "adapters.x"),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, backend: str, missing: str, error: type[Exception], words: str
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(registry, "import_module", fail)
    with pytest.raises(error, match=words):
        registry.create_backend(BackendConfig(backend=backend))


def test_a_backend_with_an_environment_of_its_own_runs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    assert registry.interpreter_of("vllm") == sys.executable  # not installed: the load says so
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert registry.interpreter_of("vllm") == str(python)
    assert registry.interpreter_of("torch") == sys.executable
    monkeypatch.setattr(registry, "find_spec", lambda package: object())
    assert registry.interpreter_of("vllm") == sys.executable  # installed beside the lab


def test_every_entry_points_at_a_module_of_ours() -> None:
    for place in (p for d in registry.BACKENDS.values() for p in (d.make, d.tokenizer) if p):
        module, _, name = place.partition(":")
        assert module.startswith("adapters.")
        assert name.isidentifier()
    assert hasattr(import_module("adapters.null_backend"), "NullBackend")
