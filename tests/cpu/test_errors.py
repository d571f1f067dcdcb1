"""What the CPU backend refuses, at which line, with which words; and the checked mode. None of it hangs."""

import inspect
import math
import re

import numpy as np
import pytest
from numba import cuda, float32, int32, njit

import common
from common.cpu import launch as cpu_launch
from common.cpu.errors import (
    CompileError,
    DivergenceError,
    HangError,
    KernelTypeError,
    LaunchError,
    OutOfBoundsError,
)
from common.cpu.registry import cpu_equivalent

if common.BACKEND != "cpu":
    pytest.skip("these are the CPU backend's own messages", allow_module_level=True)

FULL = 0xFFFFFFFF


def line_of(kernel, mark):
    """Line number of the line that carries the comment ``# <- mark`` in a kernel's source."""
    lines, first = inspect.getsourcelines(kernel.py_func)
    return first + next(i for i, text in enumerate(lines) if f"# <- {mark}" in text)


def check(kernel, error, words, grid, block, *args, mark="here", shared=0):
    with pytest.raises(error, match=words) as caught:
        kernel[grid, block, 0, shared](*args)
    assert caught.value.lineno == line_of(kernel, mark), str(caught.value)
    assert caught.value.filename == __file__
    assert f"{__file__}:{caught.value.lineno}: " in str(caught.value)
    return str(caught.value)


def i32(n):
    return np.zeros(n, np.int32)


@cuda.jit
def barrier_in_divergent_branch(x):
    if cuda.threadIdx.x < 3:  # <- here
        cuda.syncthreads()
    x[cuda.threadIdx.x] = 1


@cuda.jit
def barrier_in_divergent_loop(x):
    for i in range(cuda.threadIdx.x):  # <- here
        cuda.syncthreads()
        x[i] = 1


@cuda.jit
def break_out_of_barrier_loop(x):
    for i in range(4):
        x[cuda.threadIdx.x] = i
        if cuda.threadIdx.x == i:  # <- here
            break
        cuda.syncthreads()


def test_divergent_barriers_are_named():
    text = check(barrier_in_divergent_branch, DivergenceError, "some threads", 1, 8, i32(8))
    assert "if cuda.threadIdx.x < 3:" in text and "To fix it" in text and "block (0, 0, 0)" in text
    check(barrier_in_divergent_loop, DivergenceError, "some threads", 1, 8, i32(8))
    check(break_out_of_barrier_loop, DivergenceError, "some threads", 1, 8, i32(8))


def test_a_divergent_looking_branch_that_does_not_diverge_runs():
    x = i32(8)
    barrier_in_divergent_branch[1, 3](x)
    assert x.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@cuda.jit
def shuffle_without_some_lanes(x):
    i = cuda.threadIdx.x
    if i < 7:
        x[i] = cuda.shfl_xor_sync(FULL, x[i], 1)  # <- here


@cuda.jit
def syncwarp_without_some_lanes(x):
    i = cuda.threadIdx.x
    if i < 7:
        cuda.syncwarp()  # <- here
    x[i] = 1


@cuda.jit
def mask_without_the_caller(x):
    i = cuda.threadIdx.x
    x[i] = cuda.shfl_sync(0xF, x[i], 0)  # <- here


def test_masks_must_name_the_lanes_that_arrive():
    for kernel in (shuffle_without_some_lanes, syncwarp_without_some_lanes, mask_without_the_caller):
        check(kernel, DivergenceError, "mask of cuda", 1, 32, i32(32))


@cuda.jit
def collective_in_and(x):
    i = cuda.threadIdx.x
    if x[i] > 0 and cuda.any_sync(FULL, x[i] > 1):  # <- here
        x[i] = 0


@cuda.jit
def collective_in_conditional_expression(x):
    i = cuda.threadIdx.x
    x[i] = cuda.shfl_sync(FULL, x[i], 0) if i > 3 else 0  # <- here


@cuda.jit(device=True)
def returns_from_loop(x):
    for k in range(3):
        cuda.syncthreads()
        if x[k] > 0:
            return k
    return 3


@cuda.jit
def calls_returns_from_loop(x):
    x[0] = returns_from_loop(x)


