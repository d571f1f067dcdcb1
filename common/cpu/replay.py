"""Launches kept and run again, without what a launch looks at each time: what `common.graph` is without a GPU.

A launch takes some 10 µs of Python. Behind a kernel that has sent megabytes of weights through the caches, it takes
100: the code and the objects of Python have to come from memory again. So a replay touches as little of both as it can:
for each launch a word that says which kernel runs, and one call.
"""

import functools
import math

from . import crash, fresh, guard, launch, native
from .arrays import checking
from .errors import OutOfBoundsError
from .streams import IN_ORDER

SHARED_SECONDS = 6e-6  # a launch estimated shorter than this is not divided between threads


class Replay:
    """What ``launches()`` launches: run as it is the first time, from then on as it was then.

    Under the sanitizer, in a trace, or with checks they are launched as ever, since those want to see each launch; and
    until all of them run on their own arrays (the first launch with a NumPy array runs on a copy, see `guard`).
    """

    def __init__(self, launches):
        self._launches = launches
        self._steps = None  # see `Dispatcher._launch`
        self._calls, self._canaries, self._row = [], [], None  # what they are made into for a thread: see `_bind`
        self._unsure = False  # whether there is one whose time was not known then

    def run(self):
        """Run the launches, in order."""
        if self._steps is None or launch._sanitizer is not None or launch._trace is not None or checking():
            self._record()
            return
        fresh.unwatched_launch()
        with IN_ORDER:
            row = launch._mine.__dict__.get("row")
            if row is None or row is not self._row or self._unsure:
                row = self._bind()
            if row.running[launch._NOTE]:  # a signal handler's, in the middle of another launch
                self._launches()
                return
            self._run(row)
            if any(read() != whole for read, whole in self._canaries):
                self._damaged()

    def _record(self):
        mine = launch._mine.__dict__
        if self._steps is not None or "steps" in mine or launch._sanitizer is not None or checking():
            self._launches()
            return
        launch._mine.steps = steps = []
        try:
            self._launches()
        finally:
            del launch._mine.steps
        self._steps = steps if None not in steps else None

    def _bind(self):
        """Make calls of the launches, with the error array of this thread's row; returns the row. Ctrl-C in the middle
        must not leave some of them, so nothing is set before the end."""
        row = launch._mine.row = launch._mine.__dict__.get("row") or crash.Row()
        calls, canaries, several, unsure = [], {}, launch.workers() > 1, False
        records, first, all_seconds = [], 0, 0.0
        for number, (kernel, compiled, history, last, block, shared_bytes, values, pairs) in enumerate(self._steps):
            blocks = last.grid[0] * last.grid[1] * last.grid[2]
            seconds = last.known * blocks
            unsure |= math.isinf(seconds)
            arguments = *last.grid, launch._NOTHING, row.err, *values
            shared, record = blocks > 1 and several, None
            if not shared_bytes and seconds < launch.SLICE:
                divided = shared and seconds > SHARED_SECONDS
                record = native.record(compiled, last.place, blocks, divided, arguments)
            if records and (record is None or all_seconds > launch.SLICE):
                calls.append((first, self._program(records, row)))
                records, first, all_seconds = [], number, 0.0
            if record is not None:
                records.append(record)
                all_seconds += seconds
            else:
                first = number + 1
                if shared_bytes or not seconds < launch.SLICE:
                    call = functools.partial(
                        kernel._run, compiled, history, last, True, row, block, shared_bytes, values
                    )
                elif shared and seconds > launch.INLINE_SECONDS:
                    work = functools.partial(compiled.run, 0, 0, *arguments)
                    call = functools.partial(launch._run_shared, work, blocks, row)
                else:
                    call = functools.partial(compiled.run, 0, blocks, *arguments)
                calls.append((number, functools.partial(self._called, last.place, call, row)))
            if last.shapes:  # on memory whose ends nobody watches
                crash.suspect(last.place)
            canaries |= {id(pair[0]): pair for pair in pairs}
        if records:
            calls.append((first, self._program(records, row)))
        self._calls, self._canaries, self._unsure = calls, list(canaries.values()), unsure
        self._row = row
        return row

    @staticmethod
    def _program(records, row):
        return functools.partial(launch.run_program, native.Program(records, row, launch.workers()))

    @staticmethod
    def _called(place, call, row):
        """A launch by way of Python; gives 1 if it failed, as a `native.Program` of one would."""
        row.running[launch._NOTE] = place
        call()
        return int(row.running[launch._ERR] != 0)

    def _run(self, row):
        running, number = row.running, 0
        try:
            for number, call in self._calls:
                failed = call()
                if failed:
                    number += failed - 1
                    self._raise(number, row)
            running[launch._NOTE] = 0
        except BaseException as error:
            running[launch._NOTE] = 0
            kernel, compiled, history, last, block, shared_bytes, values, _ = self._steps[number]
            self._row = None
            kernel._broken_off(error, row, values)
            kernel._failed(compiled, history, last, row, block, shared_bytes, values, values)

    def _raise(self, number, row):
        """Raise what a launch did that has failed: where the row does not know, by running it once more."""
        _, compiled, _, last, _, _, values, _ = self._steps[number]
        if row.err[0] in (0, crash.STOPPED):
            row.err[0] = 0
            compiled.run(0, math.prod(last.grid), *last.grid, launch._NOTHING, row.err, *values)
        raise IndexError

    def _damaged(self):
        """Something was written next to an array: launch everything again, where each launch is looked at."""
        steps, self._steps, self._row = self._steps, None, None
        kernels = [step[0] for step in steps if any(read() != whole for read, whole in step[-1])]
        guard.damaged([value for step in steps for value in step[-2]])
        self._launches()
        names = ", ".join(dict.fromkeys(kernel.__name__ for kernel in kernels))
        code = kernels[0].py_func.__code__
        raise OutOfBoundsError(
            f"one of the kernels {names} wrote outside its arrays", code.co_filename, crash.line_of(kernels[0].py_func),
            "run it again with the environment variable MINI_CHECK=1, which names the line, the index and the thread",
        )  # fmt: skip
