"""Launches that are kept and run again: the same results, and the same words when something goes wrong."""

import math
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from numba import cuda, float32

from common.cpu import launch
from common.cpu import replay as replay_module
from common.cpu.errors import OutOfBoundsError
from common.cpu.replay import Replay
from common.sanitize import sanitize
from common.trace import trace


@cuda.jit
def scale(x, y, factor, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] * factor + y[i]


@cuda.jit
def follow(places, x, y, n):
    """y[places[i]] = x[i]: where it writes is in its data."""
    i = cuda.grid(1)
    if i < n:
        y[places[i]] = x[i]


@cuda.jit
def through_shared(x, y, n):
    tile = cuda.shared.array(0, float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    cuda.syncthreads()
    y[i] += tile[n - 1 - i]


@cuda.jit
def take_long(x, turns):
    total = float32(1)
    for i in range(turns):
        total = total * float32(0.5) + float32(i % 3)
    x[cuda.blockIdx.x] = total


def numbers(n, dtype=np.float32):
    return cuda.to_device(np.arange(n, dtype=dtype))


def kept(launches):
    """A `Replay` that has been run once, and keeps what it did."""
    replay = Replay(launches)
    replay.run()
    assert replay._steps is not None
    return replay


@pytest.mark.parametrize("n", [1, 1000, 300_000])
def test_it_does_the_same_again(n):
    x, y, expected = numbers(n), numbers(n), np.arange(n, dtype=np.float32)
    launched = []

    def launches():
        launched.append(1)
        scale[-(-n // 256), 256](x, y, 2, n)
        scale[-(-n // 256), 256](y, x, 0, n)
        scale[-(-n // 128), 128](x, y, -1, n)

    replay = kept(launches)
    for _ in range(9):
        replay.run()
    for _ in range(10):
        expected = expected * 2  # y = 2 x + y, and x stays; then y = y - x
        x_now = np.arange(n, dtype=np.float32)
        expected = expected / 2 + 2 * x_now - x_now
    np.testing.assert_array_equal(y.copy_to_host(), expected)
    assert len(launched) == 1


def test_dynamic_shared_memory_numpy_arrays_and_other_threads():
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    replay = Replay(lambda: (through_shared[1, 64, 0, 256](x, y, 64), scale[1, 64](x, y, 1, 64)))
    for _ in range(3):  # the first run of a NumPy array is on a copy
        replay.run()
    assert replay._steps is not None
    thread = threading.Thread(target=replay.run)
    thread.start()
    thread.join()
    replay.run()
    np.testing.assert_array_equal(y, 5 * 63)


def test_what_it_reads_may_change_and_where_it_writes_is_watched():
    x, y, places = numbers(100), numbers(100), numbers(100, np.int64)
    replay = kept(lambda: (scale[1, 128](x, y, 0, 100), follow[1, 128](places, x, y, 100)))
    replay.run()
    moved = np.arange(100)[::-1].copy()
    places.copy_to_device(moved)
    replay.run()
    np.testing.assert_array_equal(y.copy_to_host(), moved)
    for outside in (100, 101, -200_000, 200_000):  # next to the array, and far away
        moved[7] = outside
        places.copy_to_device(moved)
        with pytest.raises(OutOfBoundsError, match="follow"):
            replay.run()
    moved[7] = 3
    places.copy_to_device(moved)
    replay.run()
    assert y.copy_to_host()[3] in (7, 96)


def test_ctrl_c_ends_a_replay():
    x = numbers(64)
    replay = kept(lambda: [take_long[64, 1](x, 3_000_000) for _ in range(40)])
    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            replay.run()
    assert time.perf_counter() - start < 5
    before = x.copy_to_host()
    replay.run()
    np.testing.assert_array_equal(x.copy_to_host(), before)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_ctrl_c_while_it_is_made_ready_leaves_no_launch_out(monkeypatch, when):
    """Calls are made of the launches at the first replay; if that is interrupted, the next begins anew."""
    x, y = numbers(40), numbers(40)
    replay = kept(lambda: [scale[1, 64](x, y, factor, 40) for factor in (1, 2, 3)])
    calls = []

    def interrupted(seconds):  # is asked of each launch
        calls.append(seconds)
        if len(calls) == when:
            raise KeyboardInterrupt
        return math.isinf(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(replay_module, "math", SimpleNamespace(isinf=interrupted, prod=math.prod))
        with pytest.raises(KeyboardInterrupt):
            replay.run()
    before = y.copy_to_host()
    replay.run()
    np.testing.assert_array_equal(y.copy_to_host(), before + 6 * np.arange(40, dtype=np.float32))


def test_the_sanitizer_a_trace_and_checks_see_the_launches(monkeypatch):
    x, y, places = numbers(100), numbers(100), numbers(100, np.int64)
    replay = kept(lambda: (scale[1, 128](x, y, 1, 100), follow[1, 128](places, x, y, 100)))
    with trace() as seen:
        replay.run()
    assert [one.name for one in seen] == ["scale", "follow"]
    places.copy_to_device(np.zeros(100, np.int64))
    with sanitize() as report:
        replay.run()
    assert report.findings
    monkeypatch.setenv("MINI_CHECK", "1")
    places.copy_to_device(np.full(100, 100))
    with pytest.raises(OutOfBoundsError, match="index 100 on axis 0"):
        replay.run()


def test_a_signal_handler_may_replay():
    x, y, n = numbers(300_000), numbers(300_000), 300_000
    outer = kept(lambda: [scale[1172, 256](x, y, 0, n) for _ in range(20)])
    z = numbers(1000)
    inner = kept(lambda: scale[4, 256](z, z, 0, 1000))
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: (calls.append(1), inner.run()))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(30):
            outer.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls
    np.testing.assert_array_equal(y.copy_to_host(), np.arange(n, dtype=np.float32))
    np.testing.assert_array_equal(z.copy_to_host(), np.arange(1000, dtype=np.float32))


def test_a_recording_within_a_recording_is_part_of_it():
    x, y = numbers(100), cuda.to_device(np.zeros(100, np.float32))
    inner = Replay(lambda: scale[1, 128](x, y, 1, 100))
    outer = kept(lambda: inner.run())
    assert len(outer._steps) == 1
    outer.run()
    np.testing.assert_array_equal(y.copy_to_host(), 2 * np.arange(100))
    assert "steps" not in launch._mine.__dict__
