"""An f16 GGUF file needs no llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from adapters.models.presets import PRESETS, Preset
from adapters.models.store import resolve_model
from tests.adapters.configs import make_config

gguf = pytest.importorskip("gguf", reason="needs an extra with gguf")

from adapters.models.gguf.store import gguf_made_from


def test_f16_is_the_matrices_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(256, 512, 2, 4, 2, vocab_size=600))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "adapters.models.gguf.quantize", raising=False)
    config = make_config("openvino", model="lab-tiny", artifacts_dir=str(tmp_path))
    files = resolve_model(config)

    made = {name: gguf_made_from(files, name, config, None) for name in ("f16", "bf16")}

    f16, bf16 = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(made[name].path).tensors} for name in made
    )
    assert f16["token_embd.weight"].dtype == np.float16
    for name, values in f16.items():
        exact = bf16[name]
        if exact.dtype != np.float32:  # bf16, which NumPy does not know
            exact = (exact.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(values, exact.astype(values.dtype).reshape(values.shape))
