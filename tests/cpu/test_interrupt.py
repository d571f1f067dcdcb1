"""Ctrl-C stops a launch between blocks, and what comes after it works; MINI_THREADS is checked by name."""

import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from numba import cuda

from common import BackendError
from common.cpu import crash, launch, sanitizer
from common.sanitize import sanitize

SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "cpu")!r}]
import common
import signal
import threading
import time
import numpy as np
from numba import cuda
import guard_kernels as k
from common.cpu import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored where the tests were started
grid, block, rounds, before, on_device = (int(v) for v in sys.argv[1:])
out = np.zeros(grid * block)
out = cuda.to_device(out) if on_device else out
for _ in range(before):
    k.slow[grid, block](out, 10)
k.slow[1, 1](out, 10)
history = [(h.tried, h.known) for h in k.slow._history.values()]
start = time.perf_counter()
try:
    print("go", flush=True)
    k.slow[grid, block](out, rounds)
    print("finished")
except KeyboardInterrupt:
    stopped = time.perf_counter()
    busy = time.process_time()
    time.sleep(0.3)
    print("stopped", time.process_time() - busy < 0.1, [t for t in threading.enumerate() if not t.daemon] != [])
    if before:
        assert history == [(h.tried, h.known) for h in k.slow._history.values()]  # half a launch says nothing
for _ in range(3):
    k.slow[grid, block](out, 10)
    result = np.asarray(out)
    print(result.min(), result.max())
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "grid, block, rounds, before, on_device",
    [
        (400, 64, 4_000_000, 0, 0),  # the first launch, a NumPy array
        (400, 64, 4_000_000, 1, 1),
        (400, 64, 4_000_000, 9, 1),  # launches like it were short: it is not one of them
        (1000, 32, 10_000_000, 5, 0),
        (200_000, 32, 100_000, 5, 1),  # many short blocks
        (60, 256, 4_000_000, 9, 1),  # few long ones
    ],
)
def test_ctrl_c_stops_a_launch_within_a_second(threads, grid, block, rounds, before, on_device):
    env = {key: v for key, v in os.environ.items() if key != "MINI_CHECK"}
    env |= {"MINI_BACKEND": "cpu", "MINI_THREADS": str(threads)}
    arguments = [str(v) for v in (grid, block, rounds, before, on_device)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "go\n"
            time.sleep(1.0)
            child.send_signal(signal.SIGINT)
            sent = time.monotonic()
            line = child.stdout.readline()
            waited = time.monotonic() - sent - 0.3  # the child looks whether its threads have stopped
            tail = child.stdout.read()
        finally:
            child.kill()
    assert line == "stopped True True\n" and waited < 1 and tail == "16.00390625 16.00390625\n" * 3


def test_other_signals_do_not_disturb_a_launch():
    """A handler that launches kernels itself, and returns: all blocks run, once."""
    import guard_kernels as k
    import numpy as np
    from numba import cuda

    small, hits = cuda.to_device(np.ones(10, np.float32)), []
    k.guarded[1, 32](small, 1.0)
    a = np.zeros(64 * 300)

    def handler(*_):
        k.guarded[1, 32](small, 2.0)
        hits.append(1)

    k.slow[300, 64](a, 10)
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        for rounds in (200_000, 200_001):
            k.slow[300, 64](a, rounds)
            assert (a == a[0]).all() and abs(a[0] - 2 * (rounds - 2)) < 1e-6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert hits and (small.copy_to_host() == 2.0 ** len(hits)).all()


# --- MINI_THREADS -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["x", "0", "-1", str(10**20), "1025", "1.5", "2 3", "1e2", "٣", "0x2", "nan", "9" * 5000]
)
def test_a_wrong_number_of_threads_is_named(value, monkeypatch):
    monkeypatch.setenv("MINI_THREADS", value)
    with pytest.raises(BackendError) as error:
        launch.workers.__wrapped__()
    text = str(error.value)
    assert text.startswith(f"MINI_THREADS={value[:40]!r} is not a whole number in 1 … 1024") and "\n" not in text
    assert "unset it" in text and len(text) < 300


@pytest.mark.parametrize("value, threads", [("1", 1), ("7", 7), (" 3 ", 3), ("1024", 1024), ("016", 16)])
def test_a_right_number_of_threads_is_taken(value, threads, monkeypatch):
    monkeypatch.setenv("MINI_THREADS", value)
    assert launch.workers.__wrapped__() == threads


@pytest.mark.parametrize("value", ["", " "])
def test_no_number_of_threads_is_all_cores(value, monkeypatch):
    monkeypatch.setenv("MINI_THREADS", value)
    assert launch.workers.__wrapped__() == launch.machine.cpu_count()


@pytest.mark.parametrize("value", ["x", "0", "-1", str(10**20)])
def test_the_program_says_it_in_one_line(value):
    env = {**os.environ, "MINI_BACKEND": "cpu", "MINI_THREADS": value}
    command = [sys.executable, str(ROOT / "ch14_mini_llm" / "run.py"), "--tokens=1", "--max_new=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"MINI_THREADS='{value}'" in line and "1 … 1024" in line


@cuda.jit
def turn_round(x, y, n):
    """y[i] = x[n - 1 - i]"""
    i = cuda.grid(1)
    if i < n:
        y[i] = x[n - 1 - i]


def test_the_sanitizer_forgets_a_launch_that_was_interrupted(monkeypatch):
    """What one launch has touched is no race with what the next one does, also if the first has not ended."""
    n = 256
    x, y = cuda.device_array(n, np.float32), cuda.to_device(np.ones(n, np.float32))
    run, calls = sanitizer._Look.run, []

    def interrupted(look, first, last):
        run(look, first, last)
        calls.append(look)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sanitizer._Look, "run", interrupted)
    with sanitize() as report:
        with pytest.raises(KeyboardInterrupt):
            turn_round[n // 32, 32](y, x, n)
        turn_round[n // 32, 32](x, y, n)
        turn_round[n // 32, 32](y, x, n)
    assert report.clean and len(calls) == 3, report


def test_a_row_that_was_interrupted_as_it_was_made_goes_back(monkeypatch, recwarn):
    def interrupted():
        raise KeyboardInterrupt

    free = len(crash._free_rows)
    with monkeypatch.context() as patch:
        patch.setattr(crash, "alternate_stack", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            crash.Row()
    del caught
    gc.collect()
    assert len(crash._free_rows) == free and not [w for w in recwarn if "__del__" in str(w.message)]
