"""Intrinsics over PTX: wide loads and stores, pairs of float16, copies, tensor cores; alike on both backends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda, float32
from numba.types import float16, uint32, uint64

from common import BACKEND, ptx, ptx_hopper
from common.backend import package_problem

ROOT = Path(__file__).resolve().parent.parent
N = 1024


def f32(n=N):
    return np.arange(n, dtype=np.float32)


@cuda.jit
def reverse_fours(x, out, n):
    i = 4 * cuda.grid(1)
    if i < n:
        a, b, c, d = ptx.load_float4(x, i)
        ptx.store_float4(out, i, d, c, b, a)


@pytest.mark.parametrize("n", [4, 64, 1000, N])
def test_float4_in_global_memory(n):
    x, out = cuda.to_device(f32()), cuda.to_device(np.full(N, -1, np.float32))
    reverse_fours[(N // 4 + 31) // 32, 32](x, out, n)
    expected = np.full(N, -1, np.float32)
    expected[:n] = f32()[:n].reshape(-1, 4)[:, ::-1].ravel()
    np.testing.assert_array_equal(out.copy_to_host(), expected)


@cuda.jit
def transpose_through_shared(x, out):
    """out = x.T for x of shape (16, 16), 64 threads."""
    tile = cuda.shared.array((16, 16), float32, alignment=16)
    row, col = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4 * 4
    a, b, c, d = ptx.load_float4(x, (row, col))
    ptx.store_float4(tile, (row, col), a, b, c, d)
    cuda.syncthreads()
    ptx.store_float4(out, (row, col), tile[col, row], tile[col + 1, row], tile[col + 2, row], tile[col + 3, row])
    cuda.syncthreads()
    tile[row, col] += 1
    e, f, g, h = ptx.load_float4(tile, (row, col))
    ptx.store_float4(out, (row + 16, col), e, f, g, h)


def test_float4_with_two_indices_and_shared_memory():
    x = f32(256).reshape(16, 16)
    out = cuda.to_device(np.zeros((32, 16), np.float32))
    transpose_through_shared[1, 64](cuda.to_device(x), out)
    out, plus = out.copy_to_host(), x.copy()
    plus[:, ::4] += 1
    np.testing.assert_array_equal(out[:16], x.T)
    np.testing.assert_array_equal(out[16:], plus)


@cuda.jit
def swap_neighbours(x, out, n):
    i = 2 * cuda.grid(1)
    if i < n:
        ptx.store_float2(out, i, x[i + 1], x[i])


def test_float2_stores_two():
    out = cuda.to_device(np.full(N, -1, np.float32))
    swap_neighbours[32, 32](cuda.to_device(f32()), out, 1000)
    expected = np.full(N, -1, np.float32)
    expected[:1000] = f32()[:1000].reshape(-1, 2)[:, ::-1].ravel()
    np.testing.assert_array_equal(out.copy_to_host(), expected)


@cuda.jit
def copy_halves(x, out, pairs):
    tile = cuda.shared.array(256, float16, alignment=16)
    i = cuda.threadIdx.x
    a, b, c, d = ptx.load_half8(x, 8 * i)
    ptx.store_half8(tile, 8 * i, a, b, c, d)
    cuda.syncthreads()
    for j in range(4):
        ptx.store_half2(out, 8 * i + 2 * j, ptx.load_half2(tile, 8 * i + 6 - 2 * j))
    pairs[i] = b


def test_half_loads_keep_every_bit(rng):
    x = rng.integers(0, 1 << 16, 256).astype(np.uint16)  # NaN and infinities among them
    out, pairs = cuda.to_device(np.zeros(256, np.float16)), cuda.to_device(np.zeros(32, np.uint32))
    copy_halves[1, 32](cuda.to_device(x.view(np.float16)), out, pairs)
    np.testing.assert_array_equal(out.copy_to_host().view(np.uint32).reshape(-1, 4)[:, ::-1].ravel(), x.view(np.uint32))
    np.testing.assert_array_equal(pairs.copy_to_host(), x.view(np.uint32)[1::4])


@cuda.jit
def reverse_once(x, out, halves, halves_out):
    """out = x backwards, 128 of each, by loads and stores past the caches: fours of float32, pairs of float16."""
    i = cuda.threadIdx.x
    a, b, c, d = ptx.load_float4_once(x, 4 * i)
    ptx.store_float4_once(out, 124 - 4 * i, d, c, b, a)
    if i < 16:
        p, q, r, s = ptx.load_half8_once(halves, 8 * i)
        ptx.store_half8_once(halves_out, 120 - 8 * i, s, r, q, p)


def test_loads_and_stores_past_the_caches_keep_every_bit(rng):
    x = rng.integers(0, 1 << 32, 128, np.uint32)
    halves = rng.integers(0, 1 << 16, 128).astype(np.uint16)
    out, halves_out = cuda.to_device(np.zeros(168, np.float32)), cuda.to_device(np.zeros(168, np.float16))
    reverse_once[1, 32](
        cuda.to_device(x.view(np.float32)), out[:128], cuda.to_device(halves.view(np.float16)), halves_out[:128]
    )
    out, halves_out = out.copy_to_host().view(np.uint32), halves_out.copy_to_host().view(np.uint16)
    np.testing.assert_array_equal(out[:128], x[::-1])
    np.testing.assert_array_equal(halves_out[:128].view(np.uint32), halves.view(np.uint32)[::-1])
    assert not out[128:].any() and not halves_out[128:].any()


@cuda.jit
def load_where(x, halves, n, out, halves_out):
    """Fours of x and pairs of halves before element n, zeros from there on; and halves by load_half8_now."""
    i = cuda.threadIdx.x
    a, b, c, d = ptx.load_float4_if(x, 4 * i, 4 * i < n)
    ptx.store_float4(out, 4 * i, a, b, c, d)
    p, q, r, s = ptx.load_half8_if(halves, 8 * i, 8 * i < n)
    ptx.store_half8(halves_out, (0, 8 * i), p, q, r, s)
    p, q, r, s = ptx.load_half8_now(halves, min(8 * i, n - 8))
    ptx.store_half8(halves_out, (1, 8 * i), p, q, r, s)
    p, q, r, s = ptx.load_half8_once_if(halves, 8 * i, 8 * i < n)
    ptx.store_half8(halves_out, (2, 8 * i), p, q, r, s)


@pytest.mark.parametrize("n", [8, 64, 128])
def test_loads_or_zeros(rng, n):
    """NaN stands where nothing may be loaded, and behind the arrays there is nothing."""
    x, halves = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float16)
    x[:n], halves[:n] = rng.standard_normal(n), rng.standard_normal(n)
    out, halves_out = np.full(128, np.nan, np.float32), np.full((3, 256), np.nan, np.float16)
    out, halves_out = cuda.to_device(out), cuda.to_device(halves_out)
    load_where[1, 32](cuda.to_device(x), cuda.to_device(halves), n, out, halves_out)
    np.testing.assert_array_equal(out.copy_to_host(), np.pad(x, (0, 128 - n)))
    found, now, once = halves_out.copy_to_host()
    np.testing.assert_array_equal(found, np.pad(halves, (0, 256 - n)))
    np.testing.assert_array_equal(once, found)
    np.testing.assert_array_equal(now, np.concatenate([halves, np.tile(halves[-8:], (256 - n) // 8)]))


@cuda.jit
def round_trip(low, high, pairs, back, n):
    i = cuda.grid(1)
    if i < n:
        pairs[i] = ptx.pack_half2(low[i], high[i])
        back[i, 0], back[i, 1] = ptx.unpack_half2(pairs[i])


def test_pairs_round_as_numpy_does(rng):
    low = np.concatenate([rng.standard_normal(200), 10.0 ** rng.uniform(-9, 6, 200), [0, -0.0, np.inf, -np.inf, 65520]])
    low = low.astype(np.float32)
    high, n = low[::-1].copy(), len(low)
    pairs, back = cuda.to_device(np.zeros(n, np.uint32)), cuda.to_device(np.zeros((n, 2), np.float32))
    round_trip[(n + 63) // 64, 64](cuda.to_device(low), cuda.to_device(high), pairs, back, n)
    with np.errstate(over="ignore"):
        expected = np.stack([low, high], axis=1).astype(np.float16)
    np.testing.assert_array_equal(pairs.copy_to_host(), expected.view(np.uint32)[:, 0])
    np.testing.assert_array_equal(back.copy_to_host(), expected.astype(np.float32))


@cuda.jit
def powers(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = ptx.exp2_approx(x[i])


def exp2(x):
    out = cuda.to_device(np.full(len(x), -1, np.float32))
    powers[(len(x) + 127) // 128, 128](cuda.to_device(x.astype(np.float32)), out, len(x))
    return out.copy_to_host()


def test_exp2_over_its_whole_range(rng):
    x = np.concatenate([np.linspace(-125.9, 127.9, 5001), rng.uniform(-4, 4, 2000)]).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert (abs(exp2(x) - expected) <= 2.0**-21 * expected).all()  # promised are 2^-22, of the instruction


def test_exp2_of_special_values():
    assert exp2(np.array([0.0, -0.0])).tolist() == [1, 1]
    assert exp2(np.array([-np.inf, -1e30, -1000, -151, -140.5, -127])).tolist() == [0] * 6  # below 2^-126
    assert exp2(np.array([128, 1000, np.inf])).tolist() == [np.inf] * 3
    assert np.isnan(exp2(np.array([np.nan])))


# --- copies in the background, and the order of kernels --------------------------------------------------------------


@cuda.jit
def copy_in_two_groups(x, out, n):
    """out = x below n, a multiple of 8, and 0 from there to 512, 32 threads; shared memory holds 7s before."""
    tile = cuda.shared.array((2, 256), float16, alignment=16)
    i = 8 * cuda.threadIdx.x
    for group in range(2):
        for e in range(8):
            tile[group, i + e] = 7
    cuda.syncthreads()
    ptx.cp_async_half8(tile, (0, i), x, i, i < n)
    ptx.cp_async_commit()
    ptx.cp_async_half8(tile, (1, i), x, i + 256, i + 256 < n)
    ptx.cp_async_commit()
    ptx.cp_async_wait(1)
    cuda.syncthreads()
    for e in range(8):
        out[255 - i - e] = tile[0, 255 - i - e]  # what another thread has copied
    ptx.cp_async_wait(0)
    cuda.syncthreads()
    for e in range(8):
        out[511 - i - e] = tile[1, 255 - i - e]


@cuda.jit
def copy_floats(x, out, n):
    """As copy_in_two_groups for 128 float32 in one group."""
    tile = cuda.shared.array(128, float32, alignment=16)
    i = 4 * cuda.threadIdx.x
    for e in range(4):
        tile[i + e] = 7
    cuda.syncthreads()
    ptx.cp_async_float4(tile, i, x, i, i < n)
    ptx.cp_async_commit()
    ptx.cp_async_wait(0)
    cuda.syncthreads()
    for e in range(4):
        out[127 - i - e] = tile[127 - i - e]


@pytest.mark.parametrize("n", [0, 16, 240, 272, 512])
def test_copies_in_the_background(rng, n):
    for kernel, size, dtype in ((copy_in_two_groups, 512, np.float16), (copy_floats, 128, np.float32)):
        below = n * size // 512
        x = rng.standard_normal(size).astype(dtype)
        expected = np.where(np.arange(size) < below, x, 0)
        x[below:] = np.nan
        out = cuda.to_device(np.full(size + 40, -1, dtype))
        kernel[1, 32](cuda.to_device(x), out, below)
        np.testing.assert_array_equal(out.copy_to_host()[:size], expected)
        np.testing.assert_array_equal(out.copy_to_host()[size:], -1)


@cuda.jit
def add_one_in_order(x, n):
    """x += 1, with a word to the scheduler in front, between and behind."""
    i = cuda.grid(1)
    ptx.griddep_launch()
    ptx.griddep_wait()
    if i < n:
        x[i] += 1
    ptx.griddep_wait()


@cuda.jit
def tiles_of_eight_rows(X_map, out, across):
    """out[i] = tile i of X, ``across`` of them side by side, each through the same place in shared memory."""
    arrived = cuda.shared.array(128, uint64)
    tiles = cuda.shared.array(0, float16)
    tid = cuda.threadIdx.x
    if tid == 0:
        ptx_hopper.arrivals_init(arrived, 0, 1)
    cuda.syncthreads()
    for i in range(out.shape[0]):
        if tid == 0:
            ptx_hopper.copy_tile_async(tiles, 0, X_map, i // across * 8, i % across * 64, 8, arrived, 0)
        ptx_hopper.arrivals_wait(arrived, 0, i % 2)
        cuda.syncthreads()
        for j in range(tid, 512, cuda.blockDim.x):
            out[i, j // 64, j % 64] = tiles[j // 64 * 64 + ptx_hopper.swizzle128(j // 64, j % 64)]
        cuda.syncthreads()


@pytest.mark.parametrize("rows, K", [(8, 64), (1, 8), (17, 200), (33, 72)])
def test_tiles_arrive_whole_with_zeros_outside(rng, rows, K):
    if BACKEND == "gpu" and cuda.get_current_device().compute_capability < (9, 0):
        pytest.skip("copies of tiles need sm_90")
    X = rng.standard_normal((rows, K)).astype(np.float16)
    down, across = (rows + 7) // 8, (K + 63) // 64
    out = cuda.to_device(np.full((down * across, 8, 64), np.nan, np.float16))
    device_x = cuda.to_device(X)
    tiles_of_eight_rows[1, 32, 0, 1024](ptx_hopper.tile_map(device_x, 8), out, across)
    expected = np.zeros((down * 8, across * 64), np.float16)
    expected[:rows, :K] = X
    expected = expected.reshape(down, 8, across, 64).swapaxes(1, 2).reshape(-1, 8, 64)
    np.testing.assert_array_equal(out.copy_to_host(), expected)


def test_order_of_kernels_changes_nothing_in_plain_launches():
    x = cuda.to_device(f32())
    for _ in range(20):  # each adds to what the one before wrote
        add_one_in_order[N // 32, 32](x, N - 3)
    np.testing.assert_array_equal(x.copy_to_host(), f32() + 20 * (np.arange(N) < N - 3))


# --- the tensor-core product -----------------------------------------------------------------------------------------


@cuda.jit
def one_product(A, B, C, D):
    """D[w] = A[w] @ B[w] + C[w], one warp each; B is passed transposed, (8, 16). Each lane's place as the ISA says."""
    w = cuda.threadIdx.x // 32
    group, two = cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4 * 2
    a0, a1 = ptx.load_half2(A, (w, group, two)), ptx.load_half2(A, (w, group + 8, two))
    a2, a3 = ptx.load_half2(A, (w, group, two + 8)), ptx.load_half2(A, (w, group + 8, two + 8))
    b0, b1 = ptx.load_half2(B, (w, group, two)), ptx.load_half2(B, (w, group, two + 8))
    c0, c1, c2, c3 = C[w, group, two], C[w, group, two + 1], C[w, group + 8, two], C[w, group + 8, two + 1]
    c0, c1, c2, c3 = ptx.mma_m16n8k16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    D[w, group, two], D[w, group, two + 1], D[w, group + 8, two], D[w, group + 8, two + 1] = c0, c1, c2, c3


