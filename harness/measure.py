"""Measures one arm: starts what is needed, replays the schedule, leaves a judged file.

One service runs at a time, a fresh one for each repeat unless several loads share it. Whatever ends the run,
every finished request is in the file or, after a kill, in the journal beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Self

from adapters.base import ConfigError, LabError
from harness.client.answer import Answer
from harness.client.server import Server, find_server
from harness.plan.corpus import Corpus
from harness.plan.run_size import Trial, mean_budget
from harness.plan.salt import choose_salt, with_salted_prompts
from harness.plan.schedule import Schedule
from harness.replay.arm_file import Arm, ArmFile, Measurement
from harness.replay.floor import measure_floor
from harness.replay.interrupts import on_interrupt, raise_interrupt
from harness.replay.progress import Reporter
from harness.replay.provenance import describe_repeat
from harness.replay.replay import measure_speed, replay
from harness.replay.service_process import RunningService, ServiceLaunch, running_service
from harness.results.manifest import RepeatEntry
from harness.results.steps import step_rows
from harness.settings import HarnessSettings

Served = tuple[Server, RunningService | None]


def measure(
    arm: Arm,
    settings: HarnessSettings,
    corpus: Corpus,
    schedule: Schedule,
    reporter: Reporter,
    repeats: Sequence[int],
    sized: Callable[[float], Schedule] | None = None,
    served: Callable[[], AbstractContextManager[Served]] | None = None,
) -> Measurement:
    """Replay `schedule` once for each of `repeats` (the numbers their rows will carry).

    `sized` makes the schedule in its place, once, from the output tokens a second of the first service.
    `served` gives the service of each repeat, by default a fresh one.

    Raises:
        LabError: the service could not be started or asked, or the disk is full; the message says what is
            kept.
        KeyboardInterrupt: told to stop before anything was measured.
    """
    file: ArmFile | None = None
    try:
        with on_interrupt(raise_interrupt):
            if settings.floor:
                reporter.announce("measuring the harness's own floor")
            floor = measure_floor() if settings.floor else None
            for repeat in repeats:
                with served() if served else _served(arm, settings, reporter) as (server, service):
                    if file is None:
                        if sized is not None:
                            reporter.announce("sizing the run")
                            schedule = sized(measure_speed(server, settings, corpus).tokens_per_s)
                        schedule = schedule.salted(choose_salt(settings, is_foreign=server.card is None))
                        file = ArmFile(arm, server, settings, corpus, schedule, repeats)
                        file.manifest.floor = floor
                    entry = _measure_repeat(file, server, service, settings, schedule, reporter, repeat)
                if entry.was_interrupted:
                    break
    except BaseException as error:
        if file is not None and file.is_complete and isinstance(error, KeyboardInterrupt):
            return replace(file.finish(), stopped_after=True)  # only its service was still to be ended
        if file is not None:
            kept = file.keep()
            if isinstance(error, LabError):
                raise LabError(f"{error}; {kept}") from error
            reporter.announce(kept)
        raise
    assert file is not None, "at least one repeat"
    return file.finish()


def try_out(
    arm: Arm, settings: HarnessSettings, corpus: Corpus, reporter: Reporter, budgets: Sequence[int] = ()
) -> Trial:
    """What the arm does in some seconds: answers of one length, then those of `budgets` where there are any.

    Raises:
        LabError: as `measure`.
        KeyboardInterrupt: told to stop.
    """
    start_s = perf_counter()
    with on_interrupt(raise_interrupt), _served(arm, settings, reporter) as (server, _):
        reporter.announce(f"trying out {arm.name}")
        guess_s = perf_counter()
        speed = measure_speed(server, settings, corpus, budgets)
        guess_s = perf_counter() - guess_s
    # Three digits, so that schedules can be had again.
    capacity = float(f"{speed.tokens_per_s / mean_budget(corpus):.3g}")
    service_s = perf_counter() - start_s - guess_s + speed.settling_s
    return Trial(capacity, speed.unequal_tokens_per_s, service_s, speed.warm_up_s)


def _measure_repeat(
    file: ArmFile,
    server: Server,
    service: RunningService | None,
    settings: HarnessSettings,
    schedule: Schedule,
    reporter: Reporter,
    repeat: int,
) -> RepeatEntry:
    num_tokens = 0

    def on_complete(answer: Answer) -> None:
        nonlocal num_tokens
        num_tokens += answer.num_output_tokens or 0
        file.add(repeat, answer)
        reporter.advance(answer)

    sent = with_salted_prompts(schedule, repeat)
    result = replay(server, sent, settings, reporter, label=file.label(repeat), on_complete=on_complete)
    problem = service.problem() if service else None
    entry = describe_repeat(repeat, result, server.card, problem, num_tokens)
    file.end_repeat(entry, step_rows(result.steps, file.run_id, repeat))
    return entry


class SharedService:
    """The service that several measurements of one arm ask in turn: the first one starts it.

    One with a prefix cache is started anew for each, since it has seen prompts that the next load may bring.
    """

    def __init__(self, arm: Arm, settings: HarnessSettings, reporter: Reporter) -> None:
        self._start = partial(_served, arm, settings, reporter)
        self._running = ExitStack()
        self._served: Served | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @contextmanager
    def served(self) -> Iterator[Served]:
        if self._served is None:
            self._served = self._running.enter_context(self._start())
        server, service = self._served
        yield server, service
        if server.keeps_prompts or (service and service.problem()):
            self._served = None
            self._running.close()


@contextmanager
def _served(arm: Arm, settings: HarnessSettings, reporter: Reporter) -> Iterator[Served]:
    """The server of one repeat: the one at URL, or a service started for it alone."""
    if settings.url:
        server = find_server(settings.url, settings)
        _check_label(arm, server)
        yield server, None
        return
    chosen = {"BACKEND": settings.backend, "MODEL": settings.model}
    env = {name: value for name, value in chosen.items() if value}
    launch = ServiceLaunch(arm.variant, env, arm.settings, source=arm.source)
    with running_service(
        launch, start_timeout_s=settings.start_timeout_s, announce=reporter.announce
    ) as service:
        server = find_server(service.url, settings, service.process.pid)
        _check_label(arm, server)
        yield server, service


def _check_label(arm: Arm, server: Server) -> None:
    """A label that contradicts what a service of ours says about itself is refused."""
    served = server.card.variant if server.card else None
    # Longer names of the same strategies begin with the canonical one (`static_batch`).
    if arm.variant and served and not arm.variant.startswith(served):
        advice = "" if server.pid else "; leave VARIANT out"
        raise ConfigError(f"the service at {server.url} runs {served}, not {arm.variant}{advice}")
