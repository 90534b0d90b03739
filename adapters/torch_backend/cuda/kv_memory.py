"""How long the slots may be on a device whose memory is finite.

What enters are numbers of bytes and the settings; what leaves is the number of tokens a slot holds, or an
error that says which setting to lower, and to what. Knows no torch and no device.
"""

from __future__ import annotations

from adapters.base import ConfigError

PLACES = 64
"""Slots are multiples of this long."""
LEAST_LEN = 256
"""A model length that was left open is not lowered below this."""
_GIB = 1 << 30


def padded_len(max_len: int) -> int:
    """The places of a slot that holds `max_len` tokens."""
    return -(-max_len // PLACES) * PLACES


def fitted_len(
    *,
    free_bytes: int,
    fraction: float,
    bytes_per_place: int,
    max_batch: int,
    wanted: int,
    is_given: bool,
) -> int:
    """The model length, at most `wanted`, with which `max_batch` slots and one for scratch fit.

    Raises:
        ConfigError: what was given, or the least that makes sense, does not fit.
    """
    usable = int(free_bytes * fraction)
    places = usable // bytes_per_place
    room = places // (max_batch + 1) // PLACES * PLACES
    if padded_len(wanted) <= room:
        return wanted
    least = wanted if is_given else min(wanted, LEAST_LEN)
    if not is_given and room >= padded_len(least):
        return room
    needed = (max_batch + 1) * padded_len(least) * bytes_per_place
    batch = places // padded_len(least) - 1
    ways = [f"MAX_BATCH to {batch}"] if batch >= 1 else []
    ways += [f"MAX_MODEL_LEN to {room}"] if room >= PLACES and is_given else []
    advice = f"lower {' or '.join(ways)}" if ways else "a smaller model or dtype is needed"
    raise ConfigError(
        f"{max_batch} slots of {least} tokens (MAX_BATCH, MAX_MODEL_LEN) need {needed / _GIB:.1f} GiB for "
        f"keys and values, one slot for scratch included, and {usable / _GIB:.1f} GiB are to be had "
        f"(KV_MEMORY_FRACTION={fraction:g} of {free_bytes / _GIB:.1f} GiB free): {advice}"
    )
