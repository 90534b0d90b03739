"""The engine and transformers' continuous batching on the same prompts, each in a process of its own."""

from __future__ import annotations

import time
from typing import Any

from tools.engine_drive import Work
from tools.gpu.backend import ModelSize, drive_all, free, load, loadable, make_work
from tools.gpu.paged_attention import choose_attention, is_fair, reads_in_place
from tools.gpu.part import LOADED, PartRun
from tools.transformers_runs import continuous_batching, load_reference

_TABLE = "transformers' continuous batching beside the engine's"
_ENGINE = "engine, continuous"


def engine(part: PartRun) -> None:
    with loadable(part) as config:
        backend = load(part, config)
        for num_requests in part.sizes.yardstick:
            work = make_work(part, num_requests, backend.info)
            drive_all(part, backend, "continuous", make_work(part, 2, backend.info, max_tokens=4), 2)
            started_s = time.perf_counter()
            drive_all(part, backend, "continuous", work, num_requests)
            took_s = time.perf_counter() - started_s
            num_tokens = sum(item.max_tokens for item in work)
            rate = num_tokens / took_s
            part.add(_TABLE, _ENGINE, requests=num_requests, tokens=num_tokens, tokens_per_s=rate)


def transformers(part: PartRun) -> None:
    """Greedy as well. All of the work is done once before it is timed: graphs are captured on the way."""
    with loadable(part) as config:
        model = load_reference(config, config.dtype, config.device)
        attention = choose_attention(model)
        if not is_fair(attention):
            part.note(f"{attention}: transformers' batching without flash attention is not comparable")
        longest = part.known("max_model_len", LOADED, name="yardstick, engine")
        size = ModelSize(model.config.vocab_size, longest or model.config.max_position_embeddings)
        for num_requests in part.sizes.yardstick:
            work = make_work(part, num_requests, size)
            part.run(f"{num_requests} requests", lambda work=work: _time(part, model, work, attention), 10)  # type: ignore[misc]
            free()


def _time(part: PartRun, model: Any, work: list[Work], attention: str) -> None:
    num_tokens = sum(item.max_tokens for item in work)
    in_place = reads_in_place(attention)
    with continuous_batching(model, work, one_block=in_place) as answer_all:
        for is_timed in (False, True):
            started_s = time.perf_counter()
            answers = answer_all(work, part.left_s)
            took_s = time.perf_counter() - started_s
            part.say(f"{len(work)} requests, {'timed' if is_timed else 'not timed'}: {took_s:.1f} s")
        if [len(answer) for answer in answers] != [item.max_tokens for item in work]:
            raise RuntimeError("transformers' continuous batching gave answers of other lengths")
    rate = num_tokens / took_s
    ours = part.known("tokens_per_s", _TABLE, name=_ENGINE, requests=len(work), tokens=num_tokens)
    part.add(
        _TABLE, "transformers", requests=len(work), tokens=num_tokens, tokens_per_s=rate,
        engine_is_faster=ours / rate if ours else None,
        attention=attention + ("" if is_fair(attention) else ", not comparable"),
        keys="in place" if in_place else "by transformers",
    )  # fmt: skip
