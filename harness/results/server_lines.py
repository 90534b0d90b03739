"""What a run knows of its server beside the answers: kind and gauges of a foreign one, energy of the GPU."""

from __future__ import annotations

from harness.results.manifest import RunManifest
from harness.results.table import share, spread


def server_lines(manifest: RunManifest) -> list[tuple[str, str]]:
    """(what, how much) for each; nothing of a service of ours on a CPU."""
    lines = [("server", manifest.foreign.in_words())] if manifest.foreign else []
    told = [entry.server for entry in manifest.repeats if entry.server]
    known = [gauges for gauges in told if gauges.server]
    if told and not known:
        lines.append(("server metrics", f"none: {told[0].problem}"))
    if known:
        samples = f"{sum(gauges.num_samples for gauges in known)} samples of {known[0].server}'s /metrics"
        waiting = [gauges.mean_waiting for gauges in known if gauges.mean_waiting is not None]
        most = max((gauges.max_waiting or 0.0 for gauges in known), default=0.0)
        lines.append(
            ("mean queue", f"{spread(waiting, 2)} requests, at most {most:.0f} ({samples}), batch as well")
            if waiting
            else ("mean queue", f"not told by {known[0].server}")
        )
        used = [gauges.mean_kv_usage for gauges in known if gauges.mean_kv_usage is not None]
        peak = max((gauges.max_kv_usage or 0.0 for gauges in known), default=0.0)
        lines.append(
            ("KV cache in use", f"{share(sum(used) / len(used))}, at most {share(peak)}")
            if used
            else ("KV cache in use", f"not told by {known[0].server}")
        )
    joules = [entry.joules_per_token for entry in manifest.repeats if entry.joules_per_token is not None]
    if joules:
        lines.append(("GPU energy", f"{spread(joules, 3)} J a token"))
    return lines
