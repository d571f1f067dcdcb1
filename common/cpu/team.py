"""The threads that run a launch's blocks together, and how they are called to one in a microsecond.

A step of a small model is hundreds of launches of some 100 µs. To wake a sleeping thread takes about as long, so a
helper that has run out of work looks at one word of memory for a while before it sleeps, as OpenMP's and BLAS
libraries' threads do. It looks in machine code (`native`), so that Python's lock is free meanwhile.
"""

import atexit
import threading
import time

import numpy as np

from . import crash, native
from .native import CALLED, CLOSED, JOB, LINE, SLOTS

STACK = 16 << 20  # bytes of a helper's stack: arrays of a block live there
PATIENCE = 300e-6  # seconds that a helper waits for the next launch before it sleeps


class Job:
    """A piece of work that every helper may join, once, until it is closed.

    work: called by each. row: the first word of the launch's `crash.Row`, or 0. number: of the job.
    """

    __slots__ = ("work", "row", "number", "errors")

    def __init__(self, work, row, number):
        self.work, self.row, self.number, self.errors = work, row, number, []


class Team:
    """``size`` helpers, who sleep until there is a `Job`. One job at a time: who has one holds `lock`.

    They meet at words, see `native`, which are compared under Python's lock or by machine code. Who writes a word that
    another thread waits for does so without Python's lock, where it can: else the other would wake up to wait for that.
    """

    def __init__(self, size):
        self.size, self.lock, self.job, self.ended = size, threading.Lock(), None, False
        self._fence = threading.Lock()
        words = np.zeros(SLOTS + 2 * size * LINE, np.int64)
        self._words, self.address = memoryview(words), words.ctypes.data
        self.called = self.address + 8 * CALLED
        self._came = range(SLOTS, len(words), 2 * LINE)
        _, self._attend, self._wait = native.loops() or (None, self._attend_in_python, None)
        self._turns = self._measured() if self._wait else 0
        self._beds = [threading.Lock() for _ in range(size)]  # a helper that sleeps waits for its own
        self._asleep = [[] for _ in range(size)]  # has an element while it does
        previous = threading.stack_size(STACK)
        try:
            for number, bed in enumerate(self._beds):
                bed.acquire()
                threading.Thread(target=self._help, args=(number,), name=f"blocks_{number}", daemon=True).start()
        finally:
            threading.stack_size(previous)
        atexit.register(self._end)

    def run(self, work, row=0, stop=lambda: None, begin=None):
        """Call ``work()`` in this thread and in every helper that comes before this one is done with it.

        An exception of any of them is raised. ``stop()`` is called when there is one in this thread: it makes the
        others end, and they are waited for. begin(number): called first if given; then ``work`` calls the helpers, by
        writing the number to the address `called`. The caller holds ``lock``.
        """
        words = self._words
        self.job = job = Job(work, row, words[CALLED] + 1)
        try:
            words[JOB] = 0
            if begin is None or self._wait is None:
                words[CALLED] = job.number
            if begin is not None:
                begin(job.number)
            self.wake()
            work()
            self._close(job)
        except BaseException:
            stop()
            self._close(job)
            raise
        if job.errors:
            raise job.errors[0]

    def wake(self):
        """Wake the helpers that sleep."""
        for number, asleep in enumerate(self._asleep):
            if asleep:
                self._wake(number)

    def _close(self, job):
        """Let no helper in any more, and wait for those who are."""
        words, number, wait = self._words, job.number, self._wait
        words[CLOSED] = number
        words[CALLED] = number
        with self._fence:  # a processor may read before what it has written is seen: a helper would come in unnoticed
            pass
        for came in self._came:
            left = came + LINE
            while words[came] == number != words[left]:
                if wait:
                    wait(self.address + 8 * left, words[left], self._turns)
                else:
                    time.sleep(0)

    def _wake(self, number):
        try:
            self._asleep[number].pop()
        except IndexError:
            return  # it got up by itself
        self._beds[number].release()

    def _help(self, number):
        helper, attend, turns, seen = crash.helper(), self._attend, self._turns, 0
        came, helping = self.address + 8 * self._came[number], crash.helping_at(helper)
        while True:
            now = attend(self.address, came, helping, seen, turns)
            if self.ended:
                return
            if now < 0:
                seen = self._words[self._came[number] + LINE]  # it may have helped with programs
                self._sleep(number, seen)
                continue
            job, seen = self.job, now
            crash.helping(helper, job.row)
            try:
                job.work()
            except BaseException as error:
                job.errors.append(error)

    def _attend_in_python(self, address, came, helping, seen, turns):
        """`native._attend` where there is no machine code for it, and no program."""
        words, place = self._words, (came - address) // 8
        words[place + LINE] = seen
        job = words[CALLED]
        if job == seen:
            return -1
        words[place] = job
        if words[CLOSED] < job:
            return job
        words[place + LINE] = job
        return -1

    def _sleep(self, number, seen):
        self._asleep[number].append(True)
        if self._words[CALLED] != seen or self.ended:  # it was called before it lay down
            try:
                self._asleep[number].pop()
                return
            except IndexError:
                pass  # `_wake` has seen it lie
        self._beds[number].acquire()

    def _measured(self):
        """Turns of `_wait` that take `PATIENCE`."""
        self._wait(self.called, 0, 100)  # the first call loads it
        start = time.perf_counter()
        self._wait(self.called, 0, 1000)
        return max(1, int(1000 * PATIENCE / max(time.perf_counter() - start, 1e-6)))

    def _end(self):
        """Python is ending: the helpers end before it does."""
        self.ended = True
        if self.lock.acquire(timeout=1):  # else a daemon's launch, which does not end: they end with the process
            self._words[JOB] = 0
            self._words[CALLED] += 1
            self.wake()
