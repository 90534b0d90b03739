"""How long slots may be, with numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.base import ConfigError
from adapters.torch_backend.cuda.kv_memory import fitted_len, padded_len

GIB = 1 << 30
KIB = 1024


def fit(**changes: Any) -> int:
    numbers: dict[str, Any] = {
        "free_bytes": 10 * GIB,
        "fraction": 0.8,
        "bytes_per_position": 128 * KIB,
        "max_batch": 15,
        "wanted": 4096,
        "is_given": False,
    }
    return fitted_len(**(numbers | changes))


def test_what_fits_is_left_alone() -> None:
    # 8 GiB / 128 KiB = 65,536 places in 16 slots: 4,096 each.
    assert fit() == 4096
    assert fit(wanted=4095, is_given=True) == 4095


def test_an_open_length_is_lowered_to_a_multiple_of_64() -> None:
    assert fit(wanted=8192) == 4096
    assert fit(free_bytes=10 * GIB - 1) == 4032
    assert fit(max_batch=100) == 640  # 65,536 / 101 = 648


def test_a_given_length_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"need 16.0 GiB .* 8.0 GiB .*lower MAX_BATCH to 7 or MAX_MODEL_LEN to 4096"
    ):
        fit(wanted=8192, is_given=True)


def test_an_open_length_has_a_floor() -> None:
    assert fit(max_batch=255) == 256
    with pytest.raises(ConfigError, match=r"lower MAX_BATCH to 255$"):
        fit(max_batch=256)


def test_where_nothing_fits_no_setting_is_blamed() -> None:
    with pytest.raises(ConfigError, match="a smaller model or dtype is needed"):
        fit(free_bytes=GIB // 1000)


def test_what_sampling_takes_is_left_whatever_the_share() -> None:
    assert fit(reserve_bytes=2 * GIB) == 4096
    assert fit(fraction=1.0, reserve_bytes=2 * GIB) == 4096
    assert fit(reserve_bytes=4 * GIB) == 3072
    with pytest.raises(
        ConfigError, match=r"6.0 GiB are to be had \(10.0 GiB free, 4.0 of them for sampling\)"
    ):
        fit(reserve_bytes=4 * GIB, is_given=True)
    with pytest.raises(ConfigError, match="a smaller model or dtype is needed"):
        fit(reserve_bytes=11 * GIB)


def test_slots_are_multiples_of_64() -> None:
    assert [padded_len(n) for n in (1, 64, 65)] == [64, 64, 128]
