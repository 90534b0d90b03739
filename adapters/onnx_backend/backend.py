"""The ONNX Runtime backend: one run for neighbouring decode rows, and one for each prompt chunk of a step.

The exported graph takes rows of equal length, so a mixed step is several runs. A sequence gets the lowest
free slot; free slots between decode rows are computed as idle rows, which costs less than a second run.
Tokens are chosen by the lab's own rule, so that seeds mean the same as with torch.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import onnxruntime as ort

from adapters.base import BackendConfig, BackendInfo, ConfigError, ScheduledChunk, StepOutput
from adapters.chunks import check_chunks
from adapters.cores import default_threads
from adapters.models.safetensors_file import count_parameters
from adapters.models.store import pick_model_len, resolve_model
from adapters.onnx_backend import FORMATS, OnnxOptions
from adapters.onnx_backend.export import exported_model
from adapters.onnx_backend.session import DecoderSession
from adapters.sampling import choose_token
from adapters.text.tokenizer import HFTokenizer

_MAX_GAP = 3
"""Free slots between two rows that are computed for nothing, rather than to cut the run in two."""


class OnnxBackend:
    def __init__(self, config: BackendConfig) -> None:
        """Export the model where that has not been done, and load it.

        Raises:
            ConfigError, BackendError: with what to change.
        """
        files = resolve_model(config, FORMATS)
        wanted = files.format or ("fp32" if config.dtype == "auto" else config.dtype)
        if wanted not in FORMATS:
            raise ConfigError(f"DTYPE={config.dtype}: BACKEND=onnx has {', '.join(set(FORMATS.values()))}")
        precision, provider = FORMATS[wanted], config.options_as(OnnxOptions).onnx_provider
        model = json.loads((files.folder / "config.json").read_text("utf-8"))
        max_model_len = pick_model_len(config, model["max_position_embeddings"], config.model)
        num_threads = config.num_threads or default_threads()
        num_slots = config.max_batch_size
        path = exported_model(files, precision, provider, config.artifacts_dir)
        self._session = DecoderSession(path, provider, num_threads, num_slots, max_model_len)
        self._slot_of: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}
        self._free = list(range(num_slots))
        self._info = BackendInfo(
            backend="onnx",
            model=files.name,
            device=provider,
            dtype=precision,
            vocab_size=self._session.vocab_size,
            eos_token_ids=HFTokenizer.from_folder(files.folder).eos_token_ids,
            max_batch_size=num_slots,
            max_model_len=max_model_len,
            kv_capacity_tokens=num_slots * max_model_len,
            num_parameters=count_parameters(files.folder),
            model_digest=files.digest,
            num_threads=num_threads,
            details={
                "onnxruntime": ort.__version__,
                "kv_type": "f32",
                "kv_bytes_per_token": self._session.kv_bytes_per_token,
                "runs": "one for the decode rows, one for each prompt chunk",
            },
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        check_chunks(chunks, self._num_cached, self._info.max_batch_size, self._info.max_model_len)
        for chunk in chunks:
            if chunk.seq.seq_id not in self._slot_of:
                self._slot_of[chunk.seq.seq_id] = self._free.pop(0)
                self._num_cached[chunk.seq.seq_id] = 0
        outputs = []
        for first_slot, rows in self._runs(chunks):
            width = 1 if len(rows) > 1 else rows[0].num_tokens if rows[0] else 1
            tokens = np.zeros((len(rows), width), dtype=np.int64)
            lengths = [1] * len(rows)
            for index, row in enumerate(rows):
                if row is not None:
                    tokens[index] = row.token_ids
                    lengths[index] = row.start + row.num_tokens
            logits = self._session.run(first_slot, tokens, lengths)
            likeliest = logits.argmax(-1).tolist()
            for index, row in enumerate(rows):
                if row is not None and row.samples:
                    is_greedy = row.seq.params.is_plain_greedy
                    token = likeliest[index] if is_greedy else choose_token(logits[index], row.seq)
                    outputs.append(StepOutput(row.seq.seq_id, [token]))
        for chunk in chunks:  # only now: a step that failed may be given again
            self._num_cached[chunk.seq.seq_id] = chunk.start + chunk.num_tokens
        return outputs

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            slot = self._slot_of.pop(seq_id, None)
            if slot is not None:
                del self._num_cached[seq_id]
                insort(self._free, slot)

    def close(self) -> None:
        self.release([*self._slot_of])
        del self._session

    def _runs(self, chunks: Seq[ScheduledChunk]) -> Iterator[tuple[int, list[ScheduledChunk | None]]]:
        """Neighbouring slots with one token each, then the longer chunks; None is an idle row."""
        single = {self._slot_of[chunk.seq.seq_id]: chunk for chunk in chunks if chunk.num_tokens == 1}
        free = set(self._free)
        slots = sorted(single)
        while slots:
            first = last = slots.pop(0)
            while slots and slots[0] - last - 1 <= _MAX_GAP and free.issuperset(range(last + 1, slots[0])):
                last = slots.pop(0)
            yield first, [single.get(slot) for slot in range(first, last + 1)]
        for chunk in chunks:
            if chunk.num_tokens > 1:
                yield self._slot_of[chunk.seq.seq_id], [chunk]
