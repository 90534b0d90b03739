"""How long the slots may be on a device whose memory is finite; errors name the setting to lower."""

from __future__ import annotations

from adapters.base import ConfigError

SLOT_MULTIPLE = 64
"""The length of a slot is a multiple of this."""
LEAST_LEN = 256
"""A model length that was left open is not lowered below this."""
_GIB = 1 << 30


def padded_len(max_len: int) -> int:
    """The length of a slot that holds `max_len` tokens."""
    return -(-max_len // SLOT_MULTIPLE) * SLOT_MULTIPLE


def fitted_len(
    *,
    free_bytes: int,
    fraction: float,
    bytes_per_position: int,
    max_batch: int,
    wanted: int,
    is_given: bool,
    reserve_bytes: int = 0,
) -> int:
    """The model length, at most `wanted`, with which `max_batch` slots and one for scratch fit.

    At least `reserve_bytes` of what is free are left, whatever `fraction` says.

    Raises:
        ConfigError: what was given, or the least that makes sense, does not fit.
    """
    usable, limit = (
        int(free_bytes * fraction),
        f"KV_MEMORY_FRACTION={fraction:g} of {free_bytes / _GIB:.1f} GiB free",
    )
    if usable > free_bytes - reserve_bytes:
        usable = max(0, free_bytes - reserve_bytes)
        limit = f"{free_bytes / _GIB:.1f} GiB free, {reserve_bytes / _GIB:.1f} of them for sampling"
    positions = usable // bytes_per_position
    room = positions // (max_batch + 1) // SLOT_MULTIPLE * SLOT_MULTIPLE
    if padded_len(wanted) <= room:
        return wanted
    least = wanted if is_given else min(wanted, LEAST_LEN)
    if not is_given and room >= padded_len(least):
        return room
    needed = (max_batch + 1) * padded_len(least) * bytes_per_position
    batch = positions // padded_len(least) - 1
    ways = [f"MAX_BATCH to {batch}"] if batch >= 1 else []
    ways += [f"MAX_MODEL_LEN to {room}"] if room >= SLOT_MULTIPLE and is_given else []
    advice = f"lower {' or '.join(ways)}" if ways else "a smaller model or dtype is needed"
    raise ConfigError(
        f"{max_batch} slots of {least} tokens (MAX_BATCH, MAX_MODEL_LEN) need {needed / _GIB:.1f} GiB for "
        f"keys and values, one slot for scratch included, and {usable / _GIB:.1f} GiB are to be had "
        f"({limit}): {advice}"
    )
