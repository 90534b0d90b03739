"""The requests of OpenVINO's pipeline: one for each sequence whose prompt is whole.

One step of the pipeline gives a token to every request that it holds, and there is no way to leave one out.
So a sequence that has no row in a step of the lab computes its next token all the same. That token is kept
and handed out when the lab asks for it. A token depends on its own sequence alone, so it is the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from adapters.base import LEAST_TEMPERATURE, BackendError, SamplingParams, Sequence
from adapters.sampling import mix64


class Request:
    """`unread` holds tokens that the lab has not asked for yet."""

    __slots__ = ("handle", "unread")

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.unread: deque[int] = deque()

    def read(self) -> None:
        while self.handle.can_read():
            (output,) = self.handle.read().values()
            self.unread.extend(output.generated_ids)


class Requests:
    """A request may grow to `max_model_len` tokens, past its `max_tokens`: a dead row computes on."""

    def __init__(self, pipeline: Any, max_model_len: int) -> None:
        self._pipeline = pipeline
        self._max_model_len = max_model_len
        self._requests: dict[int, Request] = {}

    def add(self, seq: Sequence) -> None:
        """Hand a sequence over; the next step of the pipeline computes its whole prompt."""
        if seq.seq_id in self._requests:
            return
        token_ids: Seq[int] = [*seq.prompt_token_ids, *seq.output_token_ids]
        config = _generation_config(
            seq.params, self._max_model_len + 1 - len(token_ids), len(seq.output_token_ids)
        )
        tensor = openvino.Tensor(np.array([token_ids], dtype=np.int64))
        self._requests[seq.seq_id] = Request(self._pipeline.add_request(seq.seq_id, tensor, config))

    def step_until(self, wanted: Iterable[int]) -> dict[int, int]:
        """The next token of each of the `wanted` sequences, after as many steps of the pipeline as it takes.

        Raises:
            BackendError: OpenVINO failed, or gave a sequence no token. No token is taken from anyone then.
        """
        requests = {seq_id: self._requests[seq_id] for seq_id in wanted}
        while not all(request.unread for request in requests.values()):
            self._step()
            for seq_id, request in requests.items():
                status = request.handle.get_status()
                if not request.unread and status != genai.GenerationStatus.RUNNING:
                    raise BackendError(f"OpenVINO ended sequence {seq_id} without a token ({status.name})")
        return {seq_id: request.unread.popleft() for seq_id, request in requests.items()}

    def step_once(self) -> None:
        """A step that nobody asks for a token, such as one of dead rows alone."""
        if self._pipeline.has_non_finished_requests():
            self._step()

    def cancel(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id, None)
        if request is not None:
            request.handle.cancel()  # the pipeline's next step does without it

    def _step(self) -> None:
        try:
            self._pipeline.step()
        except RuntimeError as error:
            raise BackendError(f"a step of OpenVINO failed: {error}") from error
        for request in self._requests.values():
            request.read()


def _generation_config(params: SamplingParams, max_new_tokens: int, num_outputs: int) -> Any:
    """OpenVINO ends no answer itself: what ends one is the scheduler's to see.

    With `ignore_eos` its `stop_token_ids` end nothing either, and are only banned before `min_new_tokens`.
    """
    config = genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.ignore_eos = True
    config.repetition_penalty = params.repetition_penalty
    config.presence_penalty = params.presence_penalty
    config.frequency_penalty = params.frequency_penalty
    if params.min_tokens and params.ending_token_ids:
        config.min_new_tokens = max(0, params.min_tokens - num_outputs)  # a preempted one has some
        config.stop_token_ids = set(params.ending_token_ids)
    if params.temperature >= LEAST_TEMPERATURE:
        config.do_sample = True
        config.temperature = params.temperature
        config.top_p = params.top_p
        config.top_k = params.top_k
        config.min_p = params.min_p
        # OpenVINO's generator takes 32 bits; scrambled first, so that every bit of a seed matters.
        config.rng_seed = mix64(params.seed) & 0xFFFF_FFFF
    return config
