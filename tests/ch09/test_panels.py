"""Chapter 9, products in panels: every rung against one reference, and a row's bits against all rungs'."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import panels

RUNGS = [panels.linear_v1_column, panels.linear_v2_panels, panels.linear_v3_rows]
SHAPES = [(1, 1, 1), (1, 33, 31), (3, 31, 70), (16, 64, 96), (17, 100, 101), (33, 65, 7)]  # M, N, K
every_rung = pytest.mark.parametrize("kernel", RUNGS, ids=lambda kernel: kernel.py_func.__name__)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float16])


def on_device(array):
    """The array on the device, with NaN behind it."""
    padded = cuda.to_device(np.concatenate([array.ravel(), np.full(40, np.nan, array.dtype)]))
    return padded[: array.size].reshape(array.shape)


def product(kernel, x, W, bias, before=None):
    """x @ W + bias on the device, on top of ``before`` if that is given; checks that 7 is still behind it."""
    (M, K), N = x.shape, W.shape[1]
    rows = panels.ROWS if kernel is panels.linear_v3_rows else 1
    weight = W if kernel is panels.linear_v1_column else panels.pack_reference(W)
    buffer = cuda.to_device(np.full(M * N + 40, 7, np.float32))
    y = buffer[: M * N].reshape(M, N)
    if before is not None:
        y.copy_to_device(before)
    inputs = map(on_device, (x, weight, bias))
    kernel[panels.linear_launch(M, N, rows)](*inputs, y, M, N, K, int(before is not None))
    np.testing.assert_array_equal(buffer.copy_to_host()[M * N :], 7)
    return y.copy_to_host()


@every_rung
@every_dtype
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_it_is_exact_on_whole_numbers(rng, kernel, dtype, M, N, K):
    x, W, bias, before = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((M, K), (K, N), N, (M, N)))
    expected = panels.linear_reference(x, W, bias)
    np.testing.assert_array_equal(product(kernel, x, W.astype(dtype), bias), expected)
    np.testing.assert_array_equal(product(kernel, x, W.astype(dtype), bias, before), before + expected)


@every_dtype
def test_a_row_has_the_same_bits_on_every_rung_and_in_any_company(rng, dtype):
    """And they are those of a sum over k = 0, 1, 2 …, to rounding."""
    x, bias = rng.standard_normal((37, 203), dtype=np.float32), rng.standard_normal(70, dtype=np.float32)
    W = rng.standard_normal((203, 70), dtype=np.float32).astype(dtype)
    expected = [product(kernel, x, W, bias) for kernel in RUNGS]
    for got in expected[1:]:
        np.testing.assert_array_equal(got, expected[0])
    x[:20] = np.nan
    for kernel in RUNGS:
        np.testing.assert_array_equal(product(kernel, x[20:21], W, bias), expected[0][20:21])
        np.testing.assert_array_equal(product(kernel, x, W, bias)[20:], expected[0][20:])
    exact = x[20:].astype(np.float64) @ W.astype(np.float64) + bias
    bound = 204 * 2.0**-24 * (np.abs(x[20:]).astype(np.float64) @ np.abs(W.astype(np.float64)) + np.abs(bias))
    assert np.all(np.abs(expected[0][20:] - exact) <= bound)  # Higham 2002, section 3.1


@every_rung
def test_columns_stay_apart(rng, kernel):
    x, W, bias = rng.standard_normal((3, 9)).astype(np.float32), rng.standard_normal((9, 40)).astype(np.float32), 40
    bias = np.zeros(bias, np.float32)
    before = product(kernel, x, W, bias)
    W[5, 33] = np.nan
    after = product(kernel, x, W, bias)
    assert np.isnan(after[:, 33]).all() and np.array_equal(np.delete(after, 33, 1), np.delete(before, 33, 1))


@pytest.mark.parametrize("given", [np.float32, np.float16])
@pytest.mark.parametrize("kept", [np.float32, np.float16])
@pytest.mark.parametrize("K, N", [(1, 1), (7, 33), (65, 64)])
def test_packing(rng, given, kept, K, N):
    W = rng.standard_normal((K, N)).astype(np.float16).astype(given)
    expected = panels.pack_reference(W.astype(kept))
    for kernel, launch, source in (
        (panels.pack_columns, panels.pack_columns_launch, W),
        (panels.pack_rows, panels.pack_rows_launch, np.ascontiguousarray(W.T)),
    ):
        packed = cuda.to_device(np.full((expected.size + 9,), 7, kept))
        out = packed[: expected.size].reshape(expected.shape)
        kernel[launch(K, N)](on_device(source), out, K, N)
        np.testing.assert_array_equal(out.copy_to_host(), expected)
        np.testing.assert_array_equal(packed.copy_to_host()[expected.size :], 7)


def test_the_fastest_rung_depends_on_the_rows():
    assert panels.linear(1, 70) == (panels.linear_v2_panels, ((1, 3), 32))
    assert panels.linear(17, 64) == (panels.linear_v3_rows, ((2, 2), 32))


@every_rung
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")
    x, W, bias = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((17, 9), (9, 33), 33))
    np.testing.assert_array_equal(product(kernel, x, W, bias), panels.linear_reference(x, W, bias))


def test_launches_refuse():
    with pytest.raises(ValueError, match="M = 0, N = 4: a launch takes at least 1 row"):
        panels.linear_launch(0, 4)
    with pytest.raises(ValueError, match="up to 2097120 columns"):
        panels.linear_launch(1, 2097121)
    with pytest.raises(ValueError, match="K = 3, N = 0: a matrix has at least 1 row and 1 column"):
        panels.pack_rows_launch(3, 0)
