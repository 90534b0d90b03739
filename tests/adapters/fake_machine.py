"""A stand-in for a CUDA device: host memory, a plain attention, and graphs that are Python functions.

Work runs at once; the log tells what was captured, replayed, recorded and waited for, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch.nn import functional as F

from adapters.torch_backend.cuda.fused import rotated
from adapters.torch_backend.model.flash_attention import KeySpans, plain_attention

GIB = 1 << 30


def row_by_row(q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
    """The plain attention with every row as an entry of its own: no row's bits depend on another's."""
    starts, places, lengths = (t.tolist() for t in (spans.row_starts, spans.key_starts, spans.lengths))
    entries = [
        (row, place, length - (end - 1 - row))
        for start, end, place, length in zip(starts[:-1], starts[1:], places[:-1], lengths, strict=True)
        for row in range(start, end)
    ]
    out = torch.full_like(q, torch.nan)  # what the operator leaves undefined
    for row, *entry in entries:
        out[row] = _one_row(q[[row]], k, v, *entry, *rest)[0]
    return out


def _one_row(q: Any, k: Any, v: Any, place: int, length: int, *rest: Any) -> Any:
    numbers = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [place, 0], [length]))
    return plain_attention(q, k, v, KeySpans(*numbers, max_rows=1), *rest)  # type: ignore[misc]


class PlainOps:
    """What the Triton kernels compute, by torch's own operators."""

    def __init__(self, attend: Any = plain_attention) -> None:
        self._attend = attend
        self.calls: set[str] = set()

    def attend(self, q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
        """As the kernel: rows without keys are left as they are in the last argument, if it is a tensor."""
        (*rest, out) = rest if torch.is_tensor(rest[-1]) else (*rest, torch.empty_like(q))
        for row in spans.lengths.nonzero()[:, 0].tolist():
            numbers = ([0, 1], [int(spans.key_starts[row]), 0], [int(spans.lengths[row])])
            one = KeySpans(*(torch.tensor(values, dtype=torch.int32) for values in numbers), max_rows=1)  # type: ignore[misc]
            out[row] = self._attend(q[[row]], k, v, one, *rest)[0]
        return out

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        self.calls.add("norm")
        return F.rms_norm(x, x.shape[1:], weight, eps)

    def rotate_and_store(
        self, qkv: Any, table: Any, slots: Any, positions: Any, k_cache: Any, v_cache: Any
    ) -> None:
        self.calls.add("rotate_and_store")
        kv_heads = k_cache.shape[2]
        turned = rotated(qkv[:, :-kv_heads].float(), *(t[positions] for t in table)).to(qkv.dtype)
        k_cache[slots, positions] = turned[:, -kv_heads:]
        v_cache[slots, positions] = qkv[:, -kv_heads:]
        qkv[:, : -2 * kv_heads] = turned[:, :-kv_heads]

    def gated(self, x: Any) -> Any:
        self.calls.add("gated")
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class FakeGraph:
    """`replay` calls what was captured, over the tensors that it captured."""

    def __init__(self, log: list[str], failure: Exception | None) -> None:
        self._log = log
        self._failure = failure

    def capture(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        self._log.append("capture")
        self._work = work

    def replay(self) -> None:
        self._log.append("replay")
        self._work()


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.is_recorded = False

    def record(self) -> None:
        self._log.append("record")
        self.is_recorded = True

    def synchronize(self) -> None:
        assert self.is_recorded, "nobody waits for what was never recorded"
        self._log.append("wait")


class FakeMachine:
    def __init__(
        self,
        *,
        free_bytes: int = GIB,
        attention: Any = plain_attention,
        capture_failure: Any = None,
        ops: Any = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.attention = attention
        self.log: list[str] = []
        self._free_bytes = free_bytes
        self._capture_failure = capture_failure
        self._ops = ops

    def fused_ops(self) -> Any:
        return self._ops

    def make_current(self) -> None:
        self.log.append("current")

    def wait(self) -> None:
        self.log.append("wait for all")

    def free_bytes(self) -> int:
        return self._free_bytes

    def pinned(self, num_words: int) -> Any:
        return torch.full((num_words,), -999, dtype=torch.int64)

    def event(self) -> FakeEvent:
        return FakeEvent(self.log)

    def graph(self) -> FakeGraph:
        return FakeGraph(self.log, self._capture_failure)
