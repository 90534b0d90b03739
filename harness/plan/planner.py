"""What a run will do, decided before it starts: which prompts, when.

Prompts come from the recorded corpus, a given file or a trace, or are made up; times from a load or a trace.
"""

from __future__ import annotations

from adapters.base import ConfigError
from harness.plan.arrival_times import KIND_OF, Arrivals, Load
from harness.plan.corpus import Corpus, default_path, load_corpus
from harness.plan.load import make_load, refuse_of_closed, refuse_parameters
from harness.plan.schedule import Schedule, derive_seed, make_schedule
from harness.plan.synthetic import synthetic_corpus
from harness.plan.traces import load_trace, trace_corpus
from harness.settings import HarnessSettings

_SYNTHETIC = "synthetic:"
_INSTRUCTIONS = "instructions"


def plan(
    settings: HarnessSettings, *, allow_changed_corpus: bool, draw: int | None = None
) -> tuple[Corpus, Schedule]:
    """The corpus and the schedule, or the part of it, that the settings ask for.

    `draw` takes another sample of the corpus and other arrivals; a trace has those that it has.

    Raises:
        ConfigError: they cannot be had, or contradict each other.
    """
    corpus, schedule = _plan_whole(settings, allow_changed_corpus, draw)
    index, of = settings.which_shard()
    if settings.start_at is not None and settings.repeats > 1:
        raise ConfigError("START_AT is one instant: with REPEATS above 1 the second replay would be late")
    if len(schedule.requests) < of * settings.processes:
        raise ConfigError(
            f"{len(schedule.requests)} requests are too few for {of * settings.processes} parts"
        )
    part = schedule.part(index, of) if of > 1 else schedule
    part.part(0, settings.processes)  # refuses what the processes could not split
    return corpus, part


def _plan_whole(
    settings: HarnessSettings, allow_changed_corpus: bool, draw: int | None
) -> tuple[Corpus, Schedule]:
    if settings.trace is not None:
        return _plan_trace(settings)
    for name in ("time_scale", "trace_max_tokens"):
        if (value := getattr(settings, name)) is not None:
            raise ConfigError(f"{name.upper()}={value:g} needs a TRACE")
    load = make_load(
        concurrency=settings.concurrency,
        rate=settings.rate,
        arrivals=settings.arrivals,
        think_ms=settings.think_ms,
        think=settings.think,
        ramp_s=settings.ramp_s,
        **_parameters(settings),
    )
    asked = str(settings.corpus or "")
    if asked.startswith(_SYNTHETIC):
        spec, seed = asked.removeprefix(_SYNTHETIC), derive_seed(settings.seed, "prompts")
        corpus = synthetic_corpus(spec, settings.requests, seed)
    else:
        path = default_path(_INSTRUCTIONS) if asked == _INSTRUCTIONS else settings.corpus or default_path()
        corpus = load_corpus(path, allow_changed=allow_changed_corpus)
    return corpus, make_schedule(corpus.prompts, settings.requests, load, settings.seed, draw=draw)


def _plan_trace(settings: HarnessSettings) -> tuple[Corpus, Schedule]:
    """At most REQUESTS rows, at the trace's own times; its mean rate is what counts as asked for."""
    assert settings.trace is not None
    if settings.rate is not None or settings.corpus is not None or settings.arrivals not in (None, "trace"):
        raise ConfigError("TRACE brings arrivals and lengths of its own: leave out RATE, ARRIVALS and CORPUS")
    refuse_parameters(_parameters(settings))
    refuse_of_closed(think_ms=settings.think_ms, think=settings.think, ramp_s=settings.ramp_s)
    time_scale = 1.0 if settings.time_scale is None else settings.time_scale
    trace = load_trace(
        settings.trace,
        num_rows=settings.requests,
        time_scale=time_scale,
        max_tokens=settings.trace_max_tokens,
    )
    corpus = trace_corpus(
        trace, settings.trace, derive_seed(settings.seed, "prompts"), max_tokens=settings.trace_max_tokens
    )
    offsets_s = [row.offset_s for row in trace.rows]
    rate = (len(offsets_s) - 1) / offsets_s[-1] if offsets_s[-1] > 0 else float(len(offsets_s))
    load = Load(Arrivals.TRACE, rate=rate, trace_sha256=trace.sha256, time_scale=time_scale)
    schedule = make_schedule(corpus.prompts, len(trace.rows), load, settings.seed, offsets_s=offsets_s)
    return corpus, schedule


def _parameters(settings: HarnessSettings) -> dict[str, float | None]:
    """Of all arrival processes, as they were given."""
    return {name: getattr(settings, name) for name in KIND_OF}
