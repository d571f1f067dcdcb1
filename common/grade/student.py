"""What a check can ask of a student's file: `Student.call`; and how it says what is wrong: `check`, `same`, `Wrong`."""

import ast
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import BACKEND
from .process import COMPILE_SECONDS, IDLE_SECONDS, Ended, Process, TooLong
from .worker import ROOT

LOAD_SECONDS = 60  # of work, for a file to be loaded
CALL_SECONDS = 20  # of work, for a call; compiling is not counted
FULL, HALF = 24, 12  # lanes of a warp that take part in a request, on average: see `shared_out`
_secret = []  # numbers that go into every random input, in a grader that keeps a seed of its own


class Wrong(Exception):
    """A criterion is not met. seen: one sentence, with the input it was seen on. hint: the name of a hint, or None.

    cause: the part of ``seen`` that says why, if that does not depend on the input. gate: is it a finding of the
    sanitizer, beside which nothing else counts in full?
    """

    def __init__(self, seen, hint=None, cause=None, gate=False):
        super().__init__(seen)
        self.seen, self.hint, self.cause, self.gate = seen, hint, cause, gate


def keep_secret(seed):
    """From now on, `random` also depends on ``seed``, an int: nobody knows the inputs beforehand."""
    _secret[:] = [seed]


def random(*seeds):
    """A NumPy generator for inputs: by ints that a check chooses, and by the grader's own seed if it has one."""
    return np.random.default_rng([*_secret, *seeds] if _secret or len(seeds) > 1 else seeds[0])


