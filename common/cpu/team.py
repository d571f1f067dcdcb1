"""The threads that run a launch's blocks together, and how they are called to one in a microsecond.

A step of a small model is hundreds of launches of some 100 µs. To wake a sleeping thread takes about as long, so a
helper that has run out of work looks at one word of memory for a while before it sleeps, as OpenMP's and BLAS
libraries' threads do. `_wait` is that look: machine code, so that Python's lock is free meanwhile.
"""

import atexit
import ctypes
import platform
import threading
import time

import llvmlite.binding as llvm
import numpy as np

from . import crash

STACK = 16 << 20  # bytes of a helper's stack: arrays of a block live there
PATIENCE = 300e-6  # seconds that a helper waits for the next launch before it sleeps
LINE = 16  # int64 words between two that different threads write: two cache lines
TURN = {"x86_64": "call void @llvm.x86.sse2.pause()", "amd64": "call void @llvm.x86.sse2.pause()"}
WAIT = """
declare void @llvm.x86.sse2.pause()

define i64 @wait(i64 %address, i64 %old, i64 %turns, i64 %left, i64 %number) {{
start:
    %word = inttoptr i64 %address to ptr
    %says = icmp ne i64 %left, 0
    br i1 %says, label %say, label %look
say:
    %place = inttoptr i64 %left to ptr
    store atomic i64 %number, ptr %place release, align 8
    br label %look
look:
    %turn = phi i64 [ 0, %start ], [ 0, %say ], [ %next, %again ]
    %now = load atomic i64, ptr %word acquire, align 8
    %same = icmp eq i64 %now, %old
    br i1 %same, label %again, label %end
again:
    {pause}
    %next = add i64 %turn, 1
    %late = icmp sge i64 %next, %turns
    br i1 %late, label %end, label %look
end:
    ret i64 %now
}}
"""
_kept = []  # what machine code lives in


def _compiled():
    """``wait(address, old, turns, left, number)``: write ``number`` to ``left``, if that is not 0; then look at a word
    until it is not ``old``, so many turns at most, and return it. None where there is no such code."""
    machine = platform.machine().lower()
    if machine not in TURN:
        return None
    try:
        target = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(WAIT.format(pause=TURN[machine])), target)
        engine.finalize_object()
        _kept.append(engine)
        return ctypes.CFUNCTYPE(*[ctypes.c_int64] * 6)(engine.get_function_address("wait"))
    except Exception:
        return None


class Job:
    """A piece of work that every helper may join, once, until it is closed.

    work: called by each. row: the first word of the launch's `crash.Row`, or 0. number: of the job.
    """

    __slots__ = ("work", "row", "number", "closed", "errors")

    def __init__(self, work, row, number):
        self.work, self.row, self.number, self.closed, self.errors = work, row, number, False, []


class Team:
    """``size`` helpers, who sleep until there is a `Job`. One job at a time: who has one holds `lock`.

    Words, which are compared under Python's lock: the number of the latest job, at address `called`; then for each
    helper, of the latest job that it came to, and of the latest that it left. Who writes a word that another thread
    waits for does so without Python's lock, where it can: else the other would wake up to wait for that.
    """

    def __init__(self, size):
        self.size, self.lock, self.job, self.ended = size, threading.Lock(), None, False
        words = np.zeros((2 * size + 1) * LINE, np.int64)
        self._words, self.called = memoryview(words), words.ctypes.data
        self._came = range(LINE, len(words), 2 * LINE)
        self._wait = _compiled()
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
        writing the number to `called`. The caller holds ``lock``.
        """
        self.job = job = Job(work, row, self._words[0] + 1)
        try:
            if begin is None or self._wait is None:
                self._words[0] = job.number
            if begin is not None:
                begin(job.number)
            for number, asleep in enumerate(self._asleep):
                if asleep:
                    self._wake(number)
            work()
            self._close(job)
        except BaseException:
            stop()
            self._close(job)
            raise
        if job.errors:
            raise job.errors[0]

    def _close(self, job):
        """Let no helper in any more, and wait for those who are."""
        job.closed = True
        self._words[0] = job.number
        words, number, wait = self._words, job.number, self._wait
        for came in self._came:
            left = came + LINE
            while words[came] == number != words[left]:
                if wait:
                    wait(self.called + 8 * left, words[left], self._turns, 0, 0)
                else:
                    time.sleep(0)

    def _wake(self, number):
        try:
            self._asleep[number].pop()
        except IndexError:
            return  # it got up by itself
        self._beds[number].release()

    def _help(self, number):
        helper, words, wait, turns = crash.helper(), self._words, self._wait, self._turns
        came = (2 * number + 1) * LINE
        left, seen, row = self.called + 8 * (came + LINE), 0, 0
        while True:
            if wait:
                now = wait(self.called, seen, turns, left, seen)
            else:
                now, words[came + LINE] = words[0], seen
            if self.ended:
                return
            if now == seen:
                self._sleep(number, seen)
                continue
            job = self.job
            seen = words[came] = job.number
            if job.closed:
                continue
            if job.row != row:
                row = job.row
                crash.helping(helper, row)
            try:
                job.work()
            except BaseException as error:
                job.errors.append(error)

    def _sleep(self, number, seen):
        self._asleep[number].append(True)
        if self._words[0] != seen or self.ended:  # it was called before it lay down
            try:
                self._asleep[number].pop()
                return
            except IndexError:
                pass  # `_wake` has seen it lie
        self._beds[number].acquire()

    def _measured(self):
        """Turns of `_wait` that take `PATIENCE`."""
        self._wait(self.called, 0, 100, 0, 0)  # the first call loads it
        start = time.perf_counter()
        self._wait(self.called, 0, 1000, 0, 0)
        return max(1, int(1000 * PATIENCE / max(time.perf_counter() - start, 1e-6)))

    def _end(self):
        """Python is ending: the helpers end before it does."""
        self.ended = True
        self._words[0] += 1
        for number in range(self.size):
            self._wake(number)
