"""Taking the time of a launch: one right way, three wrong ones, and one that answers another question.

==============================  ===================================================  =================================
function                        what it times                                        the figure is
==============================  ===================================================  =================================
``time_wrong_no_sync``          how long Python takes to *ask* for the work          too small, the same for any size
``time_wrong_with_compile``     the first launch: the compiler and the kernel        too large, by thousands of times
``time_wrong_same_array``       one small set of arrays again and again, which the   too small for a kernel whose real
                                cache keeps                                          data come from memory
``time_with_copies``            the kernel and bringing its arrays to the device     right, if that was the question
                                and back
``time_right``                  the kernel: events, warm-up, changing inputs, the    what the kernel needs
                                median of several batches
==============================  ===================================================  =================================

All take ``launch(arrays)``, a function that launches a kernel on one set of arrays, and give milliseconds a launch.

A GPU works through a queue: a launch returns when it has been queued, which takes Python some 20 µs. An *event* is a
mark in the queue to which the device notes the time when it comes past. Two events around a batch of launches therefore
time the device, as long as the queue is not empty in between; :func:`hold` sees to that. On the CPU backend a
launch returns when its work is done, and an event notes the time of the computer's clock.
"""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
from numba import cuda

from chapters import BACKEND
from chapters.ch05_measuring.kernels import busy_kernel, busy_launch

COLD_BYTES = 256 << 20  # more than most caches hold
MAX_SETS = 64
MAX_BATCH = 300  # launches: a GPU's queue takes about a thousand before launching has to wait
CALIBRATION = 200_000  # rounds of busy_kernel that tell how long one takes

_holding = []  # the array that busy_kernel writes, and how many of its rounds take a millisecond: measured once


@dataclass(frozen=True)
class Timing:
    """Milliseconds a launch: the median of all batches, the fastest, the slowest; and how many launches a batch has."""

    median: float
    fastest: float
    slowest: float
    launches: int


def time_wrong_no_sync(launch, arrays, launches=20):
    """Wrong: the host's clock around launches that nobody waits for. Milliseconds a launch (float).

    The clock stops when the last launch has been *queued*. A kernel of a second and one of a microsecond take the
    same. On the CPU backend the figure is right, by luck: there the work is done when a launch returns.
    """
    launch(arrays)  # compiled: this mistake is another one
    cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        launch(arrays)
    seconds = time.perf_counter() - start  # here a cuda.synchronize() is missing, one line earlier
    cuda.synchronize()
    return 1e3 * seconds / launches


def time_wrong_with_compile(launch, arrays):
    """Wrong: the first launch of a kernel, which compiles it. Milliseconds (float).

    A kernel is compiled when it meets types of arguments that it has not met, so a warm-up with other types (float64
    for float32, an int for a float) is none. Give it a :func:`fresh_kernel`, or the compiler has been here before.
    """
    cuda.synchronize()
    start = time.perf_counter()
    launch(arrays)
    cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def fresh_kernel(kernel):
    """A kernel with the same source that has not been compiled yet in this process.

    The CPU backend keeps compiled kernels on the disk as well: there "compiled" may mean "found and loaded".
    """
    return cuda.jit(kernel.py_func)


def time_wrong_same_array(launch, arrays):
    """Wrong for arrays smaller than the cache: every launch finds its data there, as no launch of a program would.

    Everything else as :func:`time_right`, whose result type it has. The bandwidth computed from it can be several
    times what the memory can do, which is how to notice.
    """
    return time_right(launch, [arrays])


def time_with_copies(launch, host_arrays, launches=5):
    """The kernel on NumPy arrays: each launch copies them to the device and back. Milliseconds a launch (float).

    Not wrong if your program does just that. But it is mostly the time of a bus, and it says little about a kernel.
    """
    launch(host_arrays)
    cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        launch(host_arrays)
    cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / launches


def time_right(launch, sets, rounds=7, batch_ms=5.0):
    """Right: the time of a launch on the device, as a :class:`Timing`.

    launch(arrays): launches on one set. sets: a list of sets of arrays, see :func:`input_sets`; launches take turns,
    so that each finds its data in memory, not in the cache. rounds: how many batches. batch_ms: how long one lasts,
    about.
    Raises ValueError if there is no set or no round.
    """
    if not sets or rounds < 1:
        raise ValueError(f"{len(sets)} sets of arrays, {rounds} rounds: timing needs at least 1 of each")
    for arrays in sets:
        launch(arrays)  # warm-up: compiles, and touches all memory once
    start, end = cuda.event(), cuda.event()

    def batch(launches, hold_ms):
        hold(hold_ms)  # while the device waits here, the queue fills
        start.record()
        begun = time.perf_counter()
        for i in range(launches):
            launch(sets[i % len(sets)])
        queued_ms = 1e3 * (time.perf_counter() - begun)
        end.record()
        end.synchronize()  # before asking: the event may not have happened yet
        return cuda.event_elapsed_time(start, end) / launches, queued_ms / launches

    once, queue_ms = batch(len(sets), 0)  # how long a launch takes, and how long queueing it
    turns = max(1, round(batch_ms / max(once, 1e-4) / len(sets)))
    launches = min(turns, max(1, MAX_BATCH // len(sets))) * len(sets)
    times = [batch(launches, 1.5 * queue_ms * launches)[0] for _ in range(rounds)]
    return Timing(statistics.median(times), min(times), max(times), launches)


def input_sets(make, n_bytes, at_least=COLD_BYTES):
    """``[make(0), make(1), …]``: as many sets of ``n_bytes`` each as make ``at_least`` bytes; 1 to 64.

    Raises ValueError if ``n_bytes`` is not positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"n_bytes = {n_bytes}: a set of arrays has at least 1 byte")
    return [make(i) for i in range(min(max(1, math.ceil(at_least / n_bytes)), MAX_SETS))]


def hold(ms):
    """Queue a kernel that keeps the device waiting for about ``ms`` milliseconds (at most 1000), and return at once.

    What is launched meanwhile queues up behind it and then runs without the gaps that a slow host leaves. On the CPU
    backend there is no queue and nothing happens.
    """
    if BACKEND != "gpu" or ms <= 0:
        return
    if not _holding:
        out = cuda.device_array(1, np.uint32)  # kept: freeing memory makes everybody wait for the device
        busy_kernel[busy_launch()](out, CALIBRATION)
        start, end = cuda.event(), cuda.event()
        start.record()
        busy_kernel[busy_launch()](out, CALIBRATION)
        end.record()
        end.synchronize()
        _holding.extend((out, CALIBRATION / cuda.event_elapsed_time(start, end)))
    out, rounds_per_ms = _holding
    busy_kernel[busy_launch()](out, int(min(ms, 1000) * rounds_per_ms))
