"""The harness's own floor: what it reports of a server that answers at once.

Nothing enters; what leaves are a few figures for the manifest, measured once a process, before its first run.
Latencies near the floor say more about the client and the machine than about the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from harness.results.stats import percentile
from harness.selfcheck.known_server import Delays
from harness.selfcheck.known_truth import measure_known

_RATE, _NUM_REQUESTS, _NUM_TOKENS = 200.0, 100, 4


@dataclass(frozen=True, slots=True)
class Floor:
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    send_lag_p99_ms: float
    num_requests: int


@cache
def measure_floor() -> Floor:
    """About a second.

    Raises:
        KeyboardInterrupt: told to stop meanwhile.
    """
    measured = measure_known(Delays(), _RATE, _NUM_REQUESTS, _NUM_TOKENS)
    ttft_ms = measured.rows["ttft_ms"].to_numpy(dtype=float)
    p50, p95 = (percentile(ttft_ms, q).value for q in (50, 95))
    return Floor(p50, p95, measured.send_lag_p99_ms, _NUM_REQUESTS)
