"""The compiled kernels against torch, row by row and bit by bit, and how they come to be built."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import Tensor
from torch.nn import functional as F

from adapters.base import KV_BLOCK
from adapters.torch_backend.cpu import build as kernel_build
from adapters.torch_backend.cpu.kernels import CpuKernels, load_kernels
from adapters.torch_backend.model.linear import KernelLinear, TiledLinear, make_linear

MAX_LEN, NUM_SLOTS = 320, 5
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=[0, 1], ids=["in fp32", "by pairs"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernels of both kinds of CPU, as far as this one has what they need."""
    if request.param and not kernel_build.cpu_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU multiplies no pairs of bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_build, "_FLAGS", (*kernel_build._FLAGS, f"-DMULTIPLIES_PAIRS={request.param}"))
        yield tmp_path_factory.mktemp("kernels")


def kernels(folder: Path, dtype: torch.dtype, num_threads: int = 1) -> CpuKernels:
    found = load_kernels(folder, dtype, num_threads)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_a_row(cache: Tensor) -> Tensor:
    """Tables of the blocks of slots that lie in a row."""
    num_slots, max_len = cache.shape[:2]
    return torch.arange(num_slots * (max_len // KV_BLOCK)).view(num_slots, -1)


def tolerance(dtype: torch.dtype) -> float:
    return 2e-6 if dtype is torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 512, 2048])
def test_norm(folder: Path, dtype: torch.dtype, size: int) -> None:
    x, weight = drawn(1, 5, size, dtype=dtype), drawn(2, size, dtype=dtype)
    got = kernels(folder, dtype).norm(x, weight, 1e-5)
    want = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 4099])
def test_argmax(folder: Path, dtype: torch.dtype, size: int) -> None:
    """The first of equals, of which bf16 has many, as NumPy has it."""
    x = drawn(19, 40, size, dtype=dtype)
    x[0] = 3.0
    x[1] = -torch.inf
    x[2, -1] = x[2].max()
    assert kernels(folder, dtype).argmax(x) == x.float().numpy().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (8, 4, 64), (6, 2, 96), (8, 1, 128)])
