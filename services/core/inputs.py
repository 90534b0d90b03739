"""From the bytes of a request to sequences that the engine can take.

Everything that is wrong with a request alone is found here, before the queue is looked at, so that it gets
its own error even when the queue is full. Long texts are tokenized in a thread, with `encode_batch`, which
leaves the interpreter to others: answers keep streaming meanwhile. Chats are rendered beside the loop,
however short: how long that takes is the template's affair.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import TypeVar

from adapters.base import BackendInfo, RequestTooLong, SamplingParams, Sequence
from adapters.sampling import mix64
from adapters.text.detokenizer import SpelledStream
from adapters.text.tokenizer import ChatTemplateError, Tokenizer, least_num_tokens
from services import errors
from services.contract.checks import MAX_PROMPTS
from services.contract.requests import DEFAULT_PRIORITY, ChatRequest, GenerateRequest
from services.contract.tokens import DetokenizeRequest
from services.core.byte_limit import ByteLimit
from services.core.outputs import RequestState, SpelledToken
from services.core.special_text import mark_special
from services.engine.limits import SchedulerLimits
from services.settings import Settings

THREAD_ABOVE_CHARS = 16_384
"""Tokenizing this much takes a few milliseconds."""

RENDER_WAIT_S = 5.0
"""A chat that has waited for so long behind others is refused unrendered."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the engine has loaded, with what the API needs to talk about it."""

    info: BackendInfo
    tokenizer: Tokenizer
    limits: SchedulerLimits
    takes_groups: bool


