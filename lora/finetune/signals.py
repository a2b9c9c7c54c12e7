"""Ctrl-C and SIGTERM during training: finish the step, save, then stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lora.finetune import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals that stop a training after its current step. Every system has them."""


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Inside, the first SIGINT or SIGTERM is only noted; a second one ends the process.

    Yields a function that returns the signal received so far, 0 if there was none. Signals that
    were ignored before (nohup, a job in the background) stay ignored. Outside the main thread
    Python allows no signal handlers, and nothing changes.
    """
    received, prints = 0, distributed.rank() == 0
    handlers_before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        nonlocal received
        received = int(number)
        for other in handlers_before:
            signal.signal(other, signal.SIG_DFL)
        name = signal.Signals(number).name
        text = f"{name}: finishing the step and saving; press again to stop now\n"
        with suppress(OSError):  # os.write, since print may be interrupted in itself
            os.write(2, text.encode() if prints else b"")

    if threading.current_thread() is threading.main_thread():
        for stopped_by in SIGNALS:
            if signal.getsignal(stopped_by) is not signal.SIG_IGN:
                handlers_before[stopped_by] = signal.signal(stopped_by, note)
    try:
        yield lambda: received
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
