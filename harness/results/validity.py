"""Whether a run counts: VALID, CAUTION (usable, with a reason to know) or INVALID (unusable).

Only the rows and the manifest are read, so that a file can be judged again later. Every reason is a sentence,
and every bound a constant at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from harness.plan.schedule import Arrivals, Load, schedule_digest
from harness.results.formulas import send_lag_s, throughput
from harness.results.record import Manifest
from harness.results.stats import MIN_SAMPLES

Level = Literal["VALID", "CAUTION", "INVALID"]

MAX_SEND_LAG_S = 0.010
"""Of the 99th percentile, or a tenth of the mean gap between arrivals where that is more."""
MIN_DELIVERED_RATE = 0.95
SHORT_RUN_S = 10.0
MAX_STEAL_SHARE = 0.01
MAX_OTHER_CPU_SHARE = 0.10
MAX_HARNESS_CPU_SHARE = 0.70
MAX_FLOOR_SHARE = 0.10
"""Of the median TTFT: what the harness reports of a server that answers at once."""


@dataclass(frozen=True, slots=True)
class Validity:
    invalid: tuple[str, ...] = ()
    caution: tuple[str, ...] = ()

    @property
    def level(self) -> Level:
        if self.invalid:
            return "INVALID"
        return "CAUTION" if self.caution else "VALID"

    def as_dict(self) -> dict[str, Any]:
        return {"level": self.level, "invalid": list(self.invalid), "caution": list(self.caution)}

    def lines(self) -> list[str]:
        reasons = [*(f"  INVALID: {reason}" for reason in self.invalid)]
        return [self.level, *reasons, *(f"  caution: {reason}" for reason in self.caution)]


def judge(rows: pd.DataFrame, manifest: Manifest) -> Validity:
    """Judge one file: all repeats of one arm."""
    invalid = [*_corpus_problems(manifest), *_failures(rows), *_undelivered(rows, manifest)]
    caution = [
        *_sampling_doubts(rows, manifest),
        *_server_doubts(rows, manifest),
        *_floor_doubts(rows, manifest),
        *_machine_doubts(manifest),
    ]
    return Validity(tuple(invalid), tuple(caution))


def load_of(manifest: Manifest) -> Load:
    plan = manifest["schedule"]
    return Load(Arrivals(plan["arrivals"]), plan["concurrency"] or 1, plan["rate"], **plan.get("shape", {}))


# INVALID


def _corpus_problems(manifest: Manifest) -> list[str]:
    corpus = manifest["corpus"]
    recorded = corpus["recorded_sha256"]
    if recorded is not None and corpus["sha256"] != recorded:
        return [f"the corpus is not the recorded one (SHA-256 {corpus['sha256'][:12]}, not {recorded[:12]})"]
    digests = {entry["model_digest"] for entry in manifest["repeats"]}
    if len(digests) > 1:
        return [f"the model changed between repeats: digests {sorted(map(str, digests))}"]
    return []


def _failures(rows: pd.DataFrame) -> list[str]:
    failed = rows[rows["error"].notna()]
    if failed.empty:
        return []
    counts = failed["error"].value_counts()
    return [f"{len(failed)} of {len(rows)} requests failed; {counts.iloc[0]}x: {counts.index[0]}"]


def _undelivered(rows: pd.DataFrame, manifest: Manifest) -> list[str]:
    problems: list[str] = []
    load, num_planned = load_of(manifest), manifest["schedule"]["num_requests"]
    num_repeats = len(manifest["planned_repeats"])
    ended = {entry["repeat"]: entry for entry in manifest["repeats"]}
    if len(ended) < num_repeats:
        problems.append(f"{len(ended)} of {num_repeats} repeats ran to their end")
    problems.extend(entry["service_problem"] for entry in ended.values() if entry["service_problem"])
    for repeat, part in rows.groupby("repeat"):
        entry = ended.get(int(str(repeat)), {})
        where = f"repeat {repeat}: " if num_repeats > 1 else ""
        if entry.get("was_interrupted"):
            problems.append(f"{where}the run was interrupted")
        if entry.get("hit_in_flight_cap"):
            problems.append(f"{where}too many requests were in flight, so some were not sent")
        if len(part) < num_planned:
            problems.append(f"{where}{num_planned - len(part)} of {num_planned} requests were never finished")
        elif _digest_of(part, load) != manifest["schedule"].get(
            "part_digest", manifest["schedule"]["digest"]
        ):
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


def _sampling_doubts(rows: pd.DataFrame, manifest: Manifest) -> list[str]:
    doubts: list[str] = []
    plan, load = manifest["schedule"], load_of(manifest)
    num_done = int(rows["error"].isna().sum())
    if 0 < num_done < MIN_SAMPLES[95]:
        doubts.append(f"few samples: {num_done} answers, p95 needs {MIN_SAMPLES[95]}")
    rates = (throughput(part, is_open=load.is_open) for _, part in rows.groupby("repeat"))
    windows = [rate.window_s for rate in rates if rate is not None]
    if windows and min(windows) < SHORT_RUN_S:
        doubts.append(f"short run: {min(windows):.1f} s measured, less than {SHORT_RUN_S:g} s")
    if not load.is_open and plan["num_requests"] < 2 * load.concurrency:
        requests = plan["num_requests"]
        doubts.append(f"{requests} requests for {load.concurrency} users: concurrency is not held for long")
    if manifest["corpus"]["recorded_sha256"] is None:
        doubts.append("the corpus has no recorded digest")
    if plan["num_requests"] > manifest["corpus"]["num_prompts"]:
        doubts.append("prompts were sent more than once: a prefix cache would show")
    if manifest["settings"]["url"] and len(manifest["planned_repeats"]) > 1:
        doubts.append("repeats met a server that had seen their prompts: a prefix cache would show")
    return doubts


def _server_doubts(rows: pd.DataFrame, manifest: Manifest) -> list[str]:
    doubts: list[str] = []
    done = rows[rows["error"].isna()]
    early = int((done["num_output_tokens"] < done["max_tokens"]).sum())
    if early:
        doubts.append(f"{early} of {len(done)} answers ended before their budget: outputs differ in length")
    counted = done["chunk_tokens"].map(lambda tokens: None if tokens is None else int(np.sum(tokens)))
    differs = int((counted.notna() & (counted != done["num_output_tokens"])).sum())
    if differs:
        doubts.append(f"{differs} answers streamed another number of tokens than the server counted")
    if len(done) and done["chunk_tokens"].isna().any():
        doubts.append("the server sends no token ids: gaps are between chunks, which may hold several tokens")
    cached = int(done["num_cached_tokens"].fillna(0).sum()) if "num_cached_tokens" in done else 0
    if cached:
        of_all = cached / max(1, int(done["num_prompt_tokens"].sum()))
        doubts.append(f"the server took {cached} prompt tokens ({of_all:.0%}) from a prefix cache")
    for entry in manifest["repeats"]:
        steps = entry["steps"]
        if steps and steps["num_dropped"]:
            doubts.append(f"repeat {entry['repeat']}: the step log lost {steps['num_dropped']} steps")
    return doubts


def _floor_doubts(rows: pd.DataFrame, manifest: Manifest) -> list[str]:
    floor_ms = (manifest.get("floor") or {}).get("ttft_p50_ms")
    ttft_ms = float(rows["ttft_ms"].median())
    if floor_ms is None or not ttft_ms > 0 or floor_ms <= MAX_FLOOR_SHARE * ttft_ms:
        return []
    return [f"the harness's own floor is {floor_ms:.1f} ms of a median TTFT of {ttft_ms:.1f} ms"]


def _machine_doubts(manifest: Manifest) -> list[str]:
    if not manifest["is_local"]:
        return []
    doubts: list[str] = []
    host, service = manifest["host"], manifest["service"] or {}
    governor = host["cpu_governor"]
    if governor not in (None, "performance"):
        doubts.append(f"CPU governor {governor}: clocks follow the load (performance does not)")
    num_threads, num_free = service.get("num_threads", 0), max(1, host["physical_cores"] - 1)
    if num_threads > num_free:
        doubts.append(
            f"{num_threads} engine threads on {host['physical_cores']} physical cores leave harness and API "
            f"no room: set N_THREADS to at most {num_free}"
        )
    for name, bound, sentence in (
        ("steal_share", MAX_STEAL_SHARE, "the hypervisor withheld {:.1%} of the CPU time"),
        ("other_cpu_share", MAX_OTHER_CPU_SHARE, "other processes took {:.0%} of the machine's CPU time"),
        ("harness_cpu_share", MAX_HARNESS_CPU_SHARE, "the harness used {:.0%} of a core: stamps may lag"),
    ):
        values = [entry["machine"][name] for entry in manifest["repeats"]]
        worst = max((value for value in values if value is not None), default=0.0)
        if worst > bound:
            doubts.append(sentence.format(worst))
    return doubts