def product(A, B, C):
    D = cuda.to_device(np.full((2, 16, 8), np.nan, np.float32))
    transposed = np.ascontiguousarray(B.transpose(0, 2, 1))
    one_product[1, 64](cuda.to_device(A), cuda.to_device(transposed), cuda.to_device(C), D)
    return D.copy_to_host()


def test_mma_is_exact_on_whole_numbers(rng):
    A, B = rng.integers(-8, 9, (2, 16, 16)).astype(np.float16), rng.integers(-8, 9, (2, 16, 8)).astype(np.float16)
    C = rng.integers(-99, 99, (2, 16, 8)).astype(np.float32)
    np.testing.assert_array_equal(product(A, B, C), A.astype(np.float64) @ B.astype(np.float64) + C)


def test_mma_accumulates_in_float32(rng):
    A, B = rng.standard_normal((2, 16, 16)).astype(np.float16), rng.standard_normal((2, 16, 8)).astype(np.float16)
    C = rng.standard_normal((2, 16, 8), dtype=np.float32) * 1000
    A64, B64 = A.astype(np.float64), B.astype(np.float64)
    bound = 2.0**-22 * 17 * (abs(A64) @ abs(B64) + abs(C))  # tensor cores may truncate where they add: not 2^-24
    assert (abs(product(A, B, C) - (A64 @ B64 + C)) <= bound).all()


