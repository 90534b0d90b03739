"""`lab yardsticks --served`: services of ours and servers that run already, under the same load in turns.

All are there before the first turn, and one is under load at a time. Each gets the prompts that the others
get; a number in front of them is new in each block of each run, so that no prefix cache gains.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from typing import Any

from adapters.base import LabError
from harness.client.answer import Answer
from harness.client.server import Server, find_server
from harness.plan.planner import plan
from harness.plan.salt import choose_salt, with_salted_prompts
from harness.replay.progress import Reporter, make_reporter
from harness.replay.replay import replay
from harness.replay.service_process import ServiceLaunch, running_service
from harness.settings import HarnessSettings, read_settings
from tools.engine_yardsticks import name_and_dtype, print_ratios, say, take_turns

_USERS = 16
_START_TIMEOUT_S = 300.0
_MOST_CACHED = 0.05
"""Of all prompt tokens: the first token or two of every prompt are the same."""


def run(args: argparse.Namespace) -> int:
    """Start what is no NAME=URL, measure, print, write `OUT/yardsticks/<UTC time>.parquet`.

    Raises:
        LabError: a service does not start, or a request failed.
    """
    given = {"requests": args.requests, "concurrency": _USERS, "rate": None, "url": None, "repeats": 1}
    settings = read_settings(argparse.Namespace()).model_copy(
        update={**given, "model": None, "variant": None}
    )
    env = {"MODEL": args.model} | ({"N_THREADS": str(args.threads)} if args.threads else {})
    salt = choose_salt(settings, is_foreign=True)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(make_reporter())
        servers: dict[str, Server] = {}
        for entry in args.served:
            name, _, url = entry.partition("=")
            pid = None
            if not url:
                say(f"starting {name}")
                backend, dtype = name_and_dtype(name, args)
                launch = ServiceLaunch("continuous", {**env, "BACKEND": backend, "DTYPE": dtype})
                service = stack.enter_context(
                    running_service(launch, start_timeout_s=_START_TIMEOUT_S, announce=reporter.announce)
                )
                url, pid = service.url, service.process.pid
            servers[name] = find_server(url, settings, pid)
        measures = {
            name: partial(_measure, server, name, settings, salt, reporter)
            for name, server in servers.items()
        }
        told = {
            name: server.card.model_dump() if server.card else server.url for name, server in servers.items()
        }
        frame, path = take_turns(measures, args, {"servers": told, "salt": salt})
    print_ratios(frame, f"{args.model}, served", {name: name for name in servers})
    say(f"rows: {path}")
    return 0


def _measure(
    server: Server, name: str, settings: HarnessSettings, salt: str | None, reporter: Reporter, block: int
) -> list[dict[str, Any]]:
    """One replay after a warm-up, from the first request sent to the last answer's end.

    Raises:
        LabError: a request failed, or its answer is not what the others are measured on.
    """
    _, schedule = plan(settings, allow_changed_corpus=False, draw=block)
    sent = with_salted_prompts(schedule.salted(salt), block)
    answers: list[Answer] = []
    result = replay(server, sent, settings, reporter, label=name, on_complete=answers.append)
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors or len(answers) < len(sent.requests):
        raise LabError(f"{name}: {len(answers)} answers, {len(errors)} failed: {errors[:1]}")
    if short := sum((answer.num_output_tokens or 0) < answer.planned.max_tokens for answer in answers):
        raise LabError(
            f"{name}: {short} of {len(answers)} answers ended early, so that it did less than others"
        )
    cached = sum(answer.num_cached_tokens or 0 for answer in answers)
    if cached > _MOST_CACHED * sum(answer.num_prompt_tokens or 0 for answer in answers):
        raise LabError(f"{name}: {cached} prompt tokens came out of a cache: switch its prefix cache off")
    started_s = min(answer.sent_s for answer in answers if answer.sent_s is not None)
    ended_s = max(answer.finish_s for answer in answers if answer.finish_s is not None)
    row = {
        "measure": f"{len(answers)} requests, {_USERS} users",
        "num_tokens": sum(answer.num_output_tokens or 0 for answer in answers),
        "seconds": ended_s - started_s,
        "other_cpu_share": result.use.other_cpu_share,
    }
    return [row]
