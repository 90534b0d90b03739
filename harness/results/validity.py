"""Whether a run counts: VALID, CAUTION (usable, with a reason to know) or INVALID (unusable).

Only the rows and the manifest are looked at, so that a file can be judged again later.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.plan.run_size import enough_requests
from harness.plan.schedule import Load, salted_digest, schedule_digest
from harness.results.formulas import MIN_TTFT_FALL, send_lag_s, throughput, ttft_fall
from harness.results.manifest import RunManifest, Validity
from harness.results.stats import MIN_SAMPLES

MAX_SEND_LAG_S = 0.010
"""Of the 99th percentile, or a tenth of the mean gap between arrivals where that is more."""
MIN_DELIVERED_RATE = 0.95
SHORT_RUN_S = 10.0
MAX_STEAL_SHARE = 0.01
MAX_OTHER_CPU_SHARE = 0.10
MAX_HARNESS_CPU_SHARE = 0.70
MAX_BUSY_SHARE = 0.90
MAX_THROTTLED_SHARE = 0.01
MAX_FLOOR_SHARE = 0.10
"""Of the median TTFT: what the harness reports of a server that answers at once."""


def judge(rows: pd.DataFrame, manifest: RunManifest) -> Validity:
    """Judge one file: all repeats of one arm."""
    invalid = [*_corpus_problems(manifest), *_failures(rows), *_undelivered(rows, manifest)]
    caution = [
        *_simulation_doubts(manifest),
        *_sampling_doubts(rows, manifest),
        *_server_doubts(rows, manifest),
        *_floor_doubts(rows, manifest),
        *_machine_doubts(manifest),
    ]
    return Validity(tuple(invalid), tuple(caution))


# INVALID


def _corpus_problems(manifest: RunManifest) -> list[str]:
    corpus = manifest.corpus
    recorded = corpus.recorded_sha256
    if recorded is not None and corpus.sha256 != recorded:
        return [f"the corpus is not the recorded one (SHA-256 {corpus.sha256[:12]}, not {recorded[:12]})"]
    digests = {entry.model_digest for entry in manifest.repeats}
    if len(digests) > 1:
        return [f"the model changed between repeats: digests {sorted(map(str, digests))}"]
    return []


def _failures(rows: pd.DataFrame) -> list[str]:
    failed = rows[rows["error"].notna()]
    if failed.empty:
        return []
    counts = failed["error"].value_counts()
    told = f"{len(failed)} of {len(rows)} requests failed; {counts.iloc[0]}x: {counts.index[0]}"
    advice = "; MAX_QUEUE of the service lets more wait" if "queue_full" in counts.index[0] else ""
    return [told + advice]


def _undelivered(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    problems: list[str] = []
    plan = manifest.schedule
    load = plan.load
    num_repeats = len(manifest.planned_repeats)
    ended = {entry.repeat: entry for entry in manifest.repeats}
    if len(ended) < num_repeats:
        problems.append(f"{len(ended)} of {num_repeats} repeats ran to their end")
    problems.extend(entry.service_problem for entry in ended.values() if entry.service_problem)
    for repeat, part in rows.groupby("repeat"):
        entry = ended.get(int(str(repeat)))
        where = f"repeat {repeat}: " if num_repeats > 1 else ""
        if entry and entry.was_interrupted:
            problems.append(f"{where}the run was interrupted")
        if entry and entry.hit_in_flight_cap:
            problems.append(f"{where}too many requests were in flight, so some were not sent")
        if (num_missing := plan.num_requests - len(part)) > 0:
            problems.append(f"{where}{num_missing} of {plan.num_requests} requests were never finished")
        elif salted_digest(_digest_of(part, load), plan.salt) != (plan.part_digest or plan.digest):
            problems.append(f"{where}what was sent is not the schedule that was planned (digests differ)")
        if load.is_open:
            problems.extend(where + problem for problem in _open_loop_problems(part, load))
    if rows.empty:
        problems.append("no request was finished")
    return problems


def _digest_of(part: pd.DataFrame, load: Load) -> str:
    ordered = part.sort_values("schedule_index")
    return schedule_digest(
        load,
        (
            (
                int(row["schedule_index"]),
                str(row["prompt_id"]),
                int(row["max_tokens"]),
                int(row["seed"]),
                None if pd.isna(row["offset_s"]) else float(row["offset_s"]),
            )
            for row in ordered.to_dict("records")
        ),
    )


def _open_loop_problems(part: pd.DataFrame, load: Load) -> list[str]:
    assert load.rate is not None
    problems: list[str] = []
    lag_s = send_lag_s(part)
    if len(lag_s):
        bound_s = max(MAX_SEND_LAG_S, 0.1 / load.rate)
        worst_s = float(np.percentile(lag_s, 99))
        if worst_s > bound_s:
            problems.append(
                f"requests left late: p99 send lag {worst_s * 1e3:.1f} ms, allowed are {bound_s * 1e3:.0f} ms"
            )
    sent = part["sent_s"].dropna()
    if len(sent) > 1:
        asked_s = float(part["scheduled_s"].max() - part["scheduled_s"].min())
        took_s = float(sent.max() - sent.min())
        if took_s > 0 and asked_s / took_s < MIN_DELIVERED_RATE:
            problems.append(
                f"the load was not delivered: {asked_s / took_s:.0%} of the rate that the schedule asks for"
            )
    return problems


# CAUTION


def _simulation_doubts(manifest: RunManifest) -> list[str]:
    simulation = manifest.simulation
    if manifest.kind != "simulated" or simulation is None:
        return []
    doubts = [f"simulated, not measured: {simulation.in_words}"]
    if simulation.outside:
        doubts.append(f"the simulation left what was calibrated: {', '.join(simulation.outside)}")
    return doubts + simulation.notes


def _sampling_doubts(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    doubts: list[str] = []
    plan = manifest.schedule
    load = plan.load
    num_done = int(rows["error"].isna().sum())
    # A comparison takes percentiles over all blocks, and start-up and end are the same in every arm's.
    blocks = plan.num_blocks
    of_one = f" in each of {blocks} blocks" if blocks > 1 else ""
    if 0 < num_done * blocks < MIN_SAMPLES[95]:
        doubts.append(f"few samples: {num_done} answers{of_one}, p95 needs {MIN_SAMPLES[95]}")
    rates = (throughput(part, is_open=load.is_open) for _, part in rows.groupby("repeat"))
    windows = [rate.window_s for rate in rates if rate is not None]
    has_many = not load.is_open and plan.num_requests * blocks >= enough_requests(load.concurrency)
    if windows and min(windows) * blocks < SHORT_RUN_S and not has_many:
        of_all = f"{SHORT_RUN_S:g} s" + (" in all" if blocks > 1 else "")
        doubts.append(f"short run: {min(windows):.1f} s measured{of_one}, less than {of_all}")
    if not load.is_open and plan.num_requests < 2 * load.concurrency:
        requests = plan.num_requests
        doubts.append(f"{requests} requests for {load.concurrency} users: concurrency is not held for long")
    if manifest.corpus.recorded_sha256 is None:
        doubts.append("the corpus has no recorded digest")
    if manifest.damage:
        doubts.append(manifest.damage)
    if manifest.corpus.left_out:
        doubts.append(f"{manifest.corpus.left_out}: the load is not the trace's")
    if plan.salt is None:
        doubts += _unsalted_doubts(rows, manifest)
    return doubts


def _unsalted_doubts(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    doubts: list[str] = []
    if manifest.schedule.num_requests > manifest.corpus.num_prompts and _may_cache(manifest):
        doubts.append("prompts were sent more than once: a prefix cache would show")
    if not manifest.settings.url:
        return doubts
    if len(manifest.planned_repeats) > 1:
        doubts.append("repeats met a server that had seen their prompts: a prefix cache would show")
        parts = [part for _, part in rows.groupby("repeat")]
        fell = max((ttft_fall(parts[0], part) for part in parts[1:]), default=1.0)
        if fell >= MIN_TTFT_FALL:
            doubts.append(f"TTFT fell {fell:.1f}-fold when the prompts came again: a prefix cache")
    elif manifest.service is None:
        doubts.append("prompts went out without a salt (SALT=0): a prefix cache that knew them would show")
    return doubts


def _may_cache(manifest: RunManifest) -> bool:
    """The lab's own scheduler keeps nothing of an answered prompt unless PREFIX_CACHE=1 asks for it, which is
    measured then; what a foreign server does is unknown."""
    return manifest.service is None or manifest.service.scheduling != "lab"


def _server_doubts(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    doubts: list[str] = []
    service = manifest.service
    if service and service.device == "cpu" and service.details.get("cpu_kernels") is False:
        doubts.append("the service ran without its CPU kernels (no compiler, or CPU_KERNELS=0)")
    done = rows[rows["error"].isna()]
    early = int((done["num_output_tokens"] < done["max_tokens"]).sum())
    if early and manifest.settings.ignore_eos:
        doubts.append(f"{early} of {len(done)} answers ended before their budget: outputs differ in length")
    counted = done["chunk_tokens"].map(lambda tokens: None if tokens is None else int(np.sum(tokens)))
    differs = int((counted.notna() & (counted != done["num_output_tokens"])).sum())
    if differs:
        doubts.append(f"{differs} answers streamed another number of tokens than the server counted")
    short = int((counted.isna() & (done["chunk_s"].map(len) > done["num_output_tokens"])).sum())
    if short:
        doubts.append(f"{short} answers came in more pieces of text than the server counted tokens")
    # Where there are as many pieces as tokens, each holds one.
    merged = counted.isna() & (done["chunk_s"].map(len) < done["num_output_tokens"])
    if merged.any():
        doubts.append("the server sends no token ids: gaps are between chunks, which may hold several tokens")
    cached = int(done["num_cached_tokens"].fillna(0).sum()) if "num_cached_tokens" in done else 0
    # Where PREFIX_CACHE=1 asked for it, what the cache served is part of what is measured.
    if cached and not (service and service.strategy.get("prefix_cache")):
        of_all = cached / max(1, int(done["num_prompt_tokens"].sum()))
        doubts.append(f"the server took {cached} prompt tokens ({of_all:.0%}) from a prefix cache")
    doubts.extend(
        f"repeat {entry.repeat}: the step log lost {entry.steps.num_dropped} steps"
        for entry in manifest.repeats
        if entry.steps and entry.steps.num_dropped
    )
    return doubts


def _floor_doubts(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    floor_ms = manifest.floor.ttft_p50_ms if manifest.floor else None
    ttft_ms = float(rows["ttft_ms"].median())
    if floor_ms is None or not ttft_ms > 0 or floor_ms <= MAX_FLOOR_SHARE * ttft_ms:
        return []
    return [f"the harness's own floor is {floor_ms:.1f} ms of a median TTFT of {ttft_ms:.1f} ms"]


def _machine_doubts(manifest: RunManifest) -> list[str]:
    if not manifest.is_local:
        return []
    doubts: list[str] = []
    host = manifest.host
    if host.cpu_governor not in (None, "performance"):
        doubts.append(f"CPU governor {host.cpu_governor}: clocks follow the load (performance does not)")
    num_threads = manifest.service.num_threads if manifest.service else 0
    num_free = max(1, host.physical_cores - 1)
    if num_threads > num_free:
        doubts.append(
            f"{num_threads} engine threads on {host.physical_cores} physical cores leave harness and API "
            f"no room: set N_THREADS to at most {num_free}"
        )
    elif num_threads and host.physical_cores == 1:
        doubts.append("engine, API and harness share the only core of this machine")
    num_senders = manifest.settings.processes
    if num_senders > 1 and num_threads + num_senders > host.physical_cores:
        doubts.append(
            f"{num_senders} processes of the harness beside {num_threads} engine threads on "
            f"{host.physical_cores} physical cores: they take the server's time (PROCESSES)"
        )
    uses = [entry.machine for entry in manifest.repeats]
    shared = max((use.busy_share or 0.0 for use in uses), default=0.0)
    # Of a server that runs already nothing is known but that it is on this machine.
    if shared > MAX_BUSY_SHARE and (manifest.settings.url or num_senders > 1):
        sent = max((use.harness_total_cpu_share or 0.0 for use in uses), default=0.0)
        doubts.append(
            f"{shared:.0%} of the machine's CPU time were in use, {sent:.1f} cores by the harness: it and "
            "the server took each other's time"
        )
    steal, others, harness = MAX_STEAL_SHARE, MAX_OTHER_CPU_SHARE, MAX_HARNESS_CPU_SHARE
    for values, bound, sentence in (
        (
            [u.throttled_share for u in uses],
            MAX_THROTTLED_SHARE,
            "a CPU quota held processes back for {:.1%} of the time (cpu.max)",
        ),
        ([u.steal_share for u in uses], steal, "the hypervisor withheld {:.1%} of the CPU time"),
        (
            [u.other_cpu_share for u in uses],
            others,
            "other processes took {:.0%} of the machine's CPU time: end them and measure again",
        ),
        ([u.harness_cpu_share for u in uses], harness, "the harness used {:.0%} of a core: stamps may lag"),
    ):
        worst = max((value for value in values if value is not None), default=0.0)
        if worst > bound:
            doubts.append(sentence.format(worst))
    return doubts
