"""Chapter 7: the largest element of a row and its index against NumPy."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch07_warp_reduce import argmax as ch07

SIZES = [1, 31, 33, 127, 1025]
ROWS = [1, 7]
BLOCKS = [96, 1024]
ROW_MAXES = [ch07.row_max_v1_shared_tree, ch07.row_max_v2_warp_shuffle, ch07.row_max_v3_float4]
POISON = np.float32(1e30)  # behind each matrix: larger than anything in it


def name_of(kernel):
    return kernel.py_func.__name__


def by_row(kernel, x, dtype, launch):
    """``kernel`` on x; a row of POISON lies behind x, and -7 behind the result, which must still be there."""
    rows, cols = x.shape
    behind = np.full((1, cols), POISON)
    out = cuda.to_device(np.full(rows + 3, -7, dtype))
    kernel[launch](cuda.to_device(np.concatenate([x, behind]))[:rows], out, cols)
    result = out.copy_to_host()
    assert (result[rows:] == -7).all()
    return result[:rows]


def row_max(kernel, x, launch=None):
    return by_row(kernel, x, np.float32, launch or ch07.row_max_launch(*x.shape))


def argmax(x, launch=None):
    return by_row(ch07.argmax_row, x, np.int32, launch or ch07.argmax_launch(*x.shape))


def greedy_argmax(logits, launch=None):
    out = cuda.device_array(1, np.int32)
    ch07.greedy_argmax[launch or ch07.greedy_argmax_launch()](cuda.to_device(logits), out, len(logits))
    return int(out.copy_to_host()[0])


def special_rows():
    """A matrix whose rows hold nothing but NaN, nothing but -inf, a NaN before the largest, +inf twice, and so on."""
    x = np.zeros((7, 127), np.float32)
    x[0] = np.nan
    x[1] = -np.inf
    x[2, ::2], x[2, 51] = np.nan, 3
    x[3, [50, 90]] = np.inf
    x[4], x[4, 77] = np.nan, -np.inf
    x[5] = np.where(np.arange(127) % 2, np.float32(0.0), np.float32(-0.0))
    x[6] = -np.arange(127, 0, -1)
    return x, [-np.inf, -np.inf, 3, np.inf, -np.inf, 0, -1], [-1, 0, 51, 50, 77, 0, 126]


# --- the largest element ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ROW_MAXES, ids=name_of)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", SIZES)
def test_row_max(rng, kernel, rows, cols):
    x = rng.standard_normal((rows, cols), dtype=np.float32) - 10  # all negative: a zero that slips in would win
    found = row_max(kernel, x)
    np.testing.assert_array_equal(found, x.max(axis=1))
    np.testing.assert_array_equal(found, ch07.row_max_reference(x))


@pytest.mark.parametrize("kernel", ROW_MAXES, ids=name_of)
@pytest.mark.parametrize("threads", BLOCKS)
def test_row_max_finds_every_thread(kernel, threads):
    x = np.full((1025, 1025), -5, np.float32)
    np.fill_diagonal(x, np.arange(1025) - 2000.0)
    x -= 5000 * (x == -5)  # row r's largest element is at column r
    np.testing.assert_array_equal(row_max(kernel, x, (1025, threads)), np.arange(1025, dtype=np.float32) - 2000)


@pytest.mark.parametrize("kernel", ROW_MAXES, ids=name_of)
def test_row_max_of_special_values(kernel):
    x, largest, _ = special_rows()
    np.testing.assert_array_equal(row_max(kernel, x), largest)
    np.testing.assert_array_equal(ch07.row_max_reference(x), largest)


@pytest.mark.parametrize("kernel", ROW_MAXES, ids=name_of)
def test_row_max_has_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x = rng.standard_normal((3, 129), dtype=np.float32)
    out = cuda.device_array(3, np.float32)
    kernel[ch07.row_max_launch(3, 129)](cuda.to_device(x), out, 129)
    np.testing.assert_array_equal(out.copy_to_host(), x.max(axis=1))


# --- its index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", SIZES)
def test_argmax_row(rng, rows, cols):
    x = rng.standard_normal((rows, cols), dtype=np.float32) - 10
    found = argmax(x)
    np.testing.assert_array_equal(found, x.argmax(axis=1))
    np.testing.assert_array_equal(found, ch07.argmax_reference(x))


@pytest.mark.parametrize("threads", BLOCKS)
def test_argmax_row_takes_the_lowest_of_equals(rng, threads):
    x = rng.integers(0, 3, (9, 1025)).astype(np.float32)
    x[:, :40] = 0  # so that no answer is the first element by chance
    x[8] = 4
    np.testing.assert_array_equal(argmax(x, (9, threads)), x.argmax(axis=1))


def test_argmax_row_of_special_values():
    x, _, index = special_rows()
    np.testing.assert_array_equal(argmax(x), index)
    np.testing.assert_array_equal(ch07.argmax_reference(x), index)


def test_argmax_row_has_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    x = rng.standard_normal((3, 129), dtype=np.float32)
    out = cuda.device_array(3, np.int32)
    ch07.argmax_row[ch07.argmax_launch(3, 129)](cuda.to_device(x), out, 129)
    np.testing.assert_array_equal(out.copy_to_host(), x.argmax(axis=1))


# --- greedy decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*SIZES, 50257])
def test_greedy_argmax(rng, n):
    logits = rng.standard_normal(n, dtype=np.float32) - 5
    assert greedy_argmax(logits) == ch07.greedy_argmax_reference(logits) == int(np.argmax(logits))


@pytest.mark.parametrize("position", [0, 1, 31, 32, 1023, 1024, 2048])
def test_greedy_argmax_finds_every_position(position):
    logits = np.zeros(2049, np.float32)
    logits[position] = 1e-3
    assert greedy_argmax(logits) == position


@pytest.mark.parametrize("threads", BLOCKS)
def test_greedy_argmax_takes_the_lowest_of_equals(rng, threads):
    logits = rng.integers(0, 3, 1025).astype(np.float32)
    logits[:40] = 0
    assert greedy_argmax(logits, (1, threads)) == int(np.argmax(logits))
    assert greedy_argmax(np.full(1025, 4, np.float32), (1, threads)) == 0


def test_greedy_argmax_of_special_values():
    x, _, index = special_rows()
    for logits, expected in zip(x, index, strict=True):
        assert greedy_argmax(logits) == ch07.greedy_argmax_reference(logits) == expected


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch, name", [(ch07.row_max_launch, "row_max"), (ch07.argmax_launch, "argmax_row")])
def test_launch_refuses_empty(launch, name):
    with pytest.raises(ValueError, match=f"^{name}: rows = 0: a launch needs at least 1 row"):
        launch(0, 5)
    with pytest.raises(ValueError, match=f"^{name}: cols = -1: a launch needs at least 1 element"):
        launch(5, -1)
    assert launch(5, 1024) == (5, 128)
