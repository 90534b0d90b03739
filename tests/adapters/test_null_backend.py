"""The cost model on a clock of its own, the errors, and the tokens of the null backend."""

from __future__ import annotations

import pytest

from adapters import null_backend
from adapters.base import BackendConfig, BackendError, SamplingParams, ScheduledChunk, Sequence
from adapters.null_backend import EOS_TOKEN_ID, NullBackend
from services.engine.messages import StepReport
from services.engine.policies import Policies
from tests.adapters.configs import make_config
from tools.engine_drive import Work, drive

COSTS = make_config("null", null_step_ms=10, null_row_ms=2, null_prompt_token_ms=0.5)


class FakeTime:
    """Time that passes while someone sleeps or looks at the clock; sleeping comes back late."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.naps_s: list[float] = []

    def perf_counter(self) -> float:
        self.now_s += 1e-6
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.naps_s.append(duration_s)
        self.now_s += duration_s + 1e-4


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(null_backend, "time", fake)
    return fake


def prompt_chunk(seq_id: int, num_tokens: int) -> ScheduledChunk:
    return ScheduledChunk(Sequence(seq_id, [seq_id % 256] * num_tokens, SamplingParams()), 0, num_tokens)


def decode_chunk(backend: NullBackend, seq_id: int, *, dead: bool = False) -> ScheduledChunk:
    """A row whose prompt of one token is in the cache already, and its first output too if it is dead."""
    first = prompt_chunk(seq_id, 1)
    seq = first.seq
    seq.output_token_ids += backend.step([first])[0].token_ids
    if dead:
        backend.step([ScheduledChunk(seq, 1, 1)])
    return ScheduledChunk(seq, 1, 1, dead=dead)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_decode", "num_dead", "cost_s"),
    [
        (0, 1, 0, 0.010 + 0.002),
        (0, 3, 2, 0.010 + 5 * 0.002),
        (40, 0, 0, 0.010 + 40 * 0.0005),
        (40, 3, 1, 0.010 + 4 * 0.002 + 40 * 0.0005),
    ],
)
def test_a_step_takes_what_the_cost_model_says(
    fake_time: FakeTime, num_prompt_tokens: int, num_decode: int, num_dead: int, cost_s: float
) -> None:
    backend = NullBackend(COSTS)
    chunks = [
        decode_chunk(backend, seq_id, dead=seq_id < num_dead) for seq_id in range(num_decode + num_dead)
    ]
    if num_prompt_tokens:
        chunks.append(prompt_chunk(99, num_prompt_tokens))

    begin_s = fake_time.now_s
    backend.step(chunks)
    assert fake_time.now_s - begin_s == pytest.approx(cost_s, abs=5e-6)


def test_a_free_step_does_not_wait(fake_time: FakeTime) -> None:
    backend = NullBackend(BackendConfig())
    backend.step([prompt_chunk(1, 100)])
    assert fake_time.naps_s == []


def test_a_short_wait_is_spun_and_never_slept(fake_time: FakeTime) -> None:
    NullBackend(make_config("null", null_step_ms=0.2)).step([prompt_chunk(1, 1)])
    assert fake_time.naps_s == []


@pytest.mark.parametrize(
    ("start", "dead", "message"),
    [(2, False, "must start at 4, not at 2"), (4, True, "must start at 3, not at 4")],
)
def test_a_chunk_that_does_not_continue_its_slot_is_refused(start: int, dead: bool, message: str) -> None:
    backend = NullBackend(BackendConfig())
    seq = Sequence(1, [65] * 8, SamplingParams())
    backend.step([ScheduledChunk(seq, 0, 4)])
    with pytest.raises(BackendError, match=message):
        backend.step([prompt_chunk(2, 3), ScheduledChunk(seq, start, 1, dead=dead)])
    backend.step([prompt_chunk(2, 3), ScheduledChunk(seq, 4, 4)])


def test_capacity_is_that_of_the_configured_batch() -> None:
    info = NullBackend(BackendConfig(max_batch_size=8, max_model_len=100)).info
    assert (info.max_batch_size, info.max_model_len, info.kv_capacity_tokens) == (8, 100, 800)
    assert NullBackend(BackendConfig(max_batch_size=8)).info.kv_capacity_tokens == 8 * 4096


def test_tokens_are_text_and_an_answer_ends_some_day() -> None:
    backend = NullBackend(BackendConfig())
    seq = Sequence(1, list(b"Tell me a story"), SamplingParams())
    while EOS_TOKEN_ID not in seq.output_token_ids:
        chunk = ScheduledChunk(seq, seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens)
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids += backend.step([chunk])[0].token_ids
    text = bytes(seq.output_token_ids[:-1]).decode("ascii")
    assert 100 < len(text) < 4000
    assert text.replace(" ", "").isalpha()
    assert 0.05 < text.count(" ") / len(text) < 0.25


def test_a_shared_block_holds_what_its_tokens_say() -> None:
    """Whoever begins with the wrong block gets other tokens; blocks go round many times here."""
    texts = [[65 + n] * 70 for n in range(3)]
    work = [Work(texts[n % 3][: 20 + n] + [n] * 9, 1 + n % 40) for n in range(50)]

    def answers(policies: Policies) -> tuple[list[list[int]], int]:
        made: list[list[int]] = [[] for _ in work]
        hits = []

        def publish(report: StepReport) -> None:
            for update in report.updates:
                made[update.seq_id] += update.token_ids
            hits.append(report.record.num_cached_tokens if report.record else 0)

        drive(NullBackend(BackendConfig()), "continuous", work, policies=policies, publish=publish)
        return made, sum(hits)

    truth, num_hits = answers(Policies())
    assert num_hits == 0
    made, num_hits = answers(Policies(kv_policy="paged", prefix_cache=True, kv_capacity_tokens=400))
    assert made == truth
    assert num_hits > 300
