"""Ctrl-C ends no step half-way: blocks would be taken and in no table, tokens made and never read."""

from __future__ import annotations

import os
import threading
from _signal import SIGINT, default_int_handler, getsignal  # what `signal` wraps in enumerations: 8 µs a step
from _signal import signal as set_handler
from collections.abc import Iterator
from contextlib import contextmanager

import common

LAUNCHING = {
    os.path.join(os.path.dirname(common.__file__), *path)
    for path in (["launching.py"], ["cpu", "launch.py"], ["cpu", "replay.py"])
}  # what a kernel is compiled, launched and waited for in


class Interrupts:
    """``with interrupts:`` a Ctrl-C within is raised at the end. Where another thread runs, or a program has a handler
    of its own, nothing is changed."""

    def __init__(self) -> None:
        self._held, self._came, self._open = False, False, False

    def __enter__(self) -> Interrupts:
        self._came, self._held = False, threading.current_thread() is threading.main_thread()
        self._held = self._held and getsignal(SIGINT) is default_int_handler
        if self._held:
            set_handler(SIGINT, self._note)
        return self

    def __exit__(self, kind, *_) -> None:
        if self._held:
            set_handler(SIGINT, default_int_handler)
            self._held = False
            if self._came and kind is None:
                raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Here a Ctrl-C in a kernel's launch, which may take long, is raised at once, as the kernel's errors are."""
        if self._came:
            raise KeyboardInterrupt
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _note(self, _, frame) -> None:
        self._came = True
        while self._open and frame is not None:
            if frame.f_code.co_filename in LAUNCHING:
                raise KeyboardInterrupt
            frame = frame.f_back
