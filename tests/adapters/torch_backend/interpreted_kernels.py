"""The Triton kernels in Triton's interpreter, on a CPU.

`test_triton_kernels` runs this with TRITON_INTERPRET=1 in a process of its own, since Triton reads the
variable when it is imported.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("triton", reason="this torch comes without Triton")

from adapters.torch_backend.cuda import flash_check, fused, triton_kernels
from adapters.torch_backend.cuda.fused import TritonOps, usable_decode_attention, usable_ops
from adapters.torch_backend.model.flash_attention import decode_spans, plain_attention
from adapters.torch_backend.model.llama_shape import LlamaShape

CPU = torch.device("cpu")
OPS = TritonOps(triton_kernels)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a program."""
    monkeypatch.setattr(flash_check, "_MANY", 6)


def llama(heads: int, kv_heads: int, dim: int, hidden: int, inner: int) -> LlamaShape:
    return LlamaShape(heads, kv_heads, dim, hidden, inner, vocab_size=32, eps=1e-5)


def with_kernel(name: str, kernel: Any) -> TritonOps:
    return TritonOps(SimpleNamespace(**{**vars(triton_kernels), name: kernel}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(8, 2, 64), (3, 3, 48), (6, 2, 80), (16, 1, 16), (34, 2, 24)])
@pytest.mark.parametrize("sizes", [(64, 96), (200, 1100)])
def test_norm_rotation_and_gate_are_right(dtype: Any, shape: Any, sizes: Any) -> None:
    assert usable_ops(OPS, llama(*shape, *sizes), dtype, CPU) is OPS


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 2, 64), torch.float16),
        ((1, 1, 8), torch.float32),
        ((5, 1, 80), torch.float32),
        ((34, 2, 24), torch.float16),
    ],
)
@pytest.mark.parametrize("window", [0, 1, 100, 300])
def test_attention_over_permuted_slots(dtype: Any, shape: Any, window: int) -> None:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(2)
    max_len = 640
    wide = torch.randn(7, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    k, v = (torch.randn(9 * max_len, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
    slots = torch.tensor([8, 3, 0, 5, 1, 7, 2])
    positions = torch.tensor([0, 255, 256, 639, 63, 511, 300])
    spans = decode_spans(slots, positions, max_len)
    args = k, v, spans, max_len, 0.2, window
    got, want = OPS.attend(wide[:, :heads], *args), plain_attention(wide[:, :heads], *args)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)
    for row in (1, 3):
        one = decode_spans(slots[[row]], positions[[row]], max_len)
        assert torch.equal(OPS.attend(wide[[row], :heads], k, v, one, *args[3:])[0], got[row])


@pytest.mark.parametrize("window", [0, 100])
def test_rows_in_turns_have_the_same_bits(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    wide, max_len = torch.randn(36, 8, 16, generator=generator), 512
    k, v = (torch.randn(4 * max_len, 2, 16, generator=generator) for _ in range(2))
    rows = torch.arange(36)
    spans = decode_spans(rows % 4, 11 * rows, max_len)
    spans.lengths[5] = 0  # no keys: a row of a prompt, which another attention has written
    args = wide[:, :4], k, v, spans, max_len, 0.25, window
    want = OPS.attend(*args, torch.full((36, 4, 16), 7.0))
    grids = []

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid[0])
            return triton_kernels.attend_part[grid]

    monkeypatch.setattr(fused, "_SCRATCH_BYTES", 20 * 4 * 2 * 18 * 4)
    got = with_kernel("attend_part", Noted()).attend(*args, torch.full((36, 4, 16), 7.0))
    assert grids == [16, 16, 4]
    assert torch.equal(got, want)
    assert (got[5] == 7).all()


def test_the_check_at_start_takes_it() -> None:
    assert usable_decode_attention(OPS, (2, 1, 16), torch.float32, CPU, 300) is not None


@pytest.mark.parametrize("name", ["rms_norm", "rotate_and_store", "silu_times"])
def test_a_kernel_that_does_nothing_is_found(name: str, caplog: Any) -> None:
    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: args[0].fill_(1)

    assert usable_ops(with_kernel(name, Nothing()), llama(4, 2, 16, 64, 96), torch.float32, CPU) is None
    assert "WRONG" in caplog.text


def test_a_key_that_is_left_out_is_found(caplog: Any) -> None:
    class Short:
        def __getitem__(self, grid: Any) -> Any:
            return lambda q, k, v, starts, lengths, *args, **options: triton_kernels.attend_part[grid](
                q, k, v, starts, lengths - (lengths > 1).int(), *args, **options
            )

    ops = with_kernel("attend_part", Short())
    assert usable_decode_attention(ops, (2, 1, 16), torch.float32, CPU) is None
    assert "WRONG" in caplog.text
