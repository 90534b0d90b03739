"""The harness's own floor: what it reports of a server that answers at once, measured once a process.

Latencies near the floor say more about the client and the machine than about the server.
"""

from __future__ import annotations

from functools import cache

from harness.results.manifest import Floor
from harness.results.stats import percentile
from harness.selfcheck.known_server import Delays
from harness.selfcheck.known_truth import measure_known

_RATE, _NUM_REQUESTS, _NUM_TOKENS = 200.0, 100, 4


@cache
def measure_floor() -> Floor:
    """About a second.

    Raises:
        KeyboardInterrupt: told to stop meanwhile.
    """
    measured = measure_known(Delays(), _RATE, _NUM_REQUESTS, _NUM_TOKENS)
    ttft_ms = measured.rows["ttft_ms"].to_numpy(dtype=float)
    p50, p95 = (percentile(ttft_ms, q).value for q in (50, 95))
    return Floor(
        ttft_p50_ms=p50,
        ttft_p95_ms=p95,
        send_lag_p99_ms=measured.send_lag_p99_ms,
        num_requests=_NUM_REQUESTS,
    )
