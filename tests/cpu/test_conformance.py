"""The conformance suite: what the backends must agree on, kernel by kernel.

Each kernel runs on the backend of this process (the CPU backend, or a GPU) and in the per-thread interpreter of
tests/oracle.py; arrays must be equal, exactly unless a tolerance is given.
"""

import conformance_kernels as k
import numpy as np
import oracle
import pytest
from numba import cuda

CASES = []


def case(kernel, grid, block, *args, shared=0, rtol=0.0, name=None):
    CASES.append(pytest.param(kernel, grid, block, args, shared, rtol, id=name or f"{kernel.__name__}-{len(CASES)}"))


def ints(shape, low=-9, high=10, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def floats(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def zeros(*shape, dtype=np.int64):
    return np.zeros(shape, dtype)


for n, block in [(1, 1), (31, 32), (100, 32), (1025, 128), (77, 7)]:
    case(k.grid_1d, -(-n // block), block, zeros(n))
case(k.grid_2d, (3, 2), (16, 4), zeros(7, 33))
case(k.grid_2d, (5, 3), (3, 5), zeros(13, 14))
case(k.grid_3d, (2, 2, 2), (4, 3, 2), zeros(3, 5, 7))
case(k.positions, 3, 40, zeros(120, 7))
for n in (1, 31, 127, 500):
    case(k.grid_stride, 2, 33, ints(n), zeros(n), n)
    case(k.grid_stride, 2, 64, ints(n), zeros(n), n)
    case(k.grid_stride_while, 2, 33, ints(n), zeros(n), n)
case(k.early_return, 3, 32, ints(70), zeros(70), 70)
case(k.return_in_loop, 2, 32, ints(40, 0, 64), zeros(64), 40)
case(k.exit_before_barrier, 2, 64, ints(100), zeros(100), 100)
case(k.loop_after_all_have_returned, 3, 64, ints(192, 50, 90), zeros(192), 69)
for n in (0, 1, 9, 10):
    case(k.same_rounds_in_all_threads, 2, 33, ints(8), zeros(66), n)
case(k.collatz, 2, 31, ints(62, 1, 30), zeros(62))
case(k.continue_and_break, 2, 16, zeros(32), 12)
case(k.device_functions, 2, 20, ints(40), zeros(40, 4))
case(k.device_function_with_barriers, 3, 64, ints(192), zeros(192))
case(k.device_function_with_votes, 2, 64, np.concatenate([ints(64, -9, 0), ints(64)]), zeros(128))
case(k.transpose_tile, (3, 2), (8, 8), floats((13, 19)), zeros(19, 13, dtype=np.float32))
case(
    k.matmul_tile, (2, 3), (8, 8), ints((17, 11)).astype("f"), ints((11, 9)).astype("f"), zeros(17, 9, dtype=np.float32)
)
case(k.dynamic_shared, 1, 50, ints(50), zeros(50), 50, shared=200)
case(k.local_arrays, 2, 33, ints(66), zeros(66))
case(k.loops_over_arrays, 2, 32, floats(6), ints((5, 7)).astype("f"), zeros(64, dtype=np.float32))
case(k.constant_arrays, 1, 40, zeros(40))
case(k.barrier_votes, 3, 40, ints(120), zeros(120, 3))
for rounds in (0, 1, 5, 9):
    case(k.barrier_in_loops, 2, 33, ints(66), zeros(66), rounds)
for flag in (0, 1):
    case(k.barrier_in_uniform_branch, 3, 20, ints(60), zeros(60), flag)
for block in (1, 31, 33, 64):
    case(k.hillis_steele, 2, block, ints(2 * block), zeros(2 * block))
for dtype in (np.int32, np.int64, np.float32, np.float64):
    case(k.shuffles, 2, 64, ints(128, dtype=dtype), zeros(128, 6, dtype=dtype), name=f"shuffles-{np.dtype(dtype).name}")
case(k.warp_sum_loop, 2, 96, ints(192), zeros(6))
case(k.warp_sum_tuple, 1, 64, ints(64), zeros(64))
for block in (32, 128, 256):
    case(k.shuffle_in_warp_branch, 3, block, ints(3 * block), zeros(3))
case(k.shuffle_half_warps, 2, 64, ints(128), zeros(128))
case(k.shuffle_in_divergent_loop, 1, 96, ints(96), zeros(96))
case(k.vote_loop, 1, 96, ints(96), zeros(96))
case(k.votes, 2, 64, ints(128), zeros(128, 9))
case(k.votes, 1, 40, ints(40), zeros(40, 9), name="votes-partial-warp")
case(k.masked_ballot, 1, 96, ints(96), zeros(96))
case(k.warp_exchange_through_shared, 2, 64, ints(128), zeros(128))
case(k.global_atomics, 5, 64, ints(300, 0, 200), zeros(9, dtype=np.int32), 300)
case(k.unsigned_atomics, 3, 9, zeros(2, dtype=np.uint32))
case(k.histogram, 3, 40, ints(500, 0, 1000), zeros(1, 16, dtype=np.int32), 500)
case(k.float_atomics, 4, 32, ints(128).astype("f"), zeros(3, dtype=np.float32))
case(k.float_atomics, 4, 32, ints(128).astype("d"), zeros(3, dtype=np.float64))
case(k.compact, 4, 32, ints(120), zeros(128), zeros(1, dtype=np.int32), 120)
case(k.scalar_intrinsics, 2, 20, ints(40, 0, 10**6), ints(40).astype("f"), zeros(40, 5), zeros(40, dtype=np.float32))
case(k.math_functions, 4, 32, floats(128) * 3, zeros(128, 12, dtype=np.float32), rtol=2e-6)
case(k.math_functions, 4, 32, floats(128, np.float64) * 3, zeros(128, 12, dtype=np.float64), rtol=2e-6)
case(k.reused_names, 2, 20, ints(40).astype("f"), zeros(40, dtype=np.float64))
case(k.keeps_old_value, 2, 33, ints(66), zeros(66))
for dtype in (np.int32, np.int64):
    y = ints(100, 1, 9, dtype, 2) * np.where(np.arange(100) % 2, 1, -1).astype(dtype)
    case(
        k.python_integers,
        4,
        25,
        ints(100, dtype=dtype),
        y,
        zeros(100, 11),
        name=f"python_integers-{np.dtype(dtype).name}",
    )
case(k.negative_index, 1, 40, ints(50), zeros(40))
case(k.wraps_around, 1, 40, ints(40), zeros(40))
case(k.hashes_its_index, 2, 64, zeros(128))
case(k.mixed_types, 1, 40, ints(40, 0, 2).astype(bool), ints(40, dtype=np.int8), ints(40, 0, 200, np.uint8),
     ints(40, dtype=np.int64), floats(40, np.float64), zeros(40, 5, dtype=np.float64))  # fmt: skip
case(k.half_precision, 1, 40, ints(40).astype(np.float16) / np.float16(4), ints(40, seed=3).astype(np.float16),
     zeros(40, dtype=np.float16), zeros(40, dtype=np.float32))  # fmt: skip
case(k.collective_inside_expression, 1, 64, ints(64), zeros(64))
case(
    k.register_tile,
    (2, 2),
    (8, 8),
    ints((32, 9)).astype("f"),
    ints((9, 32)).astype("f"),
    zeros(32, 32, dtype=np.float32),
    9,
)
case(k.lower_triangle, 37, 16, ints((37, 37)), zeros(37, 37), 37)
for n in (1, 7, 27):
    case(k.uniform_while, 2, 33, ints(66), zeros(66), n)
case(k.one_thread_a_block, 5, 1, ints(30, 1, 9), zeros(5), 30)
for rows, cols in [(1, 1), (7, 31), (9, 100)]:
    case(k.warp_per_row, 3, 128, ints((rows, cols)), zeros(rows), rows, cols)
for n in (1, 2, 33, 255, 300):
    case(k.stencil, 3, 128, ints(n), zeros(n), n)
case(k.row_of_view, 1, 30, ints((30, 5)), zeros(30))
case(k.place_in_loops_of_half_a_warp, 1, 32, zeros(4, 128), 3, 128)
case(k.loop_variable_changed_by_some, 1, 64, ints(64), zeros(64), 4)
case(k.loop_variable_left_in_a_branch, 1, 64, ints(64, 0, 9), zeros(64), 9)
case(k.loop_variable_of_a_uniform_tree, 1, 64, zeros(64), 5)
case(k.branch_that_no_block_takes, 2, 64, ints(64), zeros(128))
for least in (-1, 3, 40):
    case(k.views_chosen_by_lane, 2, 64, ints(64, 0, 9), zeros(128, 3), least)
case(k.last_block, 5, 32, ints(150, 0, 9), zeros(2), zeros(1, dtype=np.int32), 150)


def copies(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


@pytest.mark.parametrize("kernel, grid, block, args, shared, rtol", CASES)
def test_backend_agrees_with_the_interpreter(kernel, grid, block, args, shared, rtol):
    expected, got = copies(args), copies(args)
    oracle.run(kernel.py_func, grid, block, expected, shared)
    kernel[grid, block, 0, shared](*got)
    for e, g in zip(expected, got):
        if isinstance(e, np.ndarray):
            assert g.dtype == e.dtype
            if rtol:
                np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol)
            else:
                np.testing.assert_array_equal(g, e)


def test_lock_between_blocks():
    lock, out = np.zeros(1, np.int32), np.zeros(1, np.int64)
    k.ticket_lock[40, 1](lock, out)
    assert out[0] == 40 and lock[0] == 0


def test_device_arrays_slices_and_streams():
    stream = cuda.stream()
    x = cuda.to_device(ints(64), stream=stream)
    out = cuda.to_device(np.zeros((2, 64), np.int64), stream=stream)
    k.grid_stride[1, 32, stream](x, out[1], 64)
    stream.synchronize()
    host = out.copy_to_host(stream=stream)
    stream.synchronize()
    np.testing.assert_array_equal(host[1], ints(64).astype(np.int64) * 2 + 1)
    assert not host[0].any()


def test_many_blocks_of_float_atomics_lose_nothing():
    x, out = np.ones(1 << 16, np.float32), np.zeros(3, np.float32)
    k.float_atomics[1 << 11, 32](x, out)
    assert out[0] == 1 << 16
