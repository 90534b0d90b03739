"""Parts of `gpu_bench` that go wrong on purpose; a process of its own runs each."""

from __future__ import annotations

import logging
import os
import sys
import time

from tools.gpu.part import LOADED, PartRun


def good(part: PartRun) -> None:
    part.add_facts(answer=42)
    part.add("good", "row", value=1.5, earlier=len(part.earlier))
    logging.getLogger("adapters.somewhere").warning("the backend warns")


def failing(part: PartRun) -> None:
    part.add("failing", "before", value=1.0)
    raise RuntimeError("CUDA error: no kernel image")


def hanging(part: PartRun) -> None:
    part.add("hanging", "before", value=1.0)
    print("it hangs now", file=sys.stderr)
    time.sleep(600)


def crashing(part: PartRun) -> None:
    part.add("crashing", "before", value=1.0)
    os.abort()


def loading_without_graphs(part: PartRun) -> None:
    part.begin_loading()
    if part.options.get("cuda_graphs", True):
        raise RuntimeError("decode steps cannot be captured")
    part.add(LOADED, part.kind)
    part.run("one that fails", lambda: failing(part))
    part.add("good", "after it")


def never_loading(part: PartRun) -> None:
    part.begin_loading()
    raise RuntimeError("256 slots do not fit")
