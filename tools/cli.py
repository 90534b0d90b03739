"""The `lab` program: one subcommand for each job.

Only the module of the command asked for is imported, so that `lab report` needs no model and `lab --help`
answers at once. Errors of ours are told in one sentence.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from adapters.base import LabError
from adapters.text.unicode_text import printable

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("tools.serve", "run one service: a model behind HTTP, batched by one strategy"),
    "bench": ("harness.commands.bench", "measure one strategy, or any server, and write the rows as parquet"),
    "compare": (
        "harness.commands.compare",
        "measure several strategies in turns and compare them",
    ),
    "sweep": (
        "harness.commands.sweep",
        "measure one strategy over several loads: the knee, and what meets the SLOs",
    ),
    "capacity": (
        "harness.commands.capacity",
        "find the highest rate at which the SLOs hold, for several strategies, with intervals",
    ),
    "simulate": (
        "harness.commands.simulate",
        "predict strategies, policies and fleets on a virtual clock, from a calibration",
    ),
    "calibrate": (
        "harness.commands.calibrate",
        "measure what steps cost on a backend, for `lab simulate`",
    ),
    "plan": (
        "harness.commands.plan",
        "find replicas, MAX_BATCH, strategy and router that meet SLOs at the least cost, simulated",
    ),
    "gate": (
        "harness.commands.gate",
        "hold this tree against a commit, or a result file against an old one; exit status 1 on a regression",
    ),
    "serve-ray": ("tools.ray_serve.command", "run replicas of one service on a Ray cluster"),
    "bench-ray": (
        "tools.ray_serve.load",
        "measure one server with the load of several machines, as tasks of a Ray cluster",
    ),
    "simulate-ray": (
        "tools.ray_serve.simulating",
        "simulate as `lab simulate --brief`, arms, points and seeds as tasks of a Ray cluster",
    ),
    "merge": ("harness.commands.merge", "make one result file of the files of all shards"),
    "report": ("harness.commands.report", "print the table of results that were written before"),
    "results": ("harness.commands.results", "browse, filter and compare all results on a local page"),
    "history": (
        "harness.commands.history",
        "keep results of many commits, and draw their trend with its changes",
    ),
    "model": ("tools.make_model", "make a model, or stage it into a folder of its own"),
    "prompts": ("tools.make_prompts", "make the prompt corpus"),
    "import-prompts": (
        "tools.import_prompts",
        "make a corpus of ShareGPT, OpenAI messages or plain JSON lines",
    ),
    "yardsticks": ("tools.yardsticks", "measure the engine against generate() and its own arithmetic"),
    "profile": ("tools.profiling.step_profile", "measure where the time of a decode step goes, part by part"),
    "host-step": (
        "tools.profiling.host_step",
        "measure what a decode step on CUDA costs the host, without a GPU",
    ),
    "gpu-bench": ("tools.gpu_bench", "measure what the torch backend makes of a GPU, in one run of minutes"),
    "parity": ("tools.parity", "compare logits and greedy tokens of torch fp32 and llama.cpp f32"),
    "kv-curve": ("tools.kv_curve", "compare the KV policies under rising memory pressure, without a model"),
    "step-cost": (
        "tools.profiling.step_cost",
        "measure what the llama.cpp adapter adds to a bare decode loop",
    ),
}

_OURS = {"adapters", "services", "harness", "tools"}


class Command(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lab` with these arguments; 2 is the exit code for everything that was wrong with them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = next((word for word in argv if not word.startswith("-")), None)
    try:
        status = _run(argv, asked)
        sys.stdout.flush()
        return status
    except LabError as error:
        print("\n".join(map(printable, f"lab {asked}: {error}".split("\n"))), file=sys.stderr)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OURS:
            raise
        from adapters.registry import extra_of

        extra = "scale" if package == "ray" else extra_of(package)
        sync = "uv sync" if extra is None else f"uv sync --extra {extra}"
        print(f"lab {asked}: needs {package}; install it with `{sync}`", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `lab report FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"lab {asked}: standard output takes no more: {error.strerror}", file=sys.stderr)
        return 1
    return 2


def _run(argv: Sequence[str], asked: str | None) -> int:
    parser = argparse.ArgumentParser(prog="lab", description="Compare batching strategies for LLM inference.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command: Command | None = None
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == asked:
            command = cast(Command, import_module(module))
            command.add_arguments(subparser)
    args = parser.parse_args(argv)
    assert command is not None, "the parser refuses unknown commands"
    return command.run(args)


if __name__ == "__main__":
    sys.exit(main())
