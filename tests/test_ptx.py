"""Intrinsics over PTX: vector loads and stores, pairs of float16, the tensor-core product; alike on both backends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda, float32
from numba.types import float16

from common import ptx
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


COMPILE = """
import common.ptx_check as check
from numba import cuda, types
import tests.test_ptx as t
check._stand_in_device((8, 0))
f32, f16, u32 = types.float32[::1], types.float16[::1], types.uint32[::1]
for kernel, signature in [
    (t.reverse_fours, (f32, f32, types.int64)),
    (t.transpose_through_shared, (types.float32[:, ::1],) * 2),
    (t.copy_halves, (f16, f16, u32)),
    (t.one_product, (types.float16[:, :, ::1],) * 2 + (types.float32[:, :, ::1],) * 2),
]:
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))
    check.assemble(ptx, (8, 0))
    print(ptx)
"""


@pytest.mark.skipif(bool(package_problem()), reason="numba-cuda is not installed")
def test_the_instructions_are_in_the_ptx():
    environ = os.environ | {"MINI_BACKEND": "ptx"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for instruction in ("ld.global.v4", "st.global.v4", "ld.shared.v4", "st.shared.v4", "mma.sync.aligned.m16n8k16"):
        assert instruction in done.stdout, instruction
