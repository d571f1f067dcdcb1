"""Chapter 7: the device functions, the ladder of sums and the row kernels against their NumPy references."""

import numpy as np
import pytest
from numba import cuda, float32

from chapters.ch07_warp_reduce import kernels as ch07

SIZES = [1, 31, 33, 127, 1025]
ROWS = [1, 7]
BLOCKS = [32, 96, 1024]
SUMS = [ch07.sum_v1_shared_tree, ch07.sum_v2_warp_shuffle, ch07.sum_v3_warp_then_block]


def name_of(kernel):
    return kernel.py_func.__name__


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit
def reduce_four_ways(x, out):
    """out[0 … 3, i] = block_sum, block_max, warp_sum, warp_max of x, as thread i sees them; out[4]: a third use."""
    partial = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    out[0, i] = ch07.block_sum(x[i], partial)
    out[1, i] = ch07.block_max(x[i], partial)  # straight away on the same array
    out[2, i] = ch07.warp_sum(x[i])
    out[3, i] = ch07.warp_max(x[i])
    out[4, i] = ch07.block_sum(x[i] - out[1, i], partial)


@pytest.mark.parametrize("threads", BLOCKS)
def test_every_thread_gets_the_result(rng, threads):
    x = rng.standard_normal(threads, dtype=np.float32) - 10  # all negative: a zero that slips in would be the maximum
    device_out = cuda.to_device(np.zeros((5, threads), np.float32))
    reduce_four_ways[1, threads](cuda.to_device(x), device_out)
    out, warps = device_out.copy_to_host(), x.reshape(-1, 32)
    assert (out[0] == out[0, 0]).all() and (out[4] == out[4, 0]).all()
    np.testing.assert_allclose(out[0, 0], x.sum(dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(out[1], np.full(threads, x.max()))
    np.testing.assert_allclose(out[2], np.repeat(warps.sum(axis=1, dtype=np.float64), 32), rtol=1e-6)
    np.testing.assert_array_equal(out[3], np.repeat(warps.max(axis=1), 32))
    np.testing.assert_allclose(out[4, 0], (x - x.max()).sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("lane", [0, 5, 63])
def test_sum_keeps_nan_and_max_ignores_it(lane):
    x = np.ones(64, np.float32)
    x[lane] = np.nan
    device_out = cuda.to_device(np.zeros((5, 64), np.float32))
    reduce_four_ways[1, 64](cuda.to_device(x), device_out)
    out = device_out.copy_to_host()
    assert np.isnan(out[0]).all()
    assert (out[1] == 1).all() and (out[3] == 1).all()


def test_block_max_of_minus_infinity():
    device_out = cuda.to_device(np.zeros((5, 96), np.float32))
    reduce_four_ways[1, 96](cuda.to_device(np.full(96, -np.inf, np.float32)), device_out)
    assert (device_out.copy_to_host()[1] == -np.inf).all()


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
@pytest.mark.parametrize("n", [*SIZES, 8192, 100_003])
def test_sum(rng, kernel, n):
    x = rng.standard_normal(n, dtype=np.float32)
    out = cuda.to_device(np.zeros(1, np.float32))
    kernel[ch07.sum_launch(n)](cuda.to_device(x), out, n)
    tolerance = 1e-6 * np.abs(x).sum()  # cancellation: the error follows the terms, not the sum
    np.testing.assert_allclose(out.copy_to_host()[0], ch07.sum_reference(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
def test_sum_of_integers_is_exact_with_many_blocks(kernel):
    n = 300_000
    x = (np.arange(n) % 5).astype(np.float32)
    assert ch07.sum_launch(n)[0] > 30
    out = cuda.to_device(np.full(1, 3, np.float32))  # the kernels add to what is there
    kernel[ch07.sum_launch(n)](cuda.to_device(x), out, n)
    assert out.copy_to_host()[0] == 3 + x.sum(dtype=np.float64)


@pytest.mark.parametrize("kernel", SUMS, ids=name_of)
def test_sum_reads_nothing_past_n(kernel):
    x = np.ones(1000, np.float32)
    x[700:] = np.nan
    out = cuda.to_device(np.zeros(1, np.float32))
    kernel[ch07.sum_launch(700)](cuda.to_device(x), out, 700)
    assert out.copy_to_host()[0] == 700


# --- layer normalisation ---------------------------------------------------------------------------------------------


def layernorm(x, weight, bias, eps=1e-5):
    out = cuda.device_array(x.shape, np.float32)
    ch07.layernorm_row[ch07.layernorm_launch(len(x))](
        cuda.to_device(x), cuda.to_device(weight), cuda.to_device(bias), out, x.shape[1], eps
    )
    return out.copy_to_host()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("d_model", [*SIZES, 768])
def test_layernorm(rng, rows, d_model):
    x = rng.standard_normal((rows, d_model), dtype=np.float32) * 3 + 2
    weight, bias = rng.standard_normal((2, d_model), dtype=np.float32)
    expected = ch07.layernorm_reference(x, weight, bias, 1e-5)
    np.testing.assert_allclose(layernorm(x, weight, bias), expected, rtol=1e-5, atol=3e-6)


def test_layernorm_with_a_mean_far_from_zero(rng):
    """mean(x²) - mean(x)² in float32 has no correct digit left here."""
    x = rng.standard_normal((7, 1025), dtype=np.float32) + 3000
    weight, bias = np.ones(1025, np.float32), np.zeros(1025, np.float32)
    np.testing.assert_allclose(layernorm(x, weight, bias), ch07.layernorm_reference(x, weight, bias, 1e-5), atol=2e-3)


def test_layernorm_of_a_constant_row_is_its_bias():
    bias = np.arange(33, dtype=np.float32)
    out = layernorm(np.full((2, 33), 0.5, np.float32), np.ones(33, np.float32), bias)
    np.testing.assert_array_equal(out, np.stack([bias, bias]))


def test_layernorm_eps_counts():
    x = np.array([[-1e-3, 1e-3]], np.float32)
    out = layernorm(x, np.ones(2, np.float32), np.zeros(2, np.float32), eps=1e-6)
    np.testing.assert_allclose(out, [[-(0.5**0.5), 0.5**0.5]], rtol=1e-5)


def test_layernorm_in_place(rng):
    x = rng.standard_normal((7, 127), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 127), dtype=np.float32)
    device_x = cuda.to_device(x)
    ch07.layernorm_row[ch07.layernorm_launch(7)](
        device_x, cuda.to_device(weight), cuda.to_device(bias), device_x, 127, 1e-5
    )
    expected = ch07.layernorm_reference(x, weight, bias, 1e-5)
    np.testing.assert_allclose(device_x.copy_to_host(), expected, rtol=1e-5, atol=3e-6)


def test_layernorm_keeps_rows_apart(rng):
    x = rng.standard_normal((3, 33), dtype=np.float32)
    x[1, 7] = np.nan
    out = layernorm(x, np.ones(33, np.float32), np.zeros(33, np.float32))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()


# --- matrix times vector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 7, 129])
@pytest.mark.parametrize("d_model", [*SIZES, 768])
def test_gemv_logits(rng, vocab_size, d_model):
    x = rng.standard_normal(d_model, dtype=np.float32)
    wte = rng.standard_normal((vocab_size, d_model), dtype=np.float32)
    logits = cuda.device_array(vocab_size, np.float32)
    ch07.gemv_logits[ch07.gemv_logits_launch(vocab_size)](
        cuda.to_device(x), cuda.to_device(wte), logits, vocab_size, d_model
    )
    expected = ch07.gemv_logits_reference(x, wte)
    np.testing.assert_allclose(logits.copy_to_host(), expected, rtol=1e-5, atol=3e-6 * d_model**0.5)


def test_gemv_logits_writes_no_row_past_the_end(rng):
    wte = cuda.to_device(np.ones((16, 33), np.float32))
    logits = cuda.to_device(np.full(16, 7, np.float32))
    ch07.gemv_logits[ch07.gemv_logits_launch(13)](cuda.to_device(np.ones(33, np.float32)), wte, logits, 13, 33)
    np.testing.assert_array_equal(logits.copy_to_host(), [33] * 13 + [7] * 3)


# --- argmax ----------------------------------------------------------------------------------------------------------


def greedy_argmax(logits, launch=None):
    out = cuda.device_array(1, np.int32)
    ch07.greedy_argmax[launch or ch07.greedy_argmax_launch()](cuda.to_device(logits), out, len(logits))
    return int(out.copy_to_host()[0])


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
    logits[:40] = 0  # so that no answer is the first element by chance
    assert greedy_argmax(logits, (1, threads)) == int(np.argmax(logits))
    assert greedy_argmax(np.full(1025, 4, np.float32), (1, threads)) == 0


def test_greedy_argmax_of_infinities():
    assert greedy_argmax(np.full(127, -np.inf, np.float32)) == 0
    logits = np.zeros(127, np.float32)
    logits[[50, 90]] = np.inf
    assert greedy_argmax(logits) == 50


def test_greedy_argmax_ignores_nan():
    logits = np.arange(127, dtype=np.float32)
    logits[::2] = np.nan
    assert greedy_argmax(logits) == ch07.greedy_argmax_reference(logits) == 125
    only_infinity = np.full(127, np.nan, np.float32)
    only_infinity[77] = -np.inf
    assert greedy_argmax(only_infinity) == ch07.greedy_argmax_reference(only_infinity) == 77
    nothing = np.full(127, np.nan, np.float32)
    assert greedy_argmax(nothing) == ch07.greedy_argmax_reference(nothing) == -1


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", [ch07.sum_launch, ch07.layernorm_launch, ch07.gemv_logits_launch])
@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(launch, n):
    with pytest.raises(ValueError, match=f"= {n}: a launch needs at least 1"):
        launch(n)


@pytest.mark.parametrize("n, blocks", [(1, 1), (8192, 1), (8193, 2), (1 << 30, 1024)])
def test_sum_launch(n, blocks):
    assert ch07.sum_launch(n) == (blocks, 256)
