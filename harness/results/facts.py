"""Facts of a manifest that a replay measures beside its rows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """One object of the JSON. A key that was neither given nor read is not written."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


class MachineUse(Facts):
    """Shares of CPU time while a replay went on. Steal and others are of the machine's whole CPU time."""

    steal_share: float | None
    other_cpu_share: float | None
    """CPU time of processes that are neither the harness nor the service."""
    harness_cpu_share: float
    """CPU time of one process of the harness, of one core."""
    harness_total_cpu_share: float | None = None
    """Of all its processes together."""
    busy_share: float | None = None
    """CPU time of whatever ran, of the machine's."""
    throttled_share: float | None = None
    """Time for which a CPU quota kept processes of this container waiting, of the replay."""
    gpu_joules: float | None = None
    """Of the first visible GPU, whatever ran on it; None without one, or where the server is elsewhere."""


class ForeignFacts(Facts):
    """What is known of a server that is not ours; None where nobody can tell, or the run did not end."""

    kind: str | None
    """As: vLLM. By its own answers, never a guess."""
    version: str | None = None
    token_ids: bool | None = None
    """Whether its answers came with the ids of their tokens, so that each chunk's tokens are counted."""
    queue_time: bool | None = None
    """Whether its `/metrics` told how long requests waited, or how many did."""

    @property
    def name(self) -> str | None:
        """As: vLLM 0.11.0."""
        return " ".join(filter(None, (self.kind, self.version))) or None

    def in_words(self) -> str:
        counts = {True: "token ids with every chunk", False: "token counts from usage alone", None: None}
        queue = {True: "queue time from its /metrics", False: "no queue time", None: None}
        words = ", ".join(filter(None, (counts[self.token_ids], queue[self.queue_time])))
        return ": ".join(filter(None, (self.name or "of a kind unknown here", words)))


class ServerGauges(Facts):
    """What `/metrics` of a foreign server told during one replay; None where it does not say."""

    server: str | None
    """As: vLLM. None where it gives no figures, and `problem` says why."""
    num_samples: int
    """Gauges are means over these, so over time, not over steps."""
    mean_batch_size: float | None = None
    """Requests that ran; of llama.cpp the busy slots a decode."""
    mean_waiting: float | None = None
    max_waiting: float | None = None
    mean_kv_usage: float | None = None
    """Share of the KV cache in use, 0 to 1."""
    max_kv_usage: float | None = None
    queue_s: float | None = None
    """Mean of a request, as is `prefill_s`; where there is no histogram,
    the queue follows from its mean length by Little's law."""
    prefill_s: float | None = None
    problem: str | None = None