@dataclass
class Answer:
    """What came of a call. launches: dicts of kernel, own (is it the student's file's?), grid, block, arguments.

    findings: of the sanitizer; looked: at how many launches and accesses, and what it could not look at. memory: lines
    of the memory report, dicts. copied: elements that came to the host. made: arrays that were made on the device.
    seconds: of the processor, compiling not counted.
    """

    value: object
    launches: list = field(default_factory=list)
    findings: list = field(default_factory=list)
    looked: dict | None = None
    memory: list = field(default_factory=list)
    copied: int = 0
    made: int = 0
    seconds: float = 0.0

    @property
    def own(self):
        """The launches of kernels that are defined in the student's file."""
        return [one for one in self.launches if one["own"]]

    def total(self, what, **where):
        """The sum of a figure of the memory report over all such lines: ``total("threads", space="global")``."""
        return sum(line[what] for line in self.memory if all(line[key] == value for key, value in where.items()))


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
    """A student's file, run in processes of its own.

    seconds: how long all calls may work together; a single one may for `CALL_SECONDS`, or ``call_seconds``. Work is
    processor time, compiling not counted. user: a `process.User` as whom the file runs; None is the grader's own.
    """

    def __init__(self, file, seconds, call_seconds=CALL_SECONDS, user=None):
        self.file, self.left = Path(file).resolve(), seconds
        self.limit, self.call_limit, self.user = seconds, call_seconds, user
        self.workers = {}
        self.ended = {}  # functions that have not come to an end -> what was seen
        self.note = None  # a check may set it: a figure to show beside the criterion

    def call(self, function, *args, on, sanitize=False, cpu=False, memory=False, idle=False, hint=None):
        """Call a function of the student's file; an `Answer`.

        args: NumPy arrays, numbers, str, lists and dicts of them. on: the input in words, for what is said of a
        failure. sanitize: run under the sanitizer, on the CPU backend. memory: under the memory report, on the CPU
        backend. idle: launches do nothing, on the CPU backend. cpu: on the CPU backend, also where there is a GPU.
        (Tuples come back as lists.)
        hint: the hint to give, instead of "error", if the function stops with an error.
        Raises `Wrong` if the function stops with an error, does not end in time, ends the process, or does what it may
        not. A file that cannot be loaded is reported in the same way.
        """
        if function in self.ended:
            raise Wrong(f"not tried: {self.ended[function]}", "endless", self.ended[function])
        if self.left <= 0:
            raise self._out_of_time(f"{function} on {on} was not tried")
        backend = "cpu" if sanitize or memory or idle or cpu else BACKEND
        worker = self.workers.get(backend) or self._start(backend)
        self.workers[backend] = worker
        mode = "sanitize" if sanitize else "memory" if memory else "idle" if idle else ""
        doing = f"{function} on {on}"
        limit = min(self.call_limit, self.left)
        try:
            reply = worker.ask({"function": function, "args": args, "mode": mode}, limit)
        except (TooLong, Ended) as error:
            del self.workers[backend]
            self.left -= worker.worked
            wrong = self._ended(worker, doing, error, limit)
            if wrong.hint == "endless":
                self.ended[function] = wrong.cause = wrong.seen
            raise wrong from None
        self.left -= worker.worked
        self._refused(reply, doing)
        if reply["error"] is not None:
            error, kernel = self._error(reply["error"]), reply["error"]["compiling"]
            cause = f"{kernel} cannot be compiled" if kernel else error  # each backend has its own words for it
            raise Wrong(f"{doing}: {error}", self._error_hint(reply["error"], hint), cause)
        facts = ("value", "launches", "findings", "looked", "memory", "copied", "made", "seconds")
        return Answer(**{name: reply[name] for name in facts})

    def clean(self, function, *args, on, hint="unseen"):
        """Call under the sanitizer; `Wrong`, with its first finding, if there is any. Returns the `Answer`.

        hint: the one to give if the sanitizer saw no access to an array.
        """
        answer = self.call(function, *args, on=on, sanitize=True)
        if answer.findings:
            first = answer.findings[0]
            raise Wrong(f"the sanitizer, on {on}: {self._short(first['message'])}", first["kind"], gate=True)
        looked = answer.looked
        if not looked["accesses"]:  # nothing that it saw is not the same as nothing wrong
            why = f": {self._short(looked['notices'][0])}" if looked["notices"] else ""
            launches = f"{looked['launches']} launches"
            raise Wrong(f"the sanitizer saw no access to an array in {launches}, on {on}{why}", hint)
        return answer

    def close(self):
        """End the processes."""
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def _start(self, backend):
        doing = f"loading {self.file.name}"
        worker = Process(self.file, backend, imports_of(self.file), self.user)
        try:
            reply = worker.hear(LOAD_SECONDS)
        except (TooLong, Ended) as error:
            raise self._ended(worker, doing, error, LOAD_SECONDS) from None
        try:
            self._refused(reply, doing)
            if reply["error"] is not None:
                error = self._error(reply["error"])
                hint = "exit" if reply["error"]["type"] in EXITS else "load"
                raise Wrong(f"{self.file.name} cannot be loaded: {error}", hint)
        except Wrong:
            worker.end()
            raise
        return worker

    def _out_of_time(self, doing):
        cause = f"the {self.limit:g} seconds of work that all calls together may take on this machine are over"
        return Wrong(f"{doing}: {cause}", "time", cause)

    def _ended(self, worker, doing, error, limit):
        """What to say of a call that did not come back."""
        if isinstance(error, TooLong):
            worker.end(patience=0)
            if error.kind == "work" and limit < self.call_limit:
                return self._out_of_time(f"{doing} was not finished")
            if error.kind == "compile":
                return Wrong(f"{doing}: this machine had not compiled it in {COMPILE_SECONDS} seconds", "time")
            if error.kind == "idle":
                return Wrong(f"{doing} waits: it did nothing for {IDLE_SECONDS} seconds", "endless")
            return Wrong(f"{doing} did not end within {limit:g} seconds of work", "endless")
        code = worker.end()
        if code is None:
            return Wrong(f"{doing}: the process gave no answer that can be read", "crash")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = worker.said().strip().splitlines()
        return Wrong(f"{doing} ended the process ({how}){': ' + last[-1] if last else ''}", "crash")

    @staticmethod
    def _refused(reply, doing):
        if reply["refused"]:
            cause = f"your code {reply['refused'][0]}"
            raise Wrong(f"{doing}: {cause}", "own-work", cause)

    def _short(self, text):
        """A text with the student's file, and those of the repository, by their names only."""
        text = text.replace(f"{self.file.parent}{os.sep}", "").replace(f"{ROOT}{os.sep}", "")
        for worker in self.workers.values():
            text = text.replace(f"{worker.place}{os.sep}", "")
        return text

    def _error(self, error):
        if error["type"] in EXITS:
            place = f" (at {error['where']})" if error["where"] else ""
            return f"your code ends the program, by {error['type']}{place}"
        lines = self._short(error["message"]).splitlines() or [""]
        message = "\n".join(lines[:8])
        place = f" (at {error['where']})" if error["where"] and error["where"].split(": ")[0] not in message else ""
        return f"{error['type']}: {message}{place}"

    @staticmethod
    def _error_hint(error, hint):
        if error["type"] == "NotImplementedError":
            return "start"
        if error["type"] in EXITS:
            return "exit"
        if error["type"] == "DivergenceError":
            return "shuffle-mask" if "mask" in error["message"] else "divergent-barrier"
        return {"HangError": "hang", "OutOfBoundsError": "out-of-bounds"}.get(error["type"], hint or "error")


EXITS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")


def imports_of(file):
    """Names of the modules that a student's file imports, as far as they are the repository's own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [name for name in names if name.split(".")[0] in ("common", "chapters", "ch14_mini_llm")]


def shared_out(answer, on, kernel, lanes=FULL, warps=1, space="global", hint="alone"):
    """Raise `Wrong` if a kernel's threads do not share its work, by the memory report of an answer.

    lanes: how many of a warp's 32 lanes must take part in a request to memory of this ``space``, on average. warps: how
    many of the launch's first eight must touch it.
    """
    lines = [line for line in answer.memory if line["kernel"] == kernel and line["space"] == space]
    requests, threads = sum(line["requests"] for line in lines), sum(line["threads"] for line in lines)
    check(requests, f"{kernel} does not touch {space} memory, on {on}", hint)
    mean, most = threads / requests, max(line["warps"] for line in lines)
    what = f"when {kernel} turns to {space} memory, {mean:.2g} of a warp's 32 threads take part on average"
    check(mean >= lanes, f"{what}: few threads do the work of all, on {on}", hint)
    what = f"{most} of the first {warps} warps of {kernel} turn to {space} memory"
    check(most >= warps, f"{what}: few threads do the work of all, on {on}", hint)
