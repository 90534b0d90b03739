"""What MLX loads, and what it refuses in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs the mlx extra")

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_model

from adapters.base import Backend, BackendConfig, ConfigError, UnsupportedModel
from adapters.mlx_backend import MlxOptions
from adapters.mlx_backend.backend import MlxBackend
from adapters.mlx_backend.factory import create
from tests.adapters.conformance import Driver, tiny_llama

pytestmark = pytest.mark.engines


def load(**settings: Any) -> Backend:
    config = {"model": tiny_llama(), "device": "cpu", "max_batch_size": 2, "max_model_len": 64, **settings}
    return MlxBackend(BackendConfig(backend="mlx", **config))


def test_a_format_that_it_has_not_and_a_device_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match="DTYPE=int4: BACKEND=mlx has fp32, bf16 and fp16"):
        load(dtype="int4")
    if not mx.metal.is_available():
        with pytest.raises(ConfigError, match=r"DEVICE=mps: MLX has .*cpu here"):
            load(device="mps")


def test_the_format_after_the_colon_is_computed_in() -> None:
    backend = load(model=f"{tiny_llama()}:bf16")
    assert (backend.info.dtype, backend.info.num_threads) == ("bf16", 1)
    assert backend.info.details["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2  # layers, k and v, heads, width


def test_a_quantized_folder_runs_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(
        tiny_llama(), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    model, described = quantize_model(*load_model(Path(tiny_llama())), group_size=32, bits=4)
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(described))
    backend, whole = load(model=str(tmp_path)), load()
    assert backend.info.details["weights"] == "4 bits"
    assert backend.info.num_parameters == whole.info.num_parameters
    driver = Driver(backend)
    seq, mate = driver.start(20), driver.start(3)
    driver.steps(4, seq, mate)
    assert seq.output_token_ids == driver.alone(seq)


def test_layers_that_keep_a_window_are_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    window = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | window))
    with pytest.raises(UnsupportedModel, match="no slots for layers with RotatingKVCache: use BACKEND=torch"):
        load(model=str(tmp_path))


def test_an_architecture_that_mlx_lm_has_not_is_named(tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "abacus"}))
    with pytest.raises(UnsupportedModel, match=r"mlx-lm cannot run .*abacus"):
        load(model=str(tmp_path))


def test_a_blas_that_is_not_there_is_named() -> None:
    options = MlxOptions(mlx_blas="libno-such-blas.so")
    with pytest.raises(ConfigError, match=r"MLX_BLAS=libno-such-blas.so cannot be loaded: .*libno-such-blas"):
        create(BackendConfig(backend="mlx", model=tiny_llama(), options=options))


_BLAS_OF_SEVENS = """
void cblas_sgemm(int order, int transposed_a, int transposed_b, int rows, int columns, int depth, float alpha,
                 const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[i * ldc + j] = 7;
}
"""
_PRODUCT = """
import sys
from adapters.base import BackendConfig
from adapters.mlx_backend import MlxOptions
from adapters.mlx_backend.factory import create

model, blas = sys.argv[1:]
limits = {"device": "cpu", "max_batch_size": 2, "max_model_len": 64}
backend = create(BackendConfig(model=model, options=MlxOptions(mlx_blas=blas or None), **limits))

import mlx.core as mx

print(backend.info.details["blas"], mx.max(mx.ones((8, 8)) @ mx.ones((8, 8))).item())
"""


def test_a_blas_comes_before_that_of_the_package(tmp_path: Path) -> None:
    source, library = tmp_path / "sevens.c", tmp_path / "libsevens.so"
    source.write_text(_BLAS_OF_SEVENS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    for blas, said in (("", "as packaged 8.0"), (str(library), f"{library} 7.0")):
        command = [sys.executable, "-c", _PRODUCT, tiny_llama(), blas]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said