@cuda.jit
def shared_of_runtime_size(x):
    tile = cuda.shared.array(cuda.blockDim.x, int32)  # <- here
    tile[0] = x[0]


@cuda.jit
def too_much_shared(x):
    tile = cuda.shared.array((200, 200), float32)
    tile[0, 0] = x[0]


@cuda.jit
def unknown_name(x):
    x[0] = not_defined_anywhere  # <- here # noqa: F821


@cuda.jit
def never_assigned(x, n):
    if n > 10**9:
        value = 1
        x[0] = value
    for _ in range(2):
        x[1] = other  # <- here # noqa: F821
    if n < 0:
        other = 2
        x[2] = other


@cuda.jit
def uses_a_list(x):
    x[0] = [1, 2][0]  # <- here


@cuda.jit
def loops_over_pairs(x):
    for value, other in zip(x, x):  # <- here
        x[0] = value + other


@cuda.jit
def raises(x):
    if x[0] > 0:
        raise ValueError  # <- here


@cuda.jit
def calls_numpy_random(x):
    x[0] = np.random.rand()  # <- here # noqa: NPY002


@cuda.jit
def walrus(x):
    if (y := x[0]) > 0:  # <- here
        x[0] = y


def test_what_cannot_be_compiled_is_refused_at_its_line():
    check(collective_in_and, CompileError, "some threads skip", 1, 32, i32(32))
    check(collective_in_conditional_expression, CompileError, "some threads skip", 1, 32, i32(32))
    check(shared_of_runtime_size, CompileError, "compile-time constant", 1, 32, i32(32))
    check(unknown_name, CompileError, "'not_defined_anywhere' is not defined", 1, 1, i32(3))
    check(loops_over_pairs, CompileError, r"runs over range", 1, 1, i32(3))
    check(raises, CompileError, "cannot raise", 1, 1, i32(3))
    check(walrus, CompileError, "walrus", 1, 1, i32(3))
    check(calls_numpy_random, CompileError, "cannot be called", 1, 1, i32(3))
    check(uses_a_list, CompileError, "not supported", 1, 1, i32(3))
    check(never_assigned, CompileError, "other is read before", 1, 1, i32(3), 5)
    with pytest.raises(CompileError, match="return inside a loop of a device function"):
        calls_returns_from_loop[1, 4](i32(4))
    with pytest.raises(CompileError, match="160000 bytes of shared memory; a block has 49152"):
        too_much_shared[1, 4](np.zeros(4, np.float32))


@cuda.jit
def float_index(x):
    i = cuda.threadIdx.x
    x[i / 2] = 1  # <- here


@cuda.jit
def shuffles_a_bool(x):
    i = cuda.threadIdx.x
    x[i] = cuda.shfl_sync(FULL, x[i] > 0, 1)  # <- here


def test_type_errors_carry_the_students_line():
    check(float_index, KernelTypeError, "float64", 1, 4, i32(4))
    check(shuffles_a_bool, KernelTypeError, "shuffle moves", 1, 32, i32(32))


@cuda.jit
def waits_for_a_later_block(flag):
    if cuda.blockIdx.x == 0:
        while flag[0] == 0:  # <- here
            pass
    else:
        cuda.atomic.add(flag, 0, 1)


def test_waiting_for_a_later_block_is_refused_not_hung(monkeypatch, tmp_path):
    monkeypatch.setattr("common.cpu.emit_lane.SPIN_LIMIT", 1 << 22)
    monkeypatch.setattr(cpu_launch, "workers", lambda: 1)
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path))
    check(waits_for_a_later_block, HangError, "waits for something", 2, 1, i32(1))


@cuda.jit
def never_ends_around_a_barrier(x):
    step = 8
    while step > 0:  # <- here
        x[cuda.threadIdx.x] += step
        cuda.syncthreads()


@cuda.jit
def never_ends_in_a_warp(x):
    value = x[cuda.threadIdx.x]
    while cuda.any_sync(FULL, value >= 0):
        value += cuda.shfl_xor_sync(FULL, value, 1) * 0


def test_loops_without_end_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("common.cpu.emit_lane.GROUP_SPIN_LIMIT", 1 << 12)
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path))
    check(never_ends_around_a_barrier, HangError, "gone round 4096 times", 1, 32, i32(32))
    with pytest.raises(HangError, match="gone round 4096 times"):
        never_ends_in_a_warp[1, 32](i32(32))


