"""Launches kept and run again, without what a launch looks at each time: what `common.graph` is without a GPU.

A launch takes some 10 µs of Python. Behind a kernel that has sent megabytes of weights through the caches, it takes
100: the code and the objects of Python have to come from memory again. So a replay touches as little of both as it can:
for each launch a word that says which kernel runs, and one call.
"""

import functools

from . import crash, fresh, guard, launch
from .arrays import checking
from .errors import OutOfBoundsError
from .streams import IN_ORDER


class Replay:
    """What ``launches()`` launches: run as it is the first time, from then on as it was then.

    Under the sanitizer, in a trace, or with checks they are launched as ever, since those want to see each launch; and
    until all of them run on their own arrays (the first launch with a NumPy array runs on a copy, see `guard`).
    """

    def __init__(self, launches):
        self._launches = launches
        self._steps = None  # see `Dispatcher._launch`
        self._calls, self._canaries, self._row = [], [], None  # what they are made into for a thread: see `_bind`

    def run(self):
        """Run the launches, in order."""
        if self._steps is None or launch._sanitizer is not None or launch._trace is not None or checking():
            self._record()
            return
        fresh.unwatched_launch()
        with IN_ORDER:
            row = launch._mine.__dict__.get("row")
            if row is None or row is not self._row:
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
        """Make a call of each launch, with the error array of this thread's row; returns the row."""
        row = launch._mine.row = launch._mine.__dict__.get("row") or crash.Row()
        self._row, self._calls, canaries, several = row, [], {}, launch.workers() > 1
        for kernel, compiled, history, last, block, shared_bytes, values, pairs in self._steps:
            blocks = last.grid[0] * last.grid[1] * last.grid[2]
            seconds = last.known * blocks
            arguments = *last.grid, launch._NOTHING, row.err, *values
            if shared_bytes or not seconds < launch.SLICE:
                call = functools.partial(kernel._run, compiled, history, last, True, row, block, shared_bytes, values)
            elif blocks > 1 and several and seconds > launch.INLINE_SECONDS:
                work = functools.partial(compiled.run, 0, 0, *arguments)
                call = functools.partial(launch._run_shared, work, blocks, row)
            else:
                call = functools.partial(compiled.run, 0, blocks, *arguments)
            self._calls.append((last.place, call))
            if last.shapes:  # on memory whose ends nobody watches
                crash.suspect(last.place)
            canaries |= {id(pair[0]): pair for pair in pairs}
        self._canaries = list(canaries.values())
        return row

    def _run(self, row):
        running, note, err, number = row.running, launch._NOTE, launch._ERR, -1
        try:
            for place, call in self._calls:
                number += 1
                running[note] = place
                call()
                if running[err]:
                    raise IndexError
            running[note] = 0
        except BaseException as error:
            running[note] = 0
            kernel, compiled, history, last, block, shared_bytes, values, _ = self._steps[number]
            self._row = None
            kernel._broken_off(error, row, values)
            kernel._failed(compiled, history, last, row, block, shared_bytes, values, values)

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
