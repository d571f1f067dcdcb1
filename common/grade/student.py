"""What a check can ask of a student's file: `Student.call`; and how it says what is wrong: `check`, `same`, `Wrong`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from .. import BACKEND
from .wire import pack, unpack

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 60  # for the process to start and to load the file, on a busy machine
SLACK = 2.0


class Wrong(Exception):
    """A criterion is not met. seen: one sentence, with the input it was seen on. hint: the name of a hint, or None.

    cause: the part of ``seen`` that says why, if that does not depend on the input.
    """

    def __init__(self, seen, hint=None, cause=None):
        super().__init__(seen)
        self.seen, self.hint, self.cause = seen, hint, cause


@dataclass
class Answer:
    """What came of a call. launches: dicts of kernel, own (is it the student's file's?), grid, block, arguments."""

    value: object
    launches: list = field(default_factory=list)
    findings: list = field(default_factory=list)

    @property
    def own(self):
        """The launches of kernels that are defined in the student's file."""
        return [one for one in self.launches if one["own"]]


def check(condition, seen, hint=None):
    """Raise `Wrong` unless the condition holds. seen: what was seen, and on which input."""
    if not condition:
        raise Wrong(seen, hint)


def same(got, expected, what, on, rtol=0.0, atol=0.0, hint=None):
    """Raise `Wrong` if an array (or number) is not the expected one; it says where the first difference is.

    what: its name, such as "out". on: the input, such as "n = 33". rtol, atol: as for np.isclose; 0 asks for equality.
    NaN equals NaN.
    """
    expected = np.asarray(expected)
    if not isinstance(got, (np.ndarray, np.generic, int, float, bool)):
        raise Wrong(f"{what} is {got!r}, not an array, on {on}", hint)
    got = np.asarray(got)
    if got.shape != expected.shape:
        raise Wrong(f"{what} has the shape {got.shape}, expected {expected.shape}, on {on}", hint)
    near = np.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=expected.dtype.kind == "f")
    if near.all():
        return
    first = tuple(int(i) for i in np.argwhere(~near)[0])
    element = f"{what}[{', '.join(map(str, first))}]" if first else what
    rest = f"; {(~near).sum()} of {near.size} elements differ" if near.size > 1 else ""
    raise Wrong(f"{element} is {got[first]:.9g}, expected {expected[first]:.9g}, on {on}{rest}", hint)