@cuda.jit
def no_bounds_guard(x, y):
    i = cuda.grid(1)
    y[i] = x[i] + 1  # <- here


@cuda.jit
def reads_before_the_start(x, y):
    i = cuda.grid(1)
    y[i] = x[i - 1]  # <- here


@cuda.jit
def shared_too_small(y):
    tile = cuda.shared.array((4, 4), int32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    tile[ty, tx] = 1  # <- here
    y[0] = tile[0, 0]


def test_checked_mode_reports_out_of_bounds(monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    text = check(no_bounds_guard, OutOfBoundsError, "index 10 ", 2, 8, i32(10), i32(16))
    assert "block (1, 0, 0), thread (2, 0, 0)" in text and "x: index 10 on axis 0 is outside 0 … 9" in text
    text = check(reads_before_the_start, OutOfBoundsError, "index -1 ", 1, 8, i32(8), i32(8))
    assert "negative" in text and "thread (0, 0, 0)" in text
    text = check(shared_too_small, OutOfBoundsError, "tile: index 4 on axis 1", 1, (5, 4), i32(1))
    assert "thread (4, 0, 0)" in text
    y = i32(8)
    no_bounds_guard[1, 8](i32(8), y)  # and what is right runs as ever
    assert y.tolist() == [1] * 8


def test_launch_configurations_that_no_gpu_takes():
    x = i32(4)
    for launch, words in [
        ((0, 32), "grid is 0"),
        ((1, 0), "block is 0"),
        ((1, 2048), "2048 is not in 1 … 1024"),
        ((1, (64, 32)), "2048 threads; a block has at most 1024"),
        ((1, (1, 1, 65)), "65 is not in 1 … 64"),
        ((1.5, 32), "must be an int"),
        (((1, 1, 1, 1), 32), "must be an int or a tuple"),
        ((1, 32, 0, 10**6), "dynamic shared memory"),
    ]:
        with pytest.raises(LaunchError, match=words):
            no_bounds_guard[launch](x, x)
    with pytest.raises(LaunchError, match="needs a launch configuration"):
        no_bounds_guard(x, x)
    with pytest.raises(LaunchError, match="grid and block"):
        no_bounds_guard[32]
    with pytest.raises(CompileError, match="takes 2 arguments, not 1"):
        no_bounds_guard[1, 4](x)
    with pytest.raises(LaunchError, match="argument 2 .*str"):
        no_bounds_guard[1, 4](x, "y")


def test_kernel_names_outside_a_kernel_explain_themselves():
    with pytest.raises(RuntimeError, match="inside a @cuda.jit function"):
        cuda.syncthreads()


def not_on_cpu(x):
    raise AssertionError("only its CPU equivalents are called here")


def rotate(x):
    raise AssertionError("only its CPU equivalents are called here")


@cpu_equivalent(not_on_cpu)
@njit
def triple(x):
    return 3 * x


@cpu_equivalent(rotate, level="warp", returns=("int32", "float32"))
@njit
def rotate_lanes(x, turned, halves):
    for lane in range(32):
        turned[lane] = x[(lane + 1) % 32]
        halves[lane] = x[lane] / 2


@cuda.jit
def uses_equivalents(x, out, halves):
    i = cuda.threadIdx.x
    turned, half = rotate(x[i])
    out[i] = not_on_cpu(turned)
    halves[i] = half


def test_registered_equivalents_run_once_a_lane_or_once_a_warp():
    x, out, halves = np.arange(64, dtype=np.int32), i32(64), np.zeros(64, np.float32)
    uses_equivalents[1, 64](x, out, halves)
    expected = 3 * np.concatenate([np.roll(x[:32], -1), np.roll(x[32:], -1)])
    assert (out == expected).all() and (halves == x / 2).all()


def test_generated_code_can_be_shown():
    with pytest.raises(RuntimeError, match="not been launched"):
        cuda.jit(triple.py_func).inspect_cpu()
    no_bounds_guard[1, 4](i32(4), i32(4))
    assert re.search(r"def run\(.*x, y\)", no_bounds_guard.inspect_cpu())
    assert math.isfinite(no_bounds_guard.compile_for(4, (i32(4), i32(4))))
