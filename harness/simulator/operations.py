"""What happens to a fleet beside its requests: replicas that fail and come back, and an autoscaler."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from random import Random

_FASTEST_S = 0.01


@dataclass(frozen=True, slots=True)
class Failures:
    """Each replica fails by itself, at random, and is back after a fixed time.

    Its answers that have begun are cut off; the others are asked for again, as a front does that has sent
    nothing to the client yet.
    """

    every_s: float
    """The mean time that a replica runs before it fails; the times are exponential."""
    for_s: float
    """From the failure until it takes requests again, start-up included."""

    def draws(self, seed: int, index: int) -> Random:
        """The same for one replica, whatever the others do."""
        return Random(f"{seed}/failures/{index}")


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """As many replicas as have `target` sequences each, running and waiting.

    Source: the formula of Kubernetes' HorizontalPodAutoscaler for an AverageValue, as KEDA sets it up, and of
    Ray Serve's `target_ongoing_requests`. The defaults are those of docker/k8s/base/scaling.yaml.
    """

    target: float
    least: int = 1
    most: int = 8
    every_s: float = 5.0
    down_window_s: float = 300.0
    """It shrinks to the most that was wanted within this time."""
    down_every_s: float = 60.0
    """And by one replica in this time."""
    start_up_s: float = 0.0
    """Until a new replica takes requests."""

    def __post_init__(self) -> None:
        """Raises: ValueError, where no number of replicas is allowed, or the instants are too many."""
        if self.least > self.most:
            raise ValueError(f"least must not be above most: {self.least} and {self.most}")
        if self.every_s < _FASTEST_S:
            raise ValueError(f"every_s must be at least {_FASTEST_S:g}, not {self.every_s:g}")


_TOLERANCE = 0.1
"""The autoscaler leaves a load alone that is this near to its target."""


class Autoscaler:
    def __init__(self, policy: Autoscaling) -> None:
        self._policy = policy
        self._wanted: deque[tuple[float, int]] = deque()
        self._shrank_s = -math.inf

    def num_replicas(self, now_s: float, num_sequences: int, num_now: int) -> int:
        """How many there should be from now on. `num_now` counts those that start or restart as well."""
        policy = self._policy
        wanted = num_now
        if abs(num_sequences / (policy.target * num_now) - 1) > _TOLERANCE:
            wanted = math.ceil(num_sequences / policy.target)
        wanted = min(max(wanted, policy.least), policy.most)
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - policy.down_window_s:
            self._wanted.popleft()
        if wanted >= num_now:
            return wanted
        most = max(number for _, number in self._wanted)
        if most >= num_now or now_s - self._shrank_s < policy.down_every_s:
            return num_now
        self._shrank_s = now_s
        return num_now - 1
