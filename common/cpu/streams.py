"""Streams and events of the CPU backend.

On a GPU a stream is a queue: a launch or copy is put in and the call returns at once. Here every call has finished its
work when it returns, so a stream is always empty, waiting is free, and an event's time is the time of ``record``.
Elapsed times are real. What several threads ask for happens one after another (`IN_ORDER`), as on a GPU's default
stream. What a program must not forget on a GPU (``stream.synchronize()`` before it reads a result) cannot go wrong:
a program that is right here may still lack it.
"""

import asyncio
import contextlib
import itertools
import os
import threading
import time
import warnings

_DEFAULT, _LEGACY, _PER_THREAD = 0, 1, 2  # the CUDA driver's handles for its built-in streams
_handles = itertools.count(_PER_THREAD + 1)

IN_ORDER = threading.RLock()  # held by the thread whose launch or copy is carried out
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IN_ORDER._at_fork_reinit)


class Stream:
    """A command queue that is always empty. Make one with ``cuda.stream()``."""

    def __init__(self, handle=None):
        self.handle = next(_handles) if handle is None else handle
        self.external = False

    def __int__(self):
        return self.handle

    def __bool__(self):
        return True  # as in numba-cuda, where only the number 0 is false

    def __repr__(self):
        builtin = {_DEFAULT: "Default", _LEGACY: "Legacy default", _PER_THREAD: "Per-thread default"}
        if self.handle in builtin:
            return f"<{builtin[self.handle]} stream of the CPU backend>"
        return f"<Stream {self.handle} of the CPU backend>"

    def synchronize(self):
        """Wait for the work in this stream; there is never any left."""

    @contextlib.contextmanager
    def auto_synchronize(self):
        """A context manager that gives the stream and synchronizes it on leaving."""
        yield self
        self.synchronize()

    def add_callback(self, callback, arg=None):
        """Call ``callback(stream, status, arg)`` once the work before it is done: that is now, in this thread.

        ``status`` is 0. As in numba-cuda, an exception in the callback becomes a warning.
        """
        try:
            callback(self, 0, arg)
        except Exception as error:
            warnings.warn(f"Exception in stream callback: {error}", stacklevel=2)

    def async_done(self):
        """An awaitable whose result is this stream; needs a running event loop (``RuntimeError`` without one)."""
        future = asyncio.get_running_loop().create_future()
        future.set_result(self)
        return future


DEFAULT_STREAM = Stream(_DEFAULT)
LEGACY_DEFAULT_STREAM = Stream(_LEGACY)
PER_THREAD_DEFAULT_STREAM = Stream(_PER_THREAD)


def check_stream(stream):
    """Return ``stream`` if it is a :class:`Stream` or 0 (or None), the default stream; else raise ``TypeError``."""
    if isinstance(stream, Stream) or stream is None or (isinstance(stream, int) and stream == 0):
        return stream
    raise TypeError(
        f"Expected a Stream object or 0, got {type(stream).__name__} ({stream!r}); make a stream with cuda.stream()"
    )


class Event:
    """A mark in a stream that remembers when it was passed. Make one with ``cuda.event()``."""

    def __init__(self, timing=True):
        self.timing = bool(timing)
        self._recorded_ns = None

    def record(self, stream=0):
        """Set the event to this moment of ``stream`` (everything before it has finished)."""
        check_stream(stream)
        self._recorded_ns = time.perf_counter_ns()

    def query(self):
        """Whether all work before the last ``record`` has finished: True, also when nothing was recorded."""
        return True

    def synchronize(self):
        """Wait until the event has happened: at once."""

    def wait(self, stream=0):
        """Make later work of ``stream`` wait for this event: it has happened."""
        check_stream(stream)

    def elapsed_time(self, evtend):
        """Milliseconds (float) from this event to ``evtend``; see :func:`event_elapsed_time`."""
        return event_elapsed_time(self, evtend)


def event_elapsed_time(evtstart, evtend):
    """Milliseconds (float) of wall time between two recorded events.

    Raises ``TypeError`` for anything but events, and ``RuntimeError`` if one was made with ``timing=False`` or never
    recorded.
    """
    for which, event in (("start", evtstart), ("end", evtend)):
        if not isinstance(event, Event):
            raise TypeError(f"the {which} event is of type {type(event).__name__}, not an event; use cuda.event()")
        if not event.timing:
            raise RuntimeError(f"the {which} event was made with timing=False and knows no time; use cuda.event()")
        if event._recorded_ns is None:
            raise RuntimeError(f"the {which} event was never recorded; call its record() before asking for the time")
    return (evtend._recorded_ns - evtstart._recorded_ns) / 1e6


def stream():
    """A new :class:`Stream`."""
    return Stream()


def default_stream():
    """The default stream, the one meant by ``stream=0``."""
    return DEFAULT_STREAM


def legacy_default_stream():
    """The legacy default stream."""
    return LEGACY_DEFAULT_STREAM


def per_thread_default_stream():
    """The per-thread default stream."""
    return PER_THREAD_DEFAULT_STREAM


def external_stream(ptr):
    """Not on the CPU backend (``NotImplementedError``): an external stream is a handle of a GPU driver."""
    raise NotImplementedError(f"external stream {ptr!r}: a handle of a GPU driver; the CPU backend has cuda.stream()")


def event(timing=True):
    """A new :class:`Event`; it knows times only with ``timing=True``."""
    return Event(timing)
