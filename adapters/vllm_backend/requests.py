"""The requests of vLLM's engine: one for each sequence, from its first chunk on.

vLLM cuts prompts itself, by a budget of tokens a step that is the lab's own. So it may be a little ahead of
the lab or behind it: a request steps until it has what the lab asks for, and a token that comes early waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from typing import Any

from vllm import SamplingParams as VllmParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from adapters.base import LEAST_TEMPERATURE, BackendError, SamplingParams, ScheduledChunk, Sequence
from adapters.vllm_backend.scheduler import StepScheduler


class Request:
    """`request_id` is the scheduler's, not the one that was given. `unread` holds tokens that the lab has not
    asked for yet."""

    __slots__ = ("request_id", "unread")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.unread: deque[int] = deque()


class Requests:
    """A request may grow to `max_model_len` tokens, past its `max_tokens`: a dead row computes on."""

    def __init__(self, engine: Any, scheduler: StepScheduler, max_model_len: int) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._max_model_len = max_model_len
        self._requests: dict[int, Request] = {}

    def compute(self, chunks: Seq[ScheduledChunk]) -> dict[int, int]:
        """Step until all of `chunks` are computed; gives the token of each sequence that samples.

        Raises:
            BackendError: vLLM failed, or ended a sequence too early. No token is taken from anyone then.
        """
        for chunk in chunks:
            if not chunk.dead and chunk.seq.seq_id not in self._requests:
                self._add(chunk.seq)
        dead = set()
        for chunk in chunks:
            if chunk.dead and (request := self._requests.get(chunk.seq.seq_id)):  # none after a failed step
                dead.add(request.request_id)
        behind = self._behind(chunks)
        while behind or dead:
            self._step(behind, dead)
            behind, dead = self._behind(chunks), set()
            if behind and not self._scheduler.num_scheduled:
                raise BackendError(f"vLLM computes nothing for {len(behind)} sequences: its cache is full")
        unread = {
            chunk.seq.seq_id: self._requests[chunk.seq.seq_id].unread for chunk in chunks if chunk.samples
        }
        for seq_id, tokens in unread.items():
            if not tokens:
                raise BackendError(f"vLLM ended sequence {seq_id} without a token")
        return {seq_id: tokens.popleft() for seq_id, tokens in unread.items()}

    def cancel(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id, None)
        if request is not None:
            self._engine.abort_request([request.request_id], internal=True)

    def _behind(self, chunks: Seq[ScheduledChunk]) -> set[str]:
        """Ids of the requests that have less in the cache than their chunk ends with."""
        behind = set()
        for chunk in chunks:
            if not chunk.dead:
                request_id = self._requests[chunk.seq.seq_id].request_id
                num_computed = self._scheduler.num_computed(request_id)
                if num_computed is not None and num_computed < chunk.start + chunk.num_tokens:
                    behind.add(request_id)
        return behind

    def _add(self, seq: Sequence) -> None:
        token_ids = [*seq.prompt_token_ids, *seq.output_token_ids]
        room = self._max_model_len + 1 - len(token_ids)
        params = vllm_params(seq.params, room, len(seq.output_token_ids))
        request_id = self._engine.add_request(
            str(seq.seq_id), TokensPrompt(prompt_token_ids=token_ids), params
        )
        self._requests[seq.seq_id] = Request(request_id)

    def _step(self, live: set[str], dead: set[str]) -> None:
        self._scheduler.wanted, self._scheduler.dead = live | dead, dead
        try:
            outputs = self._engine.step()
        except Exception as error:  # its errors have no common base
            raise BackendError(f"a step of vLLM failed: {type(error).__name__}: {error}") from error
        for output in outputs:
            self._requests[int(output.request_id)].unread.extend(output.outputs[0].token_ids)


def vllm_params(
    params: SamplingParams, max_new_tokens: int, num_outputs: int = 0, ends_at: Seq[int] = ()
) -> VllmParams:
    """vLLM ends an answer after `max_new_tokens` and at the tokens of `ends_at`; where there are none, other
    ends are the scheduler's to see."""
    sampling: dict[str, Any] = {"temperature": 0.0}
    if params.temperature >= LEAST_TEMPERATURE:
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": params.seed,
        }
    made = VllmParams(
        max_tokens=max_new_tokens,
        ignore_eos=True,
        stop_token_ids=list(ends_at),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        min_tokens=max(0, params.min_tokens - num_outputs),  # a preempted one has some
        **sampling,
    )
    # Banned before `min_tokens`, whether or not they end the answer after them.
    made._all_stop_token_ids = set(params.ending_token_ids)
    return made