class Student:
    """A student's file, run in processes of its own. seconds: how long all calls may take together."""

    def __init__(self, file, seconds):
        self.file, self.left = Path(file).resolve(), seconds
        self.limit = seconds
        self.workers = {}
        self.note = None  # a check may set it: a figure to show beside the criterion

    def call(self, function, *args, on, sanitize=False, cpu=False, hint=None):
        """Call a function of the student's file; an `Answer`.

        args: NumPy arrays, numbers, str, lists and dicts of them. on: the input in words, for what is said of a
        failure. sanitize: run under the sanitizer, on the CPU backend (tuples come back as lists). cpu: on the CPU
        backend, also where there is a GPU; for what uses common.memory_report.
        hint: the hint to give, instead of "error", if the function stops with an error.
        Raises `Wrong` if the function stops with an error, does not end in time, ends the process, or does what it may
        not. A file that cannot be loaded is told in the same way.
        """
        if self.left <= 0:
            raise Wrong(f"not tried: the {self.limit:g} seconds that your code may take in all were over", "endless")
        backend = "cpu" if sanitize or cpu else BACKEND
        worker = self.workers.get(backend) or self._start(backend)
        self.workers[backend] = worker
        start = time.monotonic()
        try:
            told = worker.ask({"function": function, "args": args, "sanitize": sanitize}, self.left)
        except (EOFError, TimeoutError, OSError) as error:
            self.left -= time.monotonic() - start
            del self.workers[backend]
            raise self._ended(worker, f"{function} on {on}", error) from None
        self.left -= time.monotonic() - start
        self._refused(told, f"{function} on {on}")
        if told["error"] is not None:
            error = self._error(told["error"])
            raise Wrong(f"{function} on {on}: {error}", self._error_hint(told["error"], hint), error)
        return Answer(told["value"], told["launches"], told["findings"])

    def clean(self, function, *args, on):
        """Call under the sanitizer; `Wrong`, with its first finding, if there is any. Returns the `Answer`."""
        answer = self.call(function, *args, on=on, sanitize=True)
        if answer.findings:
            first = answer.findings[0]
            raise Wrong(f"the sanitizer, on {on}: {self._short(first['message'])}", first["kind"])
        return answer

    def close(self):
        """End the processes."""
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def _start(self, backend):
        worker = _Worker(self.file, backend)
        start = time.monotonic()
        try:
            told = worker.hear(START_SECONDS)
        except (EOFError, TimeoutError, OSError) as error:
            self.left -= time.monotonic() - start
            raise self._ended(worker, f"loading {self.file.name}", error) from None
        try:
            self._refused(told, f"loading {self.file.name}")
            if told["error"] is not None:
                raise Wrong(f"{self.file.name} cannot be loaded: {self._error(told['error'])}", "error")
        except Wrong:
            worker.end()
            raise
        return worker

    @staticmethod
    def _ended(worker, doing, error):
        if isinstance(error, TimeoutError):
            worker.end()
            return Wrong(f"{doing} did not end within {max(1, round(worker.waited))} seconds", "endless")
        code = worker.end()
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        last = worker.said().strip().splitlines()
        return Wrong(f"{doing} ended the process ({how}){': ' + last[-1] if last else ''}", "crash")

    @staticmethod
    def _refused(told, doing):
        if told["refused"]:
            raise Wrong(f"{doing}: your code {told['refused'][0]}", "own-work")

    def _short(self, text):
        """A text with the student's file, and those of the repository, by their names only."""
        return text.replace(f"{self.file.parent}{os.sep}", "").replace(f"{ROOT}{os.sep}", "")

    def _error(self, error):
        lines = self._short(error["message"]).splitlines() or [""]
        message = "\n".join(lines[:8])
        place = f" (at {error['where']})" if error["where"] and error["where"].split(": ")[0] not in message else ""
        return f"{error['type']}: {message}{place}"

    @staticmethod
    def _error_hint(error, hint):
        if error["type"] == "NotImplementedError":
            return "start"
        if error["type"] == "DivergenceError":
            return "shuffle-mask" if "mask" in error["message"] else "divergent-barrier"
        return {"HangError": "hang", "OutOfBoundsError": "out-of-bounds"}.get(error["type"], hint or "error")


class _Worker:
    """One process with the student's file."""

    def __init__(self, file, backend):
        here, there = socket.socketpair()
        self.link, self.waited = Connection(here.detach()), 0.0
        self.output = tempfile.TemporaryFile()
        places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environ = os.environ | {"MINI_BACKEND": backend, "PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "common.grade.worker", str(there.fileno()), str(file)]
        self.folder = tempfile.TemporaryDirectory()
        with there:
            self.process = subprocess.Popen(
                command, cwd=self.folder.name, env=environ, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ask(self, request, seconds):
        self.link.send_bytes(pack(request))
        return self.hear(seconds)

    def hear(self, seconds):
        """The next message. Raises TimeoutError, or EOFError if the process has ended."""
        self.waited = seconds
        if not self.link.poll(seconds):
            raise TimeoutError
        return unpack(self.link.recv_bytes())

    def end(self):
        """End the process, and all that it has started; returns its exit code if it had ended by itself."""
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SLACK if self.process.poll() is None else 0)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()
        return code

    def said(self):
        """What the process printed, its last lines."""
        self.output.seek(0)
        return self.output.read()[-4000:].decode(errors="replace")