def test_attention(
    folder: Path, dtype: torch.dtype, window: int, heads: int, kv_heads: int, dim: int
) -> None:
    """Lengths around every edge: one place, full vectors of places, one more, the last place of a slot."""
    positions = [0, 15, 16, 63, 100, 255, MAX_LEN - 1]
    keys, values = (drawn(s, NUM_SLOTS, MAX_LEN, kv_heads, dim, dtype=dtype) for s in (3, 4))
    q = drawn(5, len(positions), heads, dim, dtype=dtype)
    slots = [i % (NUM_SLOTS - 1) for i in range(len(positions))]
    got = attend(kernels(folder, dtype), q, keys, values, slots, positions, window)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        first = max(0, position + 1 - window) if window else 0
        k, v = (t[slot, first : position + 1].transpose(0, 1).double() for t in (keys, values))
        repeat = heads // kv_heads
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        want = F.scaled_dot_product_attention(q[row, :, None].double(), k, v)[:, 0]
        torch.testing.assert_close(got[row].double(), want, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_company(folder: Path, dtype: torch.dtype, num_threads: int) -> None:
    keys, values = (drawn(s, NUM_SLOTS, MAX_LEN, 2, 64, dtype=dtype) for s in (6, 7))
    q = drawn(8, 4, 4, 64, dtype=dtype)
    positions = [7, 200, 64, 299]
    together = attend(kernels(folder, dtype, num_threads), q, keys, values, [0, 1, 2, 3], positions)
    for row, position in enumerate(positions):
        # Alone, after copying its slot elsewhere, with other garbage behind its last place.
        keys[3 - row, : position + 1] = keys[row, : position + 1].clone()
        values[3 - row, : position + 1] = values[row, : position + 1].clone()
        alone = attend(kernels(folder, dtype), q[row : row + 1], keys, values, [3 - row], [position])
        if row < 2:  # later rows' own slots were overwritten
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_blocks_may_lie_anywhere(folder: Path, dtype: torch.dtype, window: int) -> None:
    """Rows and prompts have the same bits as where blocks lie in a row; two slots share some of them."""
    lab, dim, length = kernels(folder, dtype), 64, 150
    keys, values = (drawn(s, NUM_SLOTS, MAX_LEN, 2, dim, dtype=dtype) for s in (20, 21))
    keys[1, :64], values[1, :64] = keys[0, :64], values[0, :64]
    tables = torch.randperm(NUM_SLOTS * MAX_LEN // KV_BLOCK, generator=torch.Generator().manual_seed(1))
    tables = tables.view(NUM_SLOTS, -1)

    def moved(cache: Tensor) -> Tensor:
        blocks = torch.empty_like(cache).view(-1, KV_BLOCK, 2, dim)
        blocks[tables.flatten()] = cache.view(-1, KV_BLOCK, 2, dim)
        return blocks.view_as(cache)

    moved_keys, moved_values = moved(keys), moved(values)
    tables[1, :4] = tables[0, :4]
    q = drawn(22, length, 4, dim, dtype=dtype)
    slots, positions = [0, 1, 2, 3], [70, 299, 5, 200]
    want = attend(lab, q[:4], keys, values, slots, positions, window)
    assert torch.equal(attend(lab, q[:4], moved_keys, moved_values, slots, positions, window, tables), want)
    if lab.has_prompts:
        sizes = [64, 63, 23]
        want = attend_prompt(lab, q, keys, values, slot=1, sizes=sizes, window=window)
        got = attend_prompt(
            lab, q, moved_keys, moved_values, slot=1, sizes=sizes, window=window, tables=tables
        )
        assert torch.equal(got, want)


def test_huge_scores_and_garbage_behind_the_end(folder: Path) -> None:
    """A softmax over scores of any size sums to one, and places past the end do not count, NaN or not."""
    keys, values = torch.full((2, 32, 1, 32), torch.nan), torch.full((2, 32, 1, 32), torch.nan)
    keys[0, :3], values[0, :3] = torch.tensor([1e4, -1e4, 9e3])[:, None, None], 1.0
    q = torch.ones(1, 1, 32)
    got = attend(kernels(folder, torch.float32), q, keys, values, [0], [2])
    assert torch.equal(got, torch.ones(1, 1, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_cache_writes(folder: Path, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 4, 2, 32
    slots, positions = [2, 0, 2], [5, 0, 6]
    qkv = drawn(9, 3, heads + 2 * kv_heads, dim, dtype=dtype)
    before = qkv.double()
    angles = torch.arange(MAX_LEN)[:, None] * (10_000 ** -(torch.arange(dim // 2) / (dim // 2)))
    cos, sin = angles.cos(), angles.sin()
    keys, values = (torch.zeros(NUM_SLOTS, MAX_LEN, kv_heads, dim, dtype=dtype) for _ in range(2))
    lab = kernels(folder, dtype)
    tables = in_a_row(keys)
    step = lab.step(slots, positions, 0, (cos, sin), (heads, kv_heads, dim), tables, 1.0)
    lab.rotate_and_store(step, qkv, keys, values)
    a, b = before[..., : dim // 2], before[..., dim // 2 :]
    c, s = (t[positions][:, None].double() for t in (cos, sin))
    rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        close = {"rtol": tolerance(dtype), "atol": tolerance(dtype)}
        torch.testing.assert_close(qkv[row, :heads].double(), rotated[row, :heads], **close)
        got = keys[slot, position].double()
        torch.testing.assert_close(got, rotated[row, heads : heads + kv_heads], **close)
        assert torch.equal(values[slot, position].double(), before[row, heads + kv_heads :])
    assert keys.count_nonzero() == values.count_nonzero() == 3 * kv_heads * dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 2), (48, 66), (208, 512)])
def test_linear_layers(folder: Path, dtype: torch.dtype, out_features: int, in_features: int) -> None:
    """Every remainder of panels and rows, with and without a bias, and the same bits for every row count."""
    lab = linear_kernels(folder, dtype=dtype)
    weight = drawn(10, out_features, in_features, dtype=torch.bfloat16).to(dtype)
    x = drawn(11, 33, in_features, dtype=dtype)
    close = {"rtol": tolerance(dtype), "atol": tolerance(dtype) * in_features**0.5}
    for bias in (None, drawn(13, out_features, dtype=dtype)):
        panels = lab.pack_weight(weight)
        packed = lab.weight(panels, bias)
        got = lab.linear(packed, x)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(got.double(), want, **close)
        for count in (1, 2, 3, 5, 6, 7, 13, 32):
            assert torch.equal(lab.linear(packed, x[:count]), got[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_a_product(folder: Path, dtype: torch.dtype) -> None:
    lab = linear_kernels(folder, dtype=dtype)
    weight = drawn(20, 80, 64, dtype=torch.bfloat16).to(dtype)
    layer = make_linear(weight, None, packed=False, kernels=lab)
    assert isinstance(layer, KernelLinear)
    x, other = drawn(21, 7, 64, dtype=dtype), drawn(22, 7, 80, dtype=dtype)
    product = F.linear(x.double(), weight.double())
    close = {"rtol": tolerance(dtype), "atol": 16 * tolerance(dtype)}
    torch.testing.assert_close(layer.plus(x, other).double(), product + other, **close)
    torch.testing.assert_close(layer.times(x, other).double(), product * other, **close)
    torch.testing.assert_close(layer.swish(x).double(), F.silu(product), **close)


def test_in_fp32_only_weights_of_bf16_numbers_are_the_kernels(folder: Path) -> None:
    lab = linear_kernels(folder, dtype=torch.float32)
    weight = drawn(23, 32, 64, dtype=torch.float32)
    assert isinstance(make_linear(weight, None, packed=False, kernels=lab), TiledLinear)
    rounded = weight.bfloat16().float()
    assert isinstance(make_linear(rounded, None, packed=False, kernels=lab), KernelLinear)


def test_threads_share_a_linear_layer(folder: Path) -> None:
    weight, x = (drawn(s, n, 64, dtype=torch.bfloat16) for s, n in ((14, 208), (15, 9)))
    one, two = (linear_kernels(folder, num_threads) for num_threads in (1, 2))
    panels = one.pack_weight(weight)
    got = [lab.linear(lab.weight(panels, None), x) for lab in (one, two)]
    assert torch.equal(*got)


def test_packed_weights_lie_apart(folder: Path) -> None:
    """They share blocks of memory, which one of them may also fill or exceed."""
    lab = linear_kernels(folder)
    sizes = [(16, 2), (16, 66), (1 << 14, 1 << 11), (16, 2), (1 << 15, 1 << 11), (48, 66)]
    packed = []
    for number, (out_features, in_features) in enumerate(sizes, start=1):
        packed.append(lab.pack_weight(torch.full((out_features, in_features), float(number)).bfloat16()))
    for number, (panels, size) in enumerate(zip(packed, sizes, strict=True), start=1):
        assert panels.numel() == size[0] * size[1]
        assert panels.data_ptr() % 64 == 0
        assert (panels == number).all()


@pytest.mark.parametrize("window", [0, 24, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (8, 4, 64), (6, 2, 96), (8, 1, 128)])
def test_prompt_attention(folder: Path, window: int, heads: int, kv_heads: int, dim: int) -> None:
    """All of a prompt in chunks of several sizes: near the truth, and the same bits whatever the chunk."""
    lab, length = linear_kernels(folder), 230
    keys, values = (drawn(s, 3, MAX_LEN, kv_heads, dim, dtype=torch.bfloat16) for s in (16, 17))
    values[1, length:] = torch.nan
    q = drawn(18, length, heads, dim, dtype=torch.bfloat16)
    got = attend_prompt(lab, q, keys, values, slot=1, sizes=[length], window=window)

    k, v = (
        t[1, :length].transpose(0, 1).double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values)
    )
    row, place = torch.arange(length)[:, None], torch.arange(length)
    seen = (place <= row) & (place > row - window if window else torch.tensor(True))
    want = F.scaled_dot_product_attention(q.transpose(0, 1).double(), k, v, attn_mask=seen).transpose(0, 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)

    for sizes in ([64, 64, 64, 38], [1, 5, 6, 7, 45, 1, 63, 102], [32] * 7 + [6], [227, 3]):
        again = attend_prompt(lab, q, keys, values, slot=1, sizes=sizes, window=window)
        assert torch.equal(again, got), sizes
    twice = linear_kernels(folder, num_threads=2)
    assert torch.equal(attend_prompt(twice, q, keys, values, slot=1, sizes=[length], window=window), got)


def attend_prompt(
    lab: CpuKernels,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slot: int,
    sizes: list[int],
    window: int,
    tables: Tensor | None = None,
) -> Tensor:
    """Chunk by chunk, each behind two rows of another kind."""
    heads, dim = q.shape[1:]
    tables = in_a_row(keys) if tables is None else tables
    assert sum(sizes) == len(q)
    parts: list[Tensor] = []
    start = 0
    for size in sizes:
        slots, positions = [0, 0, *[slot] * size], [3, 4, *range(start, start + size)]
        shape = (heads, keys.shape[2], dim)
        step = lab.step(slots, positions, 2, None, shape, tables, dim**-0.5, window)
        rows = torch.cat((q[:2], q[start : start + size]))
        out = torch.full_like(rows, 7.0)
        lab.attend_prompt(step, 2, size, rows, keys, values, out)
        assert (out[:2] == 7.0).all()
        parts.append(out[2:])
        start += size
    return torch.cat(parts)


def linear_kernels(folder: Path, num_threads: int = 1, dtype: torch.dtype = torch.bfloat16) -> CpuKernels:
    lab = kernels(folder, dtype, num_threads)
    if not lab.has_linear:
        pytest.skip("this CPU has no vectors of 16 numbers, or a matrix unit that is faster")
    return lab


def test_what_is_built_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(folder, torch.float32)
    run = subprocess.run

    def only_asks(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["--version"], "compiled again"
        return run(command, **options)

    monkeypatch.setattr(kernel_build.subprocess, "run", only_asks)
    kernels(folder, torch.bfloat16)


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_library_is_built_again(tmp_path: Path, damage: str) -> None:
    library = kernel_build.built_library(tmp_path)
    content = library.read_bytes()
    library.unlink()  # never written in place: this process may have it mapped
    library.write_bytes(content[: len(content) // 2] if damage == "cut off" else content[:-1] + b"x")
    again = kernel_build.built_library(tmp_path)
    assert kernel_build.built_library(tmp_path) == again
    assert [path.name for path in tmp_path.iterdir()] == [again.name]
    ctypes.CDLL(str(again))


@pytest.mark.parametrize("cause", ["no compiler", "compiler fails"])
def test_without_a_compiler_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    if cause == "compiler fails":
        fake = tmp_path / "bin" / "c++"
        fake.parent.mkdir()
        fake.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "out", torch.float32, 1) is None
    assert ("no C++ compiler" if cause == "no compiler" else "is broken") in caplog.text
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_other_dtypes_are_left_to_torch(folder: Path) -> None:
    assert load_kernels(folder, torch.float16, 1) is None


def attend(
    lab: CpuKernels,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: list[int],
    positions: list[int],
    window: int = 0,
    tables: Tensor | None = None,
) -> Tensor:
    heads, dim = q.shape[1:]
    shape = (heads, keys.shape[2], dim)
    tables = in_a_row(keys) if tables is None else tables
    step = lab.step(slots, positions, len(slots), None, shape, tables, dim**-0.5, window)
    out = torch.empty_like(q)
    lab.attend(step, q, keys, values, out)
    return out


@pytest.mark.parametrize("has_bf16", [True, False])
def test_what_an_older_torch_knows_of_the_cpu(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 2.12 there is no `get_capabilities`."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert kernel_build.cpu_capabilities() == {"avx512_bf16": has_bf16, "amx_bf16": False}
