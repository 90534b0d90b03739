"""A backend without weights: the null system that harness, service and scheduler are measured with.

A token is a hash of all tokens before it (and, where temperature is above 0, of the seed's draw), so equal
prompts give equal answers whatever the batch. A slot keeps what a KV cache would keep, the length and a
digest of its tokens, so that a wrong chunk is an error here as it would be with a real model. A step lasts as
long as its cost model says. Token ids 0 to 255 are bytes; 256 ends an answer.
"""

from __future__ import annotations

import math
import time
import zlib
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapters.base import (
    KV_BLOCK,
    BackendConfig,
    BackendInfo,
    ScheduledChunk,
    Sequence,
    StepOutput,
)
from adapters.chunks import check_chunks
from adapters.description import BackendDescription, option
from adapters.sampling import choose_token, mix64, uniform_draw

if TYPE_CHECKING:
    from adapters.text.tokenizer import ByteTokenizer

EOS_TOKEN_ID = 256
_ALPHABET = b"eeeeeetttttaaaaooooiiinnnssshhhrrrdddlluucmwfgypbvkETAOIN        "
_EOS_ONE_IN = 512
_NUM_CHOICES = 64
_DEFAULT_MAX_MODEL_LEN = 4096
_MILLISECONDS = {"ge": 0, "le": 3_600_000, "allow_inf_nan": False}
_SPIN_S = 0.0003
"""The last part of a wait is spent spinning: sleep alone comes back some 0.1 ms late."""


@dataclass(frozen=True, slots=True)
class NullOptions:
    null_step_ms: float = option(
        0.0,
        "A step takes NULL_STEP_MS + rows * NULL_ROW_MS + prompt tokens * NULL_PROMPT_TOKEN_MS.",
        **_MILLISECONDS,
    )
    null_row_ms: float = option(0.0, "The cost of each decode row.", **_MILLISECONDS)
    null_prompt_token_ms: float = option(0.0, "The cost of each prompt token.", **_MILLISECONDS)


def load_tokenizer(config: BackendConfig) -> ByteTokenizer:
    from adapters.text.tokenizer import ByteTokenizer

    return ByteTokenizer()


DESCRIPTION = BackendDescription(
    make="adapters.null_backend:NullBackend",
    tokenizer="adapters.null_backend:load_tokenizer",
    options=NullOptions,
    weights="none",
    formats={},
)


