"""What the conformance tests drive a backend with, and the list of backends that they drive.

A test says who is in each step and how prompts are cut; `Driver` makes the chunks, books the tokens as
the scheduler would and checks what holds for every step. To put a backend under test, add a
factory for one with `MAX_BATCH` slots of `MAX_MODEL_LEN` tokens to `FACTORIES`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from adapters.base import Backend, BackendConfig, BackendError, SamplingParams, ScheduledChunk, Sequence
from adapters.null_backend import NullBackend
from tests.adapters.configs import make_config

MAX_BATCH = 4
MAX_MODEL_LEN = 384
CUT = 64
"""Prompts are cut at multiples of this, as the scheduler does."""

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, seed=11)
PENALIZED = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5)


def null_backend() -> Backend:
    return NullBackend(BackendConfig(max_batch_size=MAX_BATCH, max_model_len=MAX_MODEL_LEN))


@cache
def scratch() -> TemporaryDirectory[str]:
    """For models; removed when Python ends."""
    return TemporaryDirectory(prefix="lab-conformance-")


@cache
def tiny_llama() -> str:
    """A folder with a random model, made once."""
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 96}
    config = transformers.LlamaConfig(
        vocab_size=258, num_hidden_layers=2, eos_token_id=257, initializer_range=0.2, **shape
    )
    folder = f"{scratch().name}/tiny-llama"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: str) -> None:
    """One token a byte, one pair of bytes and the end: llama.cpp loads no model without a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["ab"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(f"{folder}/tokenizer.json")
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def torch_backend() -> Backend:
    folder = tiny_llama()
    from adapters.torch_backend.backend import TorchBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    return TorchBackend(BackendConfig(model=folder, num_threads=1, **limits))


def torch_backend_of_a_device() -> Backend:
    """The CUDA side with stand-ins for the device, in bf16 and with products of one row count."""
    folder = tiny_llama()
    from adapters.torch_backend.cuda.backend import CudaTorchBackend
    from tests.adapters.fake_machine import FakeMachine, row_by_row

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    config = make_config(
        model=folder,
        device="cpu",
        dtype="bf16",
        num_threads=1,
        cpu_kernels=False,
        batch_invariant=True,
        **limits,
    )
    return CudaTorchBackend(config, FakeMachine(attention=row_by_row))


def llama_cpp_backend(**settings: Any) -> Backend:
    pytest.importorskip("llama_cpp", reason="needs the llama extra")
    folder = tiny_llama()
    from adapters.llama_cpp_backend.backend import LlamaCppBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    return LlamaCppBackend(
        BackendConfig(
            backend="llama_cpp",
            model=f"{folder}:f32",
            artifacts_dir=f"{scratch().name}/artifacts",
            num_threads=1,
            **limits,
            **settings,
        )
    )


def llama_cpp_with_a_shared_cache() -> Backend:
    """So little memory that the slots share one cache, which holds two sequences of full length and more."""
    bytes_per_cell = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, width, fp32
    wanted = 5.5 * 256 * bytes_per_cell
    backend = llama_cpp_backend(kv_memory_fraction=wanted / psutil.virtual_memory().available)
    assert backend.info.details["kv_cache"] == "unified"
    assert backend.info.kv_capacity_tokens < MAX_BATCH * MAX_MODEL_LEN
    return backend


def openvino_backend(**settings: Any) -> Backend:
    pytest.importorskip("openvino_genai", reason="needs the openvino extra")
    folder = tiny_llama()
    from adapters.openvino_backend.backend import OpenVinoBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    common = {"model": folder, "dtype": "fp32", "artifacts_dir": f"{scratch().name}/artifacts", **limits}
    return OpenVinoBackend(make_config("openvino", num_threads=1, **{**common, **settings}))


def onnx_backend(**settings: Any) -> Backend:
    for package in ("onnxruntime", "onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(package, reason="needs the onnx extra")
    folder = tiny_llama()
    from adapters.onnx_backend.backend import OnnxBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    common = {"model": folder, "artifacts_dir": f"{scratch().name}/artifacts", **limits}
    return OnnxBackend(make_config("onnx", num_threads=1, **{**common, **settings}))


def mlx_backend() -> Backend:
    pytest.importorskip("mlx_lm", reason="needs the mlx extra")
    folder = tiny_llama()
    from adapters.mlx_backend.backend import MlxBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    return MlxBackend(BackendConfig(backend="mlx", model=folder, device="cpu", **limits))


def vllm_backend(**settings: Any) -> Backend:
    pytest.importorskip("vllm", reason="needs the environment of adapters/vllm_backend")
    folder = tiny_llama()
    from adapters.vllm_backend.backend import VllmBackend

    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    return VllmBackend(
        make_config("vllm", model=folder, dtype="fp32", num_threads=1, **{**limits, **settings})
    )


FACTORIES: dict[str, Callable[[], Backend]] = {
    "null": null_backend,
    "torch": torch_backend,
    "torch, device": torch_backend_of_a_device,
    "llama_cpp": llama_cpp_backend,
    "llama_cpp unified": llama_cpp_with_a_shared_cache,
    "openvino": openvino_backend,
    "onnx": onnx_backend,
    "mlx": mlx_backend,
    "vllm": vllm_backend,
}


def fail_next_step(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next step that computes fail at its end, where the engine itself would fail.

    Skips the test for a backend in which no failure can be planted so.
    """
    owner: Any
    match backend.info.backend:
        case "torch" if hasattr(backend, "_launcher"):
            owner, name, error = backend._launcher, "launch", BackendError("planted")
        case "torch":
            from adapters.torch_backend import backend as module

            owner, name, error = module, "choose_tokens", RuntimeError("planted")
        case "onnx" | "mlx":
            owner, name, error = backend._decoder, "run", BackendError("planted")
        case "openvino":
            owner, name, error = type(backend._pipeline), "step", RuntimeError("planted")
        case "vllm":
            worker = backend._engine.engine_core.engine_core.model_executor.driver_worker.worker
            owner, name, error = worker.model_runner, "_model_forward", RuntimeError("planted")
        case other:
            pytest.skip(f"{other} computes nothing that fails, or has a test of its own for it")
    real, left = getattr(owner, name), [error]

    def failing(*args: Any, **named: Any) -> Any:
        made = real(*args, **named)
        if left:
            raise left.pop()
        return made

    monkeypatch.setattr(owner, name, failing)


_next_seq_id = count(1)


class Driver:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._started: list[Sequence] = []

    def start(self, num_prompt_tokens: int, params: SamplingParams = GREEDY, *, salt: int = 0) -> Sequence:
        """A new sequence; equal lengths and salts give equal prompts."""
        rng = random.Random(f"{num_prompt_tokens}/{salt}")
        vocab_size = self.backend.info.vocab_size
        prompt = [rng.randrange(vocab_size) for _ in range(num_prompt_tokens)]
        seq = Sequence(next(_next_seq_id), prompt, params)
        self._started.append(seq)
        return seq

    def step(self, *work: Sequence | tuple[Sequence, int], dead: Iterable[Sequence] = ()) -> None:
        """One step. A sequence computes all it knows, or as many tokens as the pair says."""
        chunks = []
        for item in work:
            seq, num_tokens = item if isinstance(item, tuple) else (item, item.num_tokens)
            start = seq.num_computed_tokens
            chunks.append(ScheduledChunk(seq, start, min(num_tokens, seq.num_tokens - start)))
        chunks += [ScheduledChunk(seq, seq.num_computed_tokens - 1, 1, dead=True) for seq in dead]
        known = {chunk.seq.seq_id: chunk.seq.num_tokens for chunk in chunks}

        outputs = {output.seq_id: output.token_ids for output in self.backend.step(chunks)}

        assert {chunk.seq.seq_id: chunk.seq.num_tokens for chunk in chunks} == known, "the backend wrote"
        assert set(outputs) == {chunk.seq.seq_id for chunk in chunks if chunk.samples}
        for chunk in chunks:
            if not chunk.dead:
                token_ids = outputs.get(chunk.seq.seq_id, [])
                assert all(0 <= token_id < self.backend.info.vocab_size for token_id in token_ids)
                assert chunk.samples == bool(token_ids)
                chunk.seq.output_token_ids += token_ids
                chunk.seq.num_computed_tokens = chunk.start + chunk.num_tokens + max(0, len(token_ids) - 1)

    def steps(self, num_steps: int, *work: Sequence, dead: Iterable[Sequence] = ()) -> None:
        for _ in range(num_steps):
            self.step(*work, dead=dead)

    def release(self, *sequences: Sequence) -> None:
        self.backend.release([seq.seq_id for seq in sequences])

    def release_all(self) -> None:
        self.release(*self._started)
        self._started.clear()

    def alone(self, like: Sequence, num_tokens: int | None = None) -> list[int]:
        """What `like` gets with the whole backend to itself and its prompt in one piece.

        As many tokens as `like` has, unless told. Frees every slot.
        """
        num_tokens = len(like.output_token_ids) if num_tokens is None else num_tokens
        self.release_all()
        seq = Sequence(next(_next_seq_id), list(like.prompt_token_ids), like.params)
        self._started.append(seq)
        while len(seq.output_token_ids) < num_tokens:
            self.step(seq)
        self.release_all()
        return seq.output_token_ids[:num_tokens]
