"""Launches of a replay in machine code: every argument arrives, every block runs once, errors are reported as ever."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda, float32, int32, types

import common
from common.cpu import launch, native, replay
from common.cpu.errors import KernelError, OutOfBoundsError
from common.cpu.replay import Replay

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(common.BACKEND != "cpu", reason="about the CPU backend's launches"),
    pytest.mark.skipif(not native.IS_HERE, reason="records are of x86-64"),
]


@cuda.jit
def add_up(out, a, b, c, d, i8, u8, i16, u16, i32, u32, i64, u64, yes, f0, g0, f1, g1, f2, g2, f3, g3, f4, g4, n):
    """Every argument counts: arrays of three ranks and types, more numbers than there are registers."""
    i = cuda.grid(1)
    if i < n:
        total = a[i] + b[i % 3, i % 5] + c[i % 2, i % 3, i % 4] + d[i]
        total += i8 + u8 + i16 + u16 + i32 + u32 + i64 + u64 % 1000 + (1000 if yes else 0)
        out[i] = total + f0 + 2 * g0 + 3 * f1 + 4 * g1 + 5 * f2 + 6 * g2 + 7 * f3 + 8 * g3 + 9 * f4 + 10 * g4


@cuda.jit
def chain(counts, values, step, turns):
    """One more at this block's place; what it adds depends on all steps before."""
    block = cuda.blockIdx.x
    total = float32(0)
    for i in range(turns):
        total = total * float32(0.5) + float32(i % 3)
    if cuda.threadIdx.x == 0:
        counts[block] += int32(1)
        values[block] = values[block] * 3 + step + (total > 1e9)


@cuda.jit
def scatter(places, out, n):
    i = cuda.grid(1)
    if i < n:
        out[places[i]] = float32(1)


@cuda.jit
def stride_by(steps, out, n):
    i = cuda.grid(1)
    if i < n:
        count = 0
        for _ in range(0, 6, steps[i]):
            count += 1
        out[i] = count


@cuda.jit
def half_of(x, factor, n):
    i = cuda.grid(1)
    if i < n:
        x[i] = x[i] * factor


def kept(launches):
    replayed = Replay(launches)
    replayed.run()
    assert replayed._steps is not None
    return replayed


def programs(replayed):
    """The `native.Program`s of a replay that has run, once all times are known."""
    replayed.run()
    replayed.run()
    return [call.args[0] for _, call in replayed._calls if call.func is launch.run_program]


def numbers():
    """Scalars of every type: for ``add_up``, from i8 to g4."""
    whole = [np.int8(-7), np.uint8(250), np.int16(-30000), np.uint16(60000), np.int32(-(2**31)), np.uint32(2**32 - 1)]
    whole += [np.int64(-(2**40)), np.uint64(2**64 - 1), True]
    floats = [kind(k + 0.25) for k, kind in enumerate([np.float32, np.float64] * 5)]
    return [*whole, *floats]


def test_every_argument_arrives():
    rng, n = np.random.default_rng(0), 100
    hosts = [rng.integers(-9, 9, 100), rng.standard_normal((3, 5)), rng.standard_normal((2, 3, 4)).astype(np.float32),
             rng.integers(0, 9, 100).astype(np.uint8)]  # fmt: skip
    arrays = [cuda.to_device(host) for host in hosts]
    outs = [cuda.to_device(np.zeros(n)) for _ in range(2)]
    arguments = (*arrays, *numbers(), n)
    replayed = kept(lambda: add_up[1, 128](outs[0], *arguments))
    outs[0].copy_to_device(np.zeros(n))
    assert len(programs(replayed)) == 1
    add_up[1, 128](outs[1], *arguments)
    np.testing.assert_array_equal(outs[0].copy_to_host(), outs[1].copy_to_host())
    assert np.unique(outs[0].copy_to_host()).size > 50


def test_float16_scalars_go_through_python():
    """They are passed in a way of their own; the launch next to them goes on as before."""
    x = cuda.to_device(np.ones(64, np.float32))
    counts, values = cuda.to_device(np.zeros(4, np.int32)), cuda.to_device(np.zeros(4, np.int64))
    factor = np.float16(0.5)
    replayed = kept(lambda: (chain[4, 32](counts, values, 1, 1), half_of[2, 32](x, factor, 64),
                             chain[4, 32](counts, values, 1, 1)))  # fmt: skip
    assert len(programs(replayed)) == 2 and len(replayed._calls) == 3
    assert (x.copy_to_host() == 0.125).all() and (counts.copy_to_host() == 6).all()


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 50, 4000])), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_launches_run_in_order_and_blocks_once(sizes):
    counts, values = cuda.to_device(np.zeros(40, np.int32)), cuda.to_device(np.zeros(40, np.int64))

    def launches():
        for step, (blocks, turns) in enumerate(sizes):
            chain[blocks, 32](counts, values, step, turns)

    replayed, expected = kept(launches), np.zeros(40, np.int64)
    for _ in range(5):
        replayed.run()
    for step, (blocks, _) in list(enumerate(sizes)) * 6:
        expected[:blocks] = expected[:blocks] * 3 + step
    np.testing.assert_array_equal(values.copy_to_host(), expected)
    wanted = [6 * sum(block < blocks for blocks, _ in sizes) for block in range(40)]
    assert counts.copy_to_host().tolist() == wanted


