"""A process of the harness ends with the harness, also where that is killed and can tell nobody."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Called first in a process that multiprocessing started."""
    parent = parent_process()
    assert parent is not None, "called in a child"
    # The kernel closes the parent's end of this pipe however the parent ends.
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
