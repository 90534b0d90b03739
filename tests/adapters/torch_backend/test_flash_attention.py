"""Starts, lengths and windows that flash attention is given, with a plain operator in its place."""

from __future__ import annotations

import logging
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from adapters.torch_backend.cuda import flash_check
from adapters.torch_backend.model.attention import StepLayout, prompt_blocks
from adapters.torch_backend.model.flash_attention import (
    FlashPart,
    FlashStep,
    KeySpans,
    covers,
    decode_spans,
    flash_attention,
    plain_attention,
)
from adapters.torch_backend.model.kv_cache import SlotCache

HEADS, DIM, MAX_LEN = 4, 16, 192
DECODES = [(0, 1), (2, 150), (3, 63)]
"""Slot and tokens in it, the new one included."""
PROMPTS = [(4, 70, 70), (1, 100, 36)]
"""Slot, tokens in it, and how many of them are new."""


def int32(values: list[int]) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def mixed_layout(cache: SlotCache, flash: bool, padding: int) -> StepLayout:
    slots = [slot for slot, _ in DECODES]
    positions = [length - 1 for _, length in DECODES]
    starts, places = list(range(len(DECODES))), [slot * MAX_LEN for slot, _ in DECODES]
    lengths = [length for _, length in DECODES]
    blocks = []
    for slot, length, count in PROMPTS:
        starts.append(len(slots))
        places.append(slot * MAX_LEN)
        lengths.append(length)
        blocks += prompt_blocks(len(slots), slot, length - count, count, 64)
        slots += [slot] * count
        positions += range(length - count, length)
    used = len(slots)
    spans = KeySpans(int32([*starts, used]), int32([*places, 0]), int32(lengths), max_rows=70)
    slots += [cache.scratch_slot] * padding
    positions += [0] * padding
    return StepLayout(
        cache,
        torch.tensor(slots),
        torch.tensor(positions),
        len(DECODES),
        blocks,
        used,
        flash=FlashStep([FlashPart(plain_attention, 0, used, spans)]) if flash else None,
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_mixed_step_attends_what_the_general_path_attends(
    kv_heads: int, window: int | None, padding: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = []
    noise = [torch.randn(6, MAX_LEN, kv_heads, DIM, generator=generator) for _ in range(2)]
    num_rows = len(mixed_layout(SlotCache(5, MAX_LEN), False, padding).slots)
    q = torch.randn(num_rows, HEADS, DIM, generator=generator).bfloat16()
    k, v = (torch.randn(num_rows, kv_heads, DIM, generator=generator).bfloat16() for _ in range(2))
    for flash in (False, True):
        cache = SlotCache(5, MAX_LEN)
        for tensor, values in zip(cache.layer(0, k, v), noise, strict=True):
            tensor.copy_(values)
        outputs.append(mixed_layout(cache, flash, padding).attend(0, q, k, v, 0.3, window).float())
    general, fast = outputs
    assert torch.allclose(general, fast, atol=0.03), (general - fast).abs().max()
    assert fast.shape == general.shape
    assert not fast[num_rows - padding :].any()


def test_decode_spans_are_one_row_each() -> None:
    spans = decode_spans(torch.tensor([3, 0, 7]), torch.tensor([0, 41, 9]), 100)
    assert spans.row_starts.tolist() == [0, 1, 2, 3]
    assert spans.key_starts.tolist()[:-1] == [300, 0, 700]
    assert spans.lengths.tolist() == [1, 42, 10]
    assert {t.dtype for t in (spans.row_starts, spans.key_starts, spans.lengths)} == {torch.int32}


@pytest.mark.parametrize("window", [0, 24])
def test_torch_takes_the_arguments(window: int) -> None:
    """On the device that computes nothing: names, order and types of the operator's arguments are torch's."""
    q = torch.empty(3, 8, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(800, 2, 64, dtype=torch.bfloat16, device="meta")
    spans = decode_spans(*(torch.zeros(3, dtype=torch.long, device="meta") for _ in range(2)), 100)
    assert flash_attention(q, k, k, spans, 100, 0.1, window).shape == q.shape


def test_the_window_counts_the_row_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Aten:
        @staticmethod
        def _flash_attention_forward(*args: Any, **options: Any) -> list[Any]:
            given.update(options, args=args)
            return [args[0]]

    monkeypatch.setattr(torch.ops, "aten", Aten)
    q, spans = torch.empty(1, 2, 8), decode_spans(torch.tensor([0]), torch.tensor([0]), 64)
    flash_attention(q, q, q, spans, 64, 0.5, 24)
    assert (given["window_size_left"], given["window_size_right"], given["scale"]) == (23, 0, 0.5)
    assert given["args"][5:10] == (1, 64, 0.0, True, False)
    flash_attention(q, q, q, spans, 64, 0.5, 0)
    assert given["window_size_left"] is None


@pytest.mark.parametrize(
    ("dtype", "head_dim", "covered"),
    [("bfloat16", 64, True), ("float16", 256, True), ("float32", 64, False), ("bfloat16", 264, False),
     ("bfloat16", 60, False)],
)  # fmt: skip
def test_what_the_operator_takes(dtype: str, head_dim: int, covered: bool) -> None:
    assert covers(getattr(torch, dtype), head_dim, head_dim) is covered
    assert not covers(torch.bfloat16, 64, 32)


SHAPE = (4, 2, 64, torch.bfloat16, torch.device("cpu"))


def test_a_right_operator_passes_the_check() -> None:
    assert flash_check.usable_attention(plain_attention, *SHAPE, window=100) is plain_attention
    assert flash_check.attention_keeps_bits(plain_attention, *SHAPE) in (True, False)


def off_by_one_key(q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
    shorter = KeySpans(spans.row_starts, spans.key_starts + 1, spans.lengths, spans.max_rows)
    return plain_attention(q, k, v, shorter, *rest)


def second_row_missing(q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
    out = plain_attention(q, k, v, spans, *rest)
    if spans.max_rows == 1:
        out[1:] = torch.nan
    return out


def one_long_row_off(q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
    out = plain_attention(q, k, v, spans, *rest)
    if len(spans.lengths) == 6:
        out[1, 2] *= 1.1
    return out


def not_here(*args: Any) -> Any:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (off_by_one_key, "WRONG"),
        (second_row_missing, "WRONG"),
        (one_long_row_off, "WRONG"),
        (not_here, "no kernel image"),
    ],
)
def test_a_wrong_operator_is_refused_loudly(op: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert flash_check.usable_attention(op, *SHAPE) is None
    assert words in caplog.text


def test_bits_that_depend_on_company_are_found() -> None:
    def splits_when_alone(q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
        out = plain_attention(q, k, v, spans, *rest)
        return out * 1.01 if len(spans.lengths) == 1 else out

    assert not flash_check.attention_keeps_bits(splits_when_alone, *SHAPE)


@pytest.mark.parametrize("window", [MAX_LEN, MAX_LEN + 1, 10 * MAX_LEN])
def test_a_window_as_long_as_a_slot_is_none(window: int) -> None:
    given = []

    def noted(*args: Any) -> Any:
        given.append(args[-1])
        return plain_attention(*args)

    cache = SlotCache(5, MAX_LEN)
    layout = mixed_layout(cache, False, 0)
    layout.flash = FlashStep(
        [FlashPart(noted, 0, 3, decode_spans(layout.slots[:3], layout.positions[:3], MAX_LEN))]
    )
    rows = torch.randn(len(layout.slots), HEADS, DIM).bfloat16()
    layout.attend(0, rows, rows, rows, 0.3, window)
    assert given == [0]
