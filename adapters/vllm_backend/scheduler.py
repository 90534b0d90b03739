"""vLLM's scheduler, told which of its requests may compute in a step.

vLLM gives every request that runs a token in each step. Here those without a row in the lab's step keep their
cache and wait.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class StepScheduler(Scheduler):  # type: ignore[misc]
    """vLLM calls this interface not public: it is that of the version in this folder's pyproject.toml."""

    running: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wanted: set[str] = set()
        """Ids of the requests that may compute."""
        self.dead: set[str] = set()
        """Those of dead rows, which give way first where the cache is full."""
        self.num_scheduled = 0
        """Tokens that the last step computed."""
        self.num_scheduled_requests = 0
        """Requests that it computed them for."""
        self.num_preempted = 0
        self.peak_kv_usage = 0.0
        """The largest share of the cache's blocks that were in use after a step was planned."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        held = [request for request in self.running if request.request_id not in self.wanted]
        wanted = [request for request in self.running if request.request_id in self.wanted]
        self.running = sorted(wanted, key=lambda request: request.request_id in self.dead)
        output = super().schedule(*args, **kwargs)
        self.running = held + self.running
        self.num_scheduled = output.total_num_scheduled_tokens
        self.num_scheduled_requests = len(output.num_scheduled_tokens)
        self.peak_kv_usage = max(self.peak_kv_usage, self.kv_cache_manager.usage)
        return output

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        self.num_preempted += 1
        super()._preempt_request(*args, **kwargs)

    def num_computed(self, request_id: str) -> int | None:
        """Positions of a request in the cache; None once vLLM has ended it."""
        request = self.requests.get(request_id)
        return None if request is None else request.num_computed_tokens