class NullBackend:
    def __init__(self, config: BackendConfig) -> None:
        options = config.options_as(NullOptions)
        self._step_s = options.null_step_ms / 1000
        self._row_s = options.null_row_ms / 1000
        self._prompt_token_s = options.null_prompt_token_ms / 1000
        self._has_cost = self._step_s + self._row_s + self._prompt_token_s > 0
        self._num_cached: dict[int, int] = {}
        self._digests: dict[int, int] = {}
        """Of the tokens of each sequence with a slot."""
        self._block_digests: dict[int, int] = {}
        """Of the tokens up to the end of each block that may be shared."""
        max_model_len = config.max_model_len or _DEFAULT_MAX_MODEL_LEN
        self._info = BackendInfo(
            backend="null",
            model="null",
            device="none",
            dtype="none",
            vocab_size=EOS_TOKEN_ID + 1,
            eos_token_ids=(EOS_TOKEN_ID,),
            max_batch_size=config.max_batch_size,
            max_model_len=max_model_len,
            kv_capacity_tokens=config.max_batch_size * max_model_len,
            has_kv_blocks=True,
            computes_padding=True,
            details={
                "null_step_s": self._step_s,
                "null_row_s": self._row_s,
                "null_prompt_token_s": self._prompt_token_s,
            },
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        """Wait as long as the cost model says and give the next tokens.

        Raises:
            BackendError: a chunk does not continue what its slot holds.
            CapacityError: more sequences than slots, or a sequence longer than a slot.
        """
        begin_s = time.perf_counter()
        for chunk in chunks:
            if chunk.seq.prefix_keys and chunk.start and chunk.seq.seq_id not in self._num_cached:
                self._begin_with_hit(chunk.seq, chunk.start)
        info = self._info
        check_chunks(chunks, self._num_cached, info.max_batch_size, info.max_model_len, may_pad=True)
        outputs = []
        for chunk in chunks:
            if chunk.dead:
                continue
            seq = chunk.seq
            self._digests[seq.seq_id] = digest = self._digest_with(chunk)
            self._num_cached[seq.seq_id] = num_tokens = chunk.start + chunk.num_tokens
            if chunk.samples:
                outputs.append(StepOutput(seq.seq_id, [_next_token(seq, num_tokens << 32 | digest)]))
        if self._has_cost:
            _wait_until(begin_s + self._cost_s(chunks))
        return outputs

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._num_cached.pop(seq_id, None)
            self._digests.pop(seq_id, None)

    def close(self) -> None:
        self._num_cached.clear()
        self._digests.clear()

    def _begin_with_hit(self, seq: Sequence, start: int) -> None:
        self._num_cached[seq.seq_id] = start
        self._digests[seq.seq_id] = self._block_digests[seq.block_ids[start // KV_BLOCK - 1]]

    def _digest_with(self, chunk: ScheduledChunk) -> int:
        """The digest of its sequence with the tokens of `chunk`; on the way, those of its blocks are kept."""
        seq, token_ids = chunk.seq, chunk.token_ids
        digest, done = self._digests.get(seq.seq_id, 0), 0
        for index in range(chunk.start // KV_BLOCK, len(seq.prefix_keys)):
            end = (index + 1) * KV_BLOCK - chunk.start
            if end > len(token_ids):
                break
            digest, done = zlib.crc32(array("I", token_ids[done:end]), digest), end
            self._block_digests[seq.block_ids[index]] = digest
        return zlib.crc32(array("I", token_ids[done:]), digest)

    def _cost_s(self, chunks: Seq[ScheduledChunk]) -> float:
        num_rows = sum(1 for chunk in chunks if chunk.dead or chunk.is_decode)
        num_prompt_tokens = sum(chunk.num_tokens for chunk in chunks if not (chunk.dead or chunk.is_decode))
        return self._step_s + self._row_s * num_rows + self._prompt_token_s * num_prompt_tokens


def _next_token(seq: Sequence, prefix: int) -> int:
    """`prefix` names the tokens so far: of `_NUM_CHOICES` likely successors, greedy takes the first."""
    params, choice = seq.params, 0
    if params.has_penalties or params.min_p or params.banned_at(len(seq.output_token_ids)):
        return choose_token(_logits(prefix), seq)
    if params.temperature > 0:
        num_choices = min(params.top_k or _NUM_CHOICES, math.ceil(params.top_p * _NUM_CHOICES))
        choice = int(uniform_draw(params.seed, len(seq.output_token_ids)) * num_choices)
    return _successor(prefix, choice)


def _logits(prefix: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The same successors as scores, for sampling that needs some; each is a little behind the one before."""
    logits = np.full(EOS_TOKEN_ID + 1, -50.0, dtype=np.float32)
    for choice in reversed(range(_NUM_CHOICES)):
        logits[_successor(prefix, choice)] = 1.0 - choice / _NUM_CHOICES / 10
    return logits


def _successor(prefix: int, choice: int) -> int:
    bits = mix64(mix64(prefix) + choice)
    if (bits >> 32) % _EOS_ONE_IN == 0:
        return EOS_TOKEN_ID
    return _ALPHABET[bits % len(_ALPHABET)]


def _wait_until(deadline_s: float) -> None:
    remaining_s = deadline_s - time.perf_counter()
    if remaining_s > _SPIN_S:
        time.sleep(remaining_s - _SPIN_S)
    while time.perf_counter() < deadline_s:
        pass
