"""Threads that run a launch together: every block once, whoever takes it; and nobody is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numba import cuda, float32, int32

from common.cpu import launch
from common.cpu import team as team_module
from common.cpu.team import Team

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(launch.workers() == 1, reason="one core: there is nobody to share with")


@cuda.jit
def count_blocks(counts, sums, turns):
    block = cuda.blockIdx.x
    total = float32(1)
    for i in range(turns):
        total = total * float32(0.5) + float32(i % 3)
    if cuda.threadIdx.x == 0:
        counts[block] += int32(1)
        sums[block] = total


@pytest.mark.parametrize("blocks", [2, 3, 7, 64, 1001])
def test_every_block_runs_once(monkeypatch, blocks):
    """In launches that threads share, found out by their times, and with pauses in which the helpers fall asleep."""
    shared = []
    original = launch._run_shared
    monkeypatch.setattr(launch, "_run_shared", lambda *arguments: shared.append(1) or original(*arguments))
    counts, sums = cuda.to_device(np.zeros(blocks, np.int32)), cuda.to_device(np.zeros(blocks, np.float32))
    turns = 4_000_000 // blocks // 10
    for number in range(60):
        count_blocks[blocks, 32](counts, sums, turns)
        if number % 20 == 19:
            time.sleep(0.01)
    assert (counts.copy_to_host() == 60).all() and len(set(sums.copy_to_host().tolist())) == 1
    assert len(shared) > 20


def test_a_small_and_a_large_launch_of_one_kernel_are_estimated_apart(monkeypatch):
    shared = []
    original = launch._run_shared
    monkeypatch.setattr(launch, "_run_shared", lambda *arguments: shared.append(1) or original(*arguments))
    counts, sums = cuda.to_device(np.zeros(64, np.int32)), cuda.to_device(np.zeros(64, np.float32))
    small, large = (lambda turns=turns: count_blocks[64, 32](counts, sums, turns) for turns in (1, 20_000))
    for _ in range(12):  # the least time of each counts
        small()
        large()
    shared.clear()
    small()
    assert not shared
    large()
    assert shared


@pytest.fixture(scope="module", params=["looks", "sleeps"])
def team(request):
    """Three helpers, who look for work for a while before they sleep, or, as on other processors, sleep at once."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sleeps":
            patch.setattr(team_module.native, "loops", lambda: None)
        team = Team(3)
    yield team
    team._end()


def test_each_comes_at_most_once_and_none_is_waited_for_who_did_not_come(team):
    for number in range(500):
        came = []
        team.run(lambda came=came: came.append(threading.get_ident()))
        assert threading.get_ident() in came and len(set(came)) == len(came) <= 4
        if number % 100 == 0:
            time.sleep(0.003)  # they sleep


def test_all_come_to_work_that_takes_a_while(team):
    came, all_of_them = set(), threading.Barrier(4, timeout=60)

    def work():
        came.add(threading.current_thread().name)
        all_of_them.wait()

    team.run(work)
    assert len(came) == 4


def test_an_error_of_a_helper_is_raised(team):
    came = threading.Event()

    def work():
        if threading.current_thread() is not threading.main_thread():
            came.set()
            raise ValueError("of a helper")
        assert came.wait(60)

    with pytest.raises(ValueError, match="of a helper"):
        team.run(work)
    team.run(lambda: None)


def test_an_error_here_stops_the_others_and_waits_for_them(team):
    stopped, left, all_of_them = threading.Event(), [], threading.Barrier(4, timeout=60)

    def work():
        all_of_them.wait()
        if threading.current_thread() is threading.main_thread():
            raise KeyError("here")
        assert stopped.wait(60)
        time.sleep(0.02)
        left.append(1)

    with pytest.raises(KeyError, match="here"):
        team.run(work, stop=stopped.set)
    assert len(left) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_signal_handler_launches_in_the_middle_of_a_shared_launch():
    counts, sums = cuda.to_device(np.zeros(64, np.int32)), cuda.to_device(np.zeros(64, np.float32))
    inner = cuda.to_device(np.zeros(64, np.int32)), cuda.to_device(np.zeros(64, np.float32))
    calls = []

    def handler(number, frame):
        calls.append(1)
        count_blocks[64, 32](*inner, 20_000)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        for _ in range(200):
            count_blocks[64, 32](counts, sums, 20_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls and (counts.copy_to_host() == 200).all() and (inner[0].copy_to_host() == len(calls)).all()


def test_a_program_ends_with_helpers_asleep_or_awake():
    """And a child that was forked has helpers of its own."""
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "cpu")!r}]
import os
import common
from test_team import *
counts, sums = cuda.to_device(np.zeros(64, np.int32)), cuda.to_device(np.zeros(64, np.float32))
def some():
    for _ in range(20):
        count_blocks[64, 32](counts, sums, 20_000)
some()
if os.fork() == 0:
    some()
    print("child", counts.copy_to_host().min(), flush=True)
    os._exit(0)
os.wait()
some()
print("parent", counts.copy_to_host().min())
"""
    environ = {**os.environ, "MINI_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["child", "40", "parent", "40"]), done.stderr