@dataclass(slots=True)
class InputProcessor:
    """Turns requests into sequences; ids go on over all requests of this process."""

    settings: Settings
    loaded: LoadedModel
    byte_limit: ByteLimit = field(default_factory=ByteLimit)
    chat_limit: ByteLimit = field(default_factory=lambda: ByteLimit(at_once=32 << 20))
    renderer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "lab-chat"))
    """A thread of its own: a template that does not end holds up other chats, and nothing else."""
    seq_ids: Iterator[int] = field(default_factory=lambda: count(1))
    group_ids: Iterator[int] = field(default_factory=lambda: count(1))

    def check_before_tokenizing(self, request: GenerateRequest | ChatRequest) -> None:
        """Check what costs nothing to check, before the queue is looked at.

        Raises:
            ApiError: 404 for another model, 422 for a field, 400 for what surely never fits.
        """
        self.check_model(request.model)
        if self.settings.scheduling == "engine" and request.priority != DEFAULT_PRIORITY:
            raise errors.unsupported_field("priority", "is nothing that SCHEDULING=engine knows")
        self._check_logprobs(request)
        if isinstance(request, ChatRequest):
            return
        if request.num_prompts * request.n > MAX_PROMPTS:
            raise errors.bad_field("n", f"times the number of prompts must not exceed {MAX_PROMPTS}")
        if request.prompt:
            self._check_length(request.prompt, "prompt")

    def _check_logprobs(self, request: GenerateRequest | ChatRequest) -> None:
        if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
            raise errors.bad_field("top_logprobs", "needs logprobs: true")
        if request.num_logprobs is None:
            return
        info = self.loaded.info
        if not info.has_logprobs:
            raise errors.unsupported_field("logprobs", f"is not supported by the backend {info.backend}")
        if isinstance(request, GenerateRequest) and request.echo:
            raise errors.bad_field("logprobs", "is not given for a prompt: leave out echo")

    def _check_length(self, prompts: Seq[str] | Seq[list[int]], param: str) -> None:
        room = self.loaded.limits.max_sequence_tokens
        least = max(least_num_tokens(self.loaded.tokenizer, prompt) for prompt in prompts)
        if least >= room:
            problem = f"the prompt has at least {least} tokens, at most {room} fit with the answer"
            raise errors.too_long(f"{problem}: shorten it", param)

    def check_model(self, asked: str | None) -> None:
        """Raises: ApiError: 404, another model is served."""
        served = self.loaded.info.model
        if asked is not None and asked not in (served, self.settings.model):
            raise errors.unknown_model(asked, served)

    def warm_up(self) -> None:
        """Have what renders chats started, so that the first chat does not wait for it."""
        hello = [{"role": "user", "content": "hello"}]
        self.renderer.submit(self.loaded.tokenizer.render_chat, hello)

    async def tokenize(self, request: GenerateRequest | ChatRequest) -> list[int]:
        """The ids of its one prompt. Raises: ApiError, as `process` does."""
        self.check_before_tokenizing(request)
        if isinstance(request, GenerateRequest) and request.num_prompts > 1:
            raise errors.bad_field("prompt", "must be a single prompt on this path")
        (token_ids,) = await self._token_ids(request)
        return token_ids

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """The text of the ids, special tokens spelled out. Raises: ApiError for an id that is none."""
        self.check_model(request.model)
        tokenizer = self.loaded.tokenizer
        self._check_ids(request.tokens, "tokens")
        stream = SpelledStream(tokenizer.stream(), tokenizer.special_tokens)
        work = partial(stream.push, request.tokens)
        is_short = len(request.tokens) <= THREAD_ABOVE_CHARS
        return (work() if is_short else await asyncio.to_thread(work)) + stream.flush()

    async def process(
        self, request: GenerateRequest | ChatRequest, arrival_s: float, *, exclusive: bool = False
    ) -> list[Sequence]:
        """One sequence a prompt, in order, or `n` of them.

        Raises:
            ApiError: 422 for a field, 400 for what can never fit.
        """
        param = "prompt" if isinstance(request, GenerateRequest) and request.prompt else "messages"
        prompts = await self._token_ids(request)
        budgets = _per_prompt(request.max_tokens, len(prompts), "max_tokens")
        seeds = _per_prompt(request.seed, len(prompts), "seed")
        group_id = next(self.group_ids)
        sequences = [
            Sequence(
                seq_id=next(self.seq_ids),
                prompt_token_ids=prompt,
                params=self._sampling(request, budget, _seed_of(seed, choice), len(prompt)),
                priority=request.priority,
                group_id=group_id,
                group_size=len(prompts) * request.n,
                arrival_s=arrival_s,
                exclusive=exclusive,
                client=request.user if isinstance(request.user, str) else "",
                expected_tokens=request.expected_tokens,
            )
            for prompt, budget, seed in zip(prompts, budgets, seeds, strict=True)
            for choice in range(request.n)
        ]
        try:
            self.loaded.limits.check(sequences, together=self.loaded.takes_groups)
        except RequestTooLong as error:
            raise errors.too_long(str(error), param) from None
        return sequences

    def request_state(
        self, request: GenerateRequest | ChatRequest, request_id: str, sequences: list[Sequence]
    ) -> RequestState:
        """What gathers the output of `sequences`, which `process` made of this request."""
        tokenizer = self.loaded.tokenizer
        echoes: list[str] = []
        if isinstance(request, GenerateRequest) and request.echo:
            texts = [item if isinstance(item, str) else tokenizer.decode(item) for item in request.prompt]
            echoes = [text for text in texts for _ in range(request.n)]
        # Only where it matters is asked which tokens are special: llama.cpp has to look at all of them.
        stops: Seq[str] = request.stop
        spelled: Mapping[int, str] = {} if request.skip_special_tokens else tokenizer.special_tokens
        has_marks = False
        if stops and request.skip_special_tokens:
            stops, spelled = mark_special(stops, tokenizer.special_tokens)
            has_marks = bool(spelled)
        streams = [tokenizer.stream() for _ in sequences]
        return RequestState(
            request_id,
            sequences,
            [SpelledStream(stream, spelled) for stream in streams] if spelled else streams,
            stops,
            streamed=request.stream,
            has_marks=has_marks,
            keeps_prompts=request.return_token_ids,
            echoes=echoes,
            max_unread_tokens=self.settings.max_unread_tokens,
            spelled=None if request.num_logprobs is None else speller(tokenizer),
        )

    async def _token_ids(self, request: GenerateRequest | ChatRequest) -> list[list[int]]:
        """The ids of each prompt, all of them rows of the model's embedding."""
        if isinstance(request, ChatRequest):
            chats = [[message.for_template for message in request.messages]]
            return await self._chat_token_ids(chats, "messages", request.chat_template_kwargs)
        if request.messages:
            chats = [[message.for_template for message in chat] for chat in request.messages]
            return await self._chat_token_ids(chats, "messages")
        texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
        if request.chat:
            if not texts:
                raise errors.bad_field("chat", "needs a text as prompt")
            return await self._chat_token_ids([[{"role": "user", "content": text}] for text in texts], "chat")
        if texts:
            return await self._encode(texts, "prompt", add_special_tokens=request.add_special_tokens)
        ids = [prompt for prompt in request.prompt if not isinstance(prompt, str)]
        self._check_ids(chain(*ids), "prompt")
        return ids

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        vocab_size = self.loaded.info.vocab_size
        if max(ids, default=0) >= vocab_size:
            raise errors.bad_field(param, f"holds a token id that is not below {vocab_size}")

    async def _encode(
        self, texts: list[str], param: str, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        tokenizer = self.loaded.tokenizer
        encoded = await self._beside_the_loop(
            texts, lambda: tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        )
        if not all(encoded):
            raise errors.bad_field(param, "has no tokens")
        vocab_size, highest = self.loaded.info.vocab_size, max(map(max, encoded))
        if highest >= vocab_size:  # an added token that the weights know nothing of
            problem = f"holds a text that is token {highest} here, but the model has {vocab_size} tokens"
            raise errors.bad_field(param, problem)
        return encoded

    async def _beside_the_loop(self, texts: Seq[str], work: Callable[[], ResultT]) -> ResultT:
        """Work on `texts`; if they are long, in a thread and as far as the limit of bytes allows."""
        if sum(map(len, texts)) <= THREAD_ABOVE_CHARS:
            return work()
        async with self.byte_limit.hold(_num_bytes(texts)):
            return await asyncio.to_thread(work)

    async def _chat_token_ids(
        self,
        chats: Seq[Seq[Mapping[str, object]]],
        param: str,
        options: Mapping[str, object] | None = None,
    ) -> list[list[int]]:
        num_bytes = _num_bytes(str(message["content"]) for messages in chats for message in messages)
        late_s = time.monotonic() + RENDER_WAIT_S

        def render() -> list[str]:
            if time.monotonic() > late_s:
                raise errors.chats_wait()
            return [self.loaded.tokenizer.render_chat(messages, options) for messages in chats]

        try:
            async with self.chat_limit.hold(num_bytes):
                texts = await asyncio.get_running_loop().run_in_executor(self.renderer, render)
        except ChatTemplateError as error:
            raise errors.bad_field(param, f"cannot be turned into a prompt: {error}") from None
        self._check_length(texts, param)
        return await self._encode(texts, param, add_special_tokens=False)  # the template has them

    def _sampling(
        self,
        request: GenerateRequest | ChatRequest,
        budget: int | None,
        seed: int | None,
        num_prompt_tokens: int,
    ) -> SamplingParams:
        """Without `budget` the default budget is cut to what fits. Without `seed` or SEED it is random."""
        settings = self.settings
        if budget is None:
            room = self.loaded.limits.max_sequence_tokens - num_prompt_tokens
            budget = max(1, min(settings.max_tokens, room))
        if seed is None:
            seed = random.getrandbits(62) if settings.seed is None else settings.seed
        if request.min_tokens > budget:
            raise errors.bad_field("min_tokens", f"is {request.min_tokens}, more than max_tokens, {budget}")
        vocab_size = self.loaded.info.vocab_size
        if request.stop_token_ids and max(request.stop_token_ids) >= vocab_size:
            raise errors.bad_field("stop_token_ids", f"holds an id that is not below {vocab_size}")
        own_ends = () if request.ignore_eos else self.loaded.info.eos_token_ids
        endings = (*request.stop_token_ids, *(i for i in own_ends if i < vocab_size))
        return SamplingParams(
            max_tokens=budget,
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=settings.top_p if request.top_p is None else request.top_p,
            top_k=settings.top_k if request.top_k is None else request.top_k,
            seed=seed,
            ignore_eos=request.ignore_eos,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            stop_token_ids=request.stop_token_ids,
            min_tokens=request.min_tokens if endings or request.stop else 0,
            ending_token_ids=endings if request.min_tokens else (),
            num_logprobs=request.num_logprobs,
        )


def speller(tokenizer: Tokenizer) -> Callable[[int], SpelledToken]:
    """Of one token; a special one as it is written."""
    special = tokenizer.special_tokens

    def spelled(token_id: int) -> SpelledToken:
        if text := special.get(token_id):
            return SpelledToken(text, text.encode())
        raw = tokenizer.token_bytes(token_id)
        if raw is None:
            text = tokenizer.decode([token_id])
            return SpelledToken(text, None if "\ufffd" in text else text.encode())
        try:
            return SpelledToken(raw.decode(), raw)
        except UnicodeDecodeError:
            return SpelledToken("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    return spelled


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _seed_of(seed: int | None, choice: int) -> int | None:
    """The first of `n` choices gets what a request with one choice gets."""
    return seed if seed is None or choice == 0 else mix64(seed + choice) >> 1


def _per_prompt(value: int | list[int] | None, num_prompts: int, name: str) -> list[int] | list[None]:
    if value is None:
        return [None] * num_prompts
    if isinstance(value, int):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise errors.bad_field(name, f"has {len(value)} entries for {num_prompts} prompts")
    return value
