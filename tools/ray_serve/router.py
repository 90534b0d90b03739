"""Request routing by outstanding tokens, through Ray Serve's own interface.

Each of Serve's proxies has a router of its own, and sees neither the body of a request nor what other proxies
send. So replicas say how many tokens they have left to compute, and a router adds a mean request for each one
that it has sent since.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

ROUTING_STATS_PERIOD_S = 0.5


class OutstandingTokensRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas by outstanding tokens, fewest first; of equals any may come first."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._sent: dict[ReplicaID, tuple[int, int]] = {}
        """By replica: the number of its last report, and the requests sent since."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        stats = [replica.routing_stats for replica in candidate_replicas]
        num_requests = sum(each.get("num_requests", 0) for each in stats)
        outstanding = sum(each.get("outstanding_tokens", 0) for each in stats)
        mean_tokens = outstanding / num_requests if outstanding else 1.0

        def load(replica: RunningReplica) -> tuple[float, float]:
            tokens = replica.routing_stats.get("outstanding_tokens", 0)
            return tokens + self._num_sent(replica) * mean_tokens, random.random()

        ranked = sorted(candidate_replicas, key=load)
        if ranked and pending_request is not None:
            # Counted now: of a burst, the next request is routed before this one is on its way.
            best = ranked[0]
            self._sent[best.replica_id] = best.routing_stats.get("report", 0), self._num_sent(best) + 1
        return [[replica] for replica in ranked]

    def _num_sent(self, replica: RunningReplica) -> int:
        report, num_sent = self._sent.get(replica.replica_id, (0, 0))
        return num_sent if report == replica.routing_stats.get("report", 0) else 0