@cuda.jit
def one_small_product(A, B, C, D):
    """D[w] = A[w] @ B[w] + C[w] as one_product, of A (16, 8) and B (8, 8), passed transposed."""
    w = cuda.threadIdx.x // 32
    group, two = cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4 * 2
    a0, a1 = ptx.load_half2(A, (w, group, two)), ptx.load_half2(A, (w, group + 8, two))
    b0 = ptx.load_half2(B, (w, group, two))
    c0, c1, c2, c3 = C[w, group, two], C[w, group, two + 1], C[w, group + 8, two], C[w, group + 8, two + 1]
    c0, c1, c2, c3 = ptx.mma_m16n8k8(a0, a1, b0, c0, c1, c2, c3)
    D[w, group, two], D[w, group, two + 1], D[w, group + 8, two], D[w, group + 8, two + 1] = c0, c1, c2, c3


def test_small_mma_is_exact_on_whole_numbers(rng):
    A, B = rng.integers(-8, 9, (2, 16, 8)).astype(np.float16), rng.integers(-8, 9, (2, 8, 8)).astype(np.float16)
    C = rng.integers(-99, 99, (2, 16, 8)).astype(np.float32)
    D = cuda.to_device(np.full((2, 16, 8), np.nan, np.float32))
    transposed = np.ascontiguousarray(B.transpose(0, 2, 1))
    one_small_product[1, 64](cuda.to_device(A), cuda.to_device(transposed), cuda.to_device(C), D)
    np.testing.assert_array_equal(D.copy_to_host(), A.astype(np.float64) @ B.astype(np.float64) + C)