SCRIPT = """
import sys, threading
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
import common
from numba import cuda
from common.cpu import launch, replay
from test_native import chain, kept, programs

assert launch.workers() == {workers}
replay.SHARED_SECONDS = 0.0  # every launch is shared
def many(seed, wrong):
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(2, 40)), int(rng.integers(1, 300))) for _ in range(60)]
    counts, values = cuda.to_device(np.zeros(40, np.int32)), cuda.to_device(np.zeros(40, np.int64))
    def launches():
        for step, (blocks, turns) in enumerate(sizes):
            chain[blocks, 32](counts, values, step % 2, turns)
    graph = kept(launches)
    assert programs(graph)
    for _ in range({times}):
        graph.run()
    wanted = [({times} + 3) * sum(block < blocks for blocks, _ in sizes) for block in range(40)]
    if counts.copy_to_host().tolist() != wanted:
        wrong.append(seed)

wrong = []
threads = [threading.Thread(target=many, args=(seed, wrong)) for seed in range({threads})]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("wrong", wrong)
"""


@pytest.mark.parametrize("workers, threads, times", [(1, 1, 50), (2, 1, 1500), (3, 2, 200), (8, 1, 60), (5, 4, 30)])
def test_many_threads_on_few_cores(workers, threads, times):
    tests = str(ROOT / "tests" / "cpu")
    script = SCRIPT.format(root=str(ROOT), tests=tests, workers=workers, threads=threads, times=times)
    environ = {**os.environ, "MINI_THREADS": str(workers)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, "wrong []\n"), done.stderr


@pytest.mark.parametrize("outside", [1000, -3000, 10**9])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_launch_that_goes_astray_is_named(outside, threads, monkeypatch):
    """The one that did, among others, whether its blocks are shared or not; and the others before it have run."""
    monkeypatch.setattr(replay, "SHARED_SECONDS", 0.0 if threads == 2 else 1.0)
    n = 1000
    places, out = cuda.to_device(np.arange(n)), cuda.to_device(np.zeros(n, np.float32))
    counts, values = cuda.to_device(np.zeros(8, np.int32)), cuda.to_device(np.zeros(8, np.int64))

    def launches():
        chain[8, 32](counts, values, 1, 10)
        scatter[8, 128](places, out, n)
        chain[8, 32](counts, values, 1, 10)

    replayed = kept(launches)
    assert programs(replayed)
    moved = np.arange(n)
    moved[777] = outside
    places.copy_to_device(moved)
    for _ in range(2):  # the second time in Python, and again in machine code
        with pytest.raises(OutOfBoundsError, match="scatter"):
            replayed.run()
    places.copy_to_device(np.arange(n))
    before = counts.copy_to_host()
    replayed.run()
    np.testing.assert_array_equal(counts.copy_to_host(), before + 2)


def test_an_error_of_numbas_own_is_raised():
    steps, out = cuda.to_device(np.ones(64, np.int64)), cuda.to_device(np.zeros(64, np.int64))
    replayed = kept(lambda: [stride_by[2, 32](steps, out, 64) for _ in range(3)])
    assert programs(replayed)
    steps.copy_to_device(np.arange(64))
    with pytest.raises(KernelError, match=r"stride_by failed: range\(\) arg 3"):
        replayed.run()
    steps.copy_to_device(np.full(64, 2))
    replayed.run()
    assert (out.copy_to_host() == 3).all()


def test_an_interrupt_before_the_machine_code_leaves_nobody_waiting(monkeypatch):
    counts, values = cuda.to_device(np.zeros(8, np.int32)), cuda.to_device(np.zeros(8, np.int64))
    replayed = kept(lambda: [chain[8, 32](counts, values, 1, 100) for _ in range(10)])
    assert programs(replayed)

    def interrupted(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(native, "loops", lambda: (interrupted, None, None))
        with pytest.raises(KeyboardInterrupt):
            replayed.run()
    before = counts.copy_to_host()
    replayed.run()
    np.testing.assert_array_equal(counts.copy_to_host(), before + 10)


def test_where_there_are_no_programs_python_does_it(monkeypatch):
    counts, values = cuda.to_device(np.zeros(8, np.int32)), cuda.to_device(np.zeros(8, np.int64))
    monkeypatch.setattr(native, "IS_HERE", False)
    monkeypatch.setattr(native, "loops", lambda: None)
    monkeypatch.setattr(launch, "_team", None)
    replayed = kept(lambda: [chain[8, 32](counts, values, 1, 50_000) for _ in range(10)])
    monkeypatch.setattr(replayed._steps[0][1], "_native", None)
    for _ in range(20):
        replayed.run()
    assert not programs(replayed) and (counts.copy_to_host() == 10 * 23).all()
    if launch.workers() > 1:
        launch._team._end()


def test_a_launch_meanwhile_in_another_thread_waits_its_turn():
    counts, values = cuda.to_device(np.zeros(8, np.int32)), cuda.to_device(np.zeros(8, np.int64))
    replayed = kept(lambda: [chain[8, 32](counts, values, 1, 1000) for _ in range(10)])
    ended = []

    def launch_them():
        for _ in range(100):
            chain[8, 32](counts, values, 1, 1000)
        ended.append(1)

    thread = threading.Thread(target=launch_them)
    thread.start()
    for _ in range(50):
        replayed.run()
    thread.join()
    assert ended and (counts.copy_to_host() == 10 + 500 + 100).all()


def test_what_numba_takes_otherwise_is_not_written_down():
    from numba.core.registry import cpu_target

    context = cpu_target.target_context
    good = (types.int64, types.Array(types.float32, 2, "C"), types.float64, types.boolean, types.uint8)
    assert native.layout_of(good, context)
    for kind in (types.complex64, types.float16, types.UniTuple(types.int64, 2), types.unicode_type, types.none):
        assert not native.layout_of((*good, kind), context)
    assert all(a < b for a, b in itertools.pairwise(native.LENGTHS))
