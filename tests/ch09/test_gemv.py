"""Chapter 9: matrix times vector, every version against one reference."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch09_gemm import gemv as ch09

GEMV = [ch09.gemv_v1_thread_per_row, ch09.gemv_v2_warp_per_row, ch09.gemv_v3_vector]
WIDTHS = [1, 31, 33, 124, 127, 128, 132, 768, 1025]  # multiples of 4 and others, below and above 128


def name_of(kernel):
    return kernel.py_func.__name__


def gemv(kernel, x, wte, rows):
    """The first ``rows`` rows of wte times x; the buffer behind them must keep its 7s."""
    launch = ch09.gemv_v1_launch if kernel is ch09.gemv_v1_thread_per_row else ch09.gemv_logits_launch
    logits = cuda.to_device(np.full(rows + 40, 7, np.float32))
    nan = np.full(40, np.nan, np.float32)
    device_x = cuda.to_device(np.concatenate([x, nan]))[: len(x)]
    kernel[launch(rows)](device_x, cuda.to_device(wte), logits, rows, len(x))
    np.testing.assert_array_equal(logits.copy_to_host()[rows:], 7)
    return logits.copy_to_host()[:rows]


@pytest.mark.parametrize("kernel", GEMV, ids=name_of)
@pytest.mark.parametrize("vocab_size", [1, 7, 300])
@pytest.mark.parametrize("d_model", WIDTHS)
def test_gemv_is_exact_on_whole_numbers(rng, kernel, vocab_size, d_model):
    x = rng.integers(-8, 9, d_model).astype(np.float32)
    wte = rng.integers(-8, 9, (vocab_size + 3, d_model)).astype(np.float32)
    expected = ch09.gemv_logits_reference(x, wte)[:vocab_size]
    np.testing.assert_array_equal(gemv(kernel, x, wte, vocab_size), expected)


@pytest.mark.parametrize("kernel", GEMV, ids=name_of)
@pytest.mark.parametrize("d_model", [127, 768])
def test_gemv_rounding_stays_within_the_bound_of_a_float32_sum(rng, kernel, d_model):
    x, wte = rng.standard_normal(d_model, dtype=np.float32), rng.standard_normal((65, d_model), dtype=np.float32)
    bound = (d_model + 1) * 2.0**-24 * (np.abs(wte).astype(np.float64) @ np.abs(x))  # Higham 2002, section 3.1
    assert np.all(np.abs(gemv(kernel, x, wte, 65) - wte.astype(np.float64) @ x) <= bound)


@pytest.mark.parametrize("d_model", [33, 768])
def test_a_row_does_not_depend_on_the_others(rng, d_model):
    x, wte = rng.standard_normal(d_model, dtype=np.float32), rng.standard_normal((20, d_model), dtype=np.float32)
    alone = gemv(ch09.gemv_logits, x, wte[13:14], 1)
    wte[12] = np.nan
    everything = gemv(ch09.gemv_logits, x, wte, 20)
    assert everything[13] == alone[0] and np.isnan(everything[12]) and np.isfinite(everything).sum() == 19


@pytest.mark.parametrize("kernel", GEMV, ids=name_of)
@pytest.mark.parametrize("d_model", [33, 36])
def test_gemv_no_index_outside_the_arrays(rng, monkeypatch, kernel, d_model):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, wte = np.ones(d_model, np.float32), np.ones((9, d_model), np.float32)
    np.testing.assert_array_equal(gemv(kernel, x, wte, 9), np.full(9, d_model))


@pytest.mark.parametrize("launch", [ch09.gemv_v1_launch, ch09.gemv_logits_launch])
@pytest.mark.parametrize("n", [0, -3])
def test_gemv_launch_refuses_empty(launch, n):
    with pytest.raises(ValueError, match=f"= {n}: a launch needs at least 1"):
        launch(n)


def gemv_rows(x, rows, wte, vocab_size):
    """The first ``vocab_size`` rows of wte times some rows of x; 7 lies behind the result."""
    n = len(rows)
    logits = cuda.to_device(np.full((n + 1, vocab_size), 7, np.float32))
    inputs = map(cuda.to_device, (x, np.asarray(rows, np.int32), wte))
    ch09.gemv_rows[ch09.gemv_rows_launch(n, vocab_size)](*inputs, logits, n, vocab_size, x.shape[1])
    np.testing.assert_array_equal(logits.copy_to_host()[n:], 7)
    return logits.copy_to_host()[:n]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("d_model", [31, 132])
def test_several_vectors_are_exact_on_whole_numbers(rng, n, d_model):
    x = rng.integers(-8, 9, (50, d_model)).astype(np.float32)
    wte = rng.integers(-8, 9, (65, d_model)).astype(np.float32)
    rows = rng.permutation(50)[:n]
    np.testing.assert_array_equal(gemv_rows(x, rows, wte, 65), ch09.gemv_rows_reference(x, rows, wte))


@pytest.mark.parametrize("d_model", [33, 768])
def test_a_vector_does_not_depend_on_its_neighbours(rng, d_model):
    x, wte = rng.standard_normal((20, d_model), dtype=np.float32), rng.standard_normal((40, d_model), dtype=np.float32)
    x[3] = np.nan
    together = gemv_rows(x, range(20), wte, 40)
    assert np.isnan(together[3]).all() and np.isfinite(np.delete(together, 3, 0)).all()
    for row in (0, 4, 19):
        np.testing.assert_array_equal(gemv_rows(x, [row], wte, 40)[0], together[row])


def test_several_vectors_refuse():
    with pytest.raises(ValueError, match="0 vectors"):
        ch09.gemv_rows_launch(0, 5)