@cuda.jit
def products_from_shared(A, B, Bt, registers, D):
    """What ldmatrix gives each lane of A, of B.T and of B transposed, (3, 32, 4); D = A @ B from these, twice.

    A, B, Bt: (16, 16). One warp.
    """
    a_tile = cuda.shared.array((16, 16), float16, alignment=16)
    b_tile = cuda.shared.array(256, float16, alignment=16)
    bt_tile = cuda.shared.array((16, 16), float16, alignment=16)
    a = cuda.local.array(4, uint32)
    b = cuda.local.array((2, 4), uint32)
    lane = cuda.threadIdx.x
    row, col = lane // 2, lane % 2 * 8
    p0, p1, p2, p3 = ptx.load_half8(A, (row, col))
    ptx.store_half8(a_tile, (row, col), p0, p1, p2, p3)
    p0, p1, p2, p3 = ptx.load_half8(B, (row, col))
    ptx.store_half8(b_tile, 16 * row + col, p0, p1, p2, p3)
    p0, p1, p2, p3 = ptx.load_half8(Bt, (row, col))
    ptx.store_half8(bt_tile, (row, col), p0, p1, p2, p3)
    cuda.syncthreads()
    a[0], a[1], a[2], a[3] = ptx.ldmatrix_x4(a_tile, (lane % 16, lane // 16 * 8))
    place = (lane // 16 * 8 + lane % 8, lane // 8 % 2 * 8)
    b[0, 0], b[0, 1], b[0, 2], b[0, 3] = ptx.ldmatrix_x4(bt_tile, place)
    b[1, 0], b[1, 1], b[1, 2], b[1, 3] = ptx.ldmatrix_x4_trans(b_tile, 16 * (lane % 16) + lane // 16 * 8)
    for i in range(4):
        registers[0, lane, i] = a[i]
        registers[1, lane, i] = b[0, i]
        registers[2, lane, i] = b[1, i]
    group, two = lane // 4, lane % 4 * 2
    none = float32(0)
    for way in range(2):
        for half in range(2):
            c0, c1, c2, c3 = ptx.mma_m16n8k16(
                a[0], a[1], a[2], a[3], b[way, 2 * half], b[way, 2 * half + 1], none, none, none, none
            )
            D[way, group, 8 * half + two], D[way, group, 8 * half + two + 1] = c0, c1
            D[way, group + 8, 8 * half + two], D[way, group + 8, 8 * half + two + 1] = c2, c3


def from_shared(A, B):
    registers = cuda.to_device(np.zeros((3, 32, 4), np.uint32))
    D = cuda.to_device(np.full((2, 16, 16), np.nan, np.float32))
    operands = (cuda.to_device(np.ascontiguousarray(X)) for X in (A, B, B.T))
    products_from_shared[1, 32](*operands, registers, D)
    return registers.copy_to_host(), D.copy_to_host()


def test_ldmatrix_gives_each_lane_its_elements(rng):
    """Those of the table in mma_m16n8k16's docstring, with every bit; b2 and b3 are of the second product."""
    A, B = rng.integers(0, 1 << 16, (2, 16, 16)).astype(np.uint16)
    registers, _ = from_shared(A.view(np.float16), B.view(np.float16))
    lane = np.arange(32)
    group, two = lane // 4, lane % 4 * 2

    def pairs(X, row, column):
        return X[row, column].astype(np.uint32) | X[row, column + 1].astype(np.uint32) << 16

    places = [(group, two), (group + 8, two), (group, two + 8), (group + 8, two + 8)]
    np.testing.assert_array_equal(registers[0], np.stack([pairs(A, *place) for place in places], axis=1))
    places[1:3] = places[2:0:-1]  # of B the second register has the rows from 8 on, in A the columns
    expected = np.stack([pairs(B.T, *place) for place in places], axis=1)
    np.testing.assert_array_equal(registers[1], expected)
    np.testing.assert_array_equal(registers[2], expected)


def test_products_of_what_ldmatrix_loads(rng):
    A, B = rng.integers(-8, 9, (2, 16, 16)).astype(np.float16)
    _, (from_transposed, as_it_lies) = from_shared(A, B)
    expected = A.astype(np.float64) @ B.astype(np.float64)
    np.testing.assert_array_equal(from_transposed, expected)
    np.testing.assert_array_equal(as_it_lies, expected)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_every_element_of_a_vector_access_is_checked(monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    x, out = cuda.to_device(f32(30)), cuda.to_device(f32(32))
    reverse_fours[1, 32](cuda.to_device(f32(32)), out, 32)  # fits
    if not getattr(cuda, "is_cpu_backend", False):
        return
    with pytest.raises(cuda.KernelError, match=r"x: index 31 on axis 0 is outside 0 … 29; .*thread \(7, 0, 0\)"):
        reverse_fours[1, 32](x, out, 32)


def test_arrays_of_another_type_are_refused():
    with pytest.raises(Exception, match="load_float4 takes a C-contiguous array of float32"):
        reverse_fours[1, 32](cuda.to_device(f32().astype(np.float64)), cuda.to_device(f32()), N)


def test_exp2_of_another_type_is_refused():
    with pytest.raises(Exception, match="exp2_approx takes a float32, not float64"):
        powers[1, 32](cuda.to_device(np.zeros(32)), cuda.to_device(f32(32)), 32)


# --- what the assembler gets -----------------------------------------------------------------------------------------

COMPILE = """
import sys
import common.ptx_check as check
from numba import cuda, types
import tests.test_ptx as t
from chapters.ch09_gemm import hopper
cc = tuple(int(part) if part.isdecimal() else part for part in sys.argv[1].split("."))
check._stand_in_device(cc)
f32, f16, u32 = types.float32, types.float16, types.uint32
kernels = [
    (t.reverse_fours, (f32[::1], f32[::1], types.int64)),
    (t.transpose_through_shared, (f32[:, ::1],) * 2),
    (t.copy_halves, (f16[::1], f16[::1], u32[::1])),
    (t.reverse_once, (f32[::1], f32[::1], f16[::1], f16[::1])),
    (t.load_where, (f32[::1], f16[::1], types.int64, f32[::1], f16[:, ::1])),
    (t.powers, (f32[::1], f32[::1], types.int64)),
    (t.copy_in_two_groups, (f16[::1], f16[::1], types.int64)),
    (t.copy_floats, (f32[::1], f32[::1], types.int64)),
    (t.add_one_in_order, (f32[::1], types.int64)),
    (t.one_product, (f16[:, :, ::1],) * 2 + (f32[:, :, ::1],) * 2),
    (t.one_small_product, (f16[:, :, ::1],) * 2 + (f32[:, :, ::1],) * 2),
    (t.products_from_shared, (f16[:, ::1],) * 3 + (u32[:, :, ::1], f32[:, :, ::1])),
]
if cc[2:]:
    sizes = (f32[:, ::1],) + (types.int64,) * 3
    kernels = [
        (hopper.gemm_v7_warpgroup, (f16[:, ::1], f16[:, ::1], *sizes)),
        (hopper.gemm_v8_tma, (types.uint64[::1], types.uint64[::1], *sizes)),
    ]
for kernel, signature in kernels:
    options = {name: kernel.targetoptions[name] for name in ("launch_bounds",) if kernel.targetoptions.get(name)}
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc, **options)
    assert not check.assemble(ptx, cc)["spilled"], kernel
    print(ptx)
"""
EVERYWHERE = [
    "ld.global.v4", "st.global.v4", "ld.shared.v4", "st.shared.v4", "ex2.approx.ftz.f32",
    "ld.global.nc.L1::no_allocate.v4.f32", "ld.global.nc.L1::no_allocate.v4.u32",
    "@p ld.global.v4.f32", "@p ld.global.v4.u32", "ld.global.L1::no_allocate.v4.u32",
    "st.global.cs.v4.f32", "st.global.cs.v4.u32", "mma.sync.aligned.m16n8k8.",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
]  # fmt: skip
FROM_80 = ["mma.sync.aligned.m16n8k16.", "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group"]
FROM_90 = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
ONLY_90A = [
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16", "wgmma.fence.sync", "wgmma.commit_group.sync",
    "wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 0;", "fence.proxy.async.shared::cta",
    "mbarrier.init.shared::cta.b64", "fence.mbarrier_init.release.cluster", "mbarrier.try_wait.parity.shared::cta.b64",
    "mbarrier.arrive.expect_tx.shared::cta.b64", "cp.async.bulk.tensor.2d.shared::cluster.global.tile",
    "st.global.v2.f32",
]  # fmt: skip


@pytest.mark.skipif(bool(package_problem()), reason="numba-cuda is not installed")
@pytest.mark.parametrize(
    "arch, there, missing",
    [
        ("7.5", EVERYWHERE, [*FROM_80, "cp.async", *FROM_90]),
        ("8.0", EVERYWHERE + FROM_80, FROM_90),
        ("9.0", EVERYWHERE + FROM_80 + FROM_90, ["wgmma"]),
        ("9.0.a", ONLY_90A + FROM_80[1:], ["mma.sync"]),
    ],
    ids=["7.5", "8.0", "9.0", "9.0a"],
)
def test_the_instructions_are_in_the_ptx(arch, there, missing):
    """In a process for each architecture: a device function is compiled once, for the first that asks."""
    environ = os.environ | {"MINI_BACKEND": "ptx"}
    command = [sys.executable, "-c", COMPILE, arch]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [instruction for instruction in there if instruction not in done.stdout] == []
    assert [instruction for instruction in missing if instruction in done.stdout] == []
