"""`lab bench`: one strategy (or any server at a URL), measured from start to table.

Exit status: 0 when the run counts, 1 when it is INVALID, 2 when it could not be made, 130 when it was
interrupted.
"""

from __future__ import annotations

import argparse
import sys

from harness.commands.options import add_corpus_option, add_slo_option
from harness.commands.report import render_report
from harness.measure import measure
from harness.plan.planner import plan
from harness.plan.run_size import num_requests, sizes_itself
from harness.plan.schedule import Schedule
from harness.replay.arm_file import Arm, Measurement
from harness.replay.progress import make_reporter
from harness.results.openmetrics import push, write_openmetrics
from harness.results.output_dir import make_folder
from harness.results.slo import Slo
from harness.settings import OF_COMPARE, add_setting_options, read_settings

INTERRUPTED_STATUS = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(parser, leave_out=OF_COMPARE)
    add_corpus_option(parser)
    add_slo_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return the exit status.

    Raises:
        LabError: nothing could be measured; the message says why.
    """
    settings = read_settings(args)
    corpus, schedule = plan(settings, allow_changed_corpus=args.allow_changed_corpus)
    make_folder(settings.out)
    # With a URL the variant is a label, and only one that was given; otherwise the service has a default.
    arm = Arm(settings.variant)

    def sized(tokens_per_s: float) -> Schedule:
        chosen = {"requests": num_requests(tokens_per_s, corpus, settings)}
        longer = settings.model_copy(update=chosen)
        return plan(longer, allow_changed_corpus=args.allow_changed_corpus)[1]

    with make_reporter() as reporter:
        measurement = measure(
            arm,
            settings,
            corpus,
            schedule,
            reporter,
            range(settings.repeats),
            sized if sizes_itself(settings) else None,
        )
    slo = Slo(tuple(args.slo))
    print(render_report(measurement.rows, measurement.manifest, measurement.validity, measurement.path, slo))
    write_openmetrics(measurement.path, measurement.rows, measurement.manifest)
    if (problem := push(measurement.rows, measurement.manifest)) is not None:
        print(f"warning: {problem}", file=sys.stderr)
    return exit_status(measurement)


def exit_status(measurement: Measurement) -> int:
    if measurement.was_interrupted:
        return INTERRUPTED_STATUS
    return 1 if measurement.validity.level == "INVALID" else 0
