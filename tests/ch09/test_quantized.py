"""Chapter 9, weights of few bits: packing, and every rung against panels.py's with unpacked weights, bit by bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import cuda
from test_panels import on_device
from test_panels import product as float_product

from chapters.ch09_gemm import panels, quantized
from chapters.ch09_gemm.quantized import BLOCK_BYTES, GROUP

BITS = {
    quantized.quant_v1_bytes: 8, quantized.quant_v2_nibbles: 4, quantized.quant_v3_rows: 8, quantized.quant_v4_rows: 4,
}  # fmt: skip
SHAPES = [(1, 1, 32), (1, 33, 96), (3, 31, 64), (16, 64, 96), (17, 70, 128), (33, 65, 32)]  # M, N, K
every_rung = pytest.mark.parametrize("kernel", BITS, ids=lambda kernel: kernel.py_func.__name__)
every_size = pytest.mark.parametrize("bits", BLOCK_BYTES)


def packed(blocks, bits):
    """``(panels, steps, …)`` on the device, packed there, with other numbers behind each array."""
    N, n_groups, n_bytes = blocks.shape
    K = n_groups * GROUP
    whole, few = quantized.quantized_shapes(K, N, bits)
    arrays = [np.full(whole, 77, np.int8 if bits == 8 else np.int32)]
    arrays += [np.full(few, np.nan, np.float16) for _ in range(1 if bits == 8 else 2)]
    device = [on_device(array) if array.dtype == np.float16 else cuda.to_device(array) for array in arrays]
    kernel = quantized.pack_q8 if bits == 8 else quantized.pack_q4
    inputs = cuda.to_device(blocks), cuda.to_device(blocks.view(np.float16).reshape(N, n_groups, n_bytes // 2))
    kernel[quantized.pack_blocks_launch(K, N)](*inputs, *device, K, N)
    return device


def product(kernel, x, blocks, bias, before=None):
    """x @ W + bias on the device, W from blocks, on top of ``before`` if that is given."""
    (M, K), N = x.shape, len(blocks)
    rows = panels.ROWS if kernel in (quantized.quant_v3_rows, quantized.quant_v4_rows) else 1
    buffer = cuda.to_device(np.full(M * N + 40, 7, np.float32))
    y = buffer[: M * N].reshape(M, N)
    if before is not None:
        y.copy_to_device(before)
    weights = packed(blocks, BITS[kernel])
    kernel[panels.linear_launch(M, N, rows)](
        on_device(x), *weights, on_device(bias), y, M, N, K, int(before is not None)
    )
    np.testing.assert_array_equal(buffer.copy_to_host()[M * N :], 7)
    return y.copy_to_host()


def whole_blocks(rng, N, K, bits):
    """Blocks whose numbers are whole."""
    blocks = rng.integers(0, 256, (N, K // GROUP, BLOCK_BYTES[bits]), dtype=np.uint8)
    n_steps = 1 if bits == 8 else 2
    blocks[..., : 2 * n_steps] = rng.integers(-3, 4, (N, K // GROUP, n_steps)).astype(np.float16).view(np.uint8)
    return blocks


@every_size
@pytest.mark.parametrize("N, K", [(1, 32), (31, 96), (33, 320), (64, 32)])
def test_packing(rng, bits, N, K):
    blocks = whole_blocks(rng, N, K, bits)
    q, *steps = (array.copy_to_host() for array in packed(blocks, bits))
    step, least = steps if bits == 4 else (steps[0], np.zeros_like(steps[0]))
    if bits == 4:
        q = np.stack([q >> 4 * j & 15 for j in range(quantized.IN_WORD)], axis=2).reshape(len(q), K, panels.PANEL)
    numbers = q * np.repeat(step.astype(np.float32), GROUP, axis=1) + np.repeat(least.astype(np.float32), GROUP, axis=1)
    wanted = quantized.unpack_reference(blocks, bits)
    np.testing.assert_array_equal(numbers, panels.pack_reference(np.ascontiguousarray(wanted.T)))


@every_rung
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_it_is_exact_on_whole_numbers(rng, kernel, M, N, K):
    x, bias, before = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((M, K), N, (M, N)))
    blocks = whole_blocks(rng, N, K, BITS[kernel])
    expected = panels.linear_reference(x, quantized.unpack_reference(blocks, BITS[kernel]).T, bias)
    np.testing.assert_array_equal(product(kernel, x, blocks, bias), expected)
    np.testing.assert_array_equal(product(kernel, x, blocks, bias, before), before + expected)


@every_rung
def test_bits_are_those_of_unpacked_weights_and_of_a_row_alone(rng, kernel):
    x, bias = rng.standard_normal((37, 192), dtype=np.float32), rng.standard_normal(70, dtype=np.float32)
    blocks = quantized.quantize_reference(rng.standard_normal((70, 192), dtype=np.float32), BITS[kernel])
    W = np.ascontiguousarray(quantized.unpack_reference(blocks, BITS[kernel]).T)
    expected = float_product(panels.linear_v2_panels, x, W, bias)
    np.testing.assert_array_equal(product(kernel, x, blocks, bias), expected)
    x[:20] = np.nan
    np.testing.assert_array_equal(product(kernel, x, blocks, bias)[20:], expected[20:])
    np.testing.assert_array_equal(product(kernel, x[20:21], blocks, bias), expected[20:21])


numbers = st.floats(-1000, 1000, width=32).map(lambda x: x if abs(x) > 1e-2 else 0.0)


@every_size
@given(rows=arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 96])), elements=numbers))
@settings(deadline=None, max_examples=200)
def test_a_weight_is_half_a_step_away_at_most(bits, rows):
    blocks = quantized.quantize_reference(rows, bits)
    assert blocks.shape == (len(rows), rows.shape[1] // GROUP, BLOCK_BYTES[bits])
    got = quantized.unpack_reference(blocks, bits)
    step = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(float).repeat(GROUP, 1).reshape(rows.shape)
    size = np.abs(rows.astype(np.float64)).reshape(len(rows), -1, GROUP).max(2).repeat(GROUP, 1)
    rounded = 2.0**-10 * size + 2.0**-24 * 32  # of the steps and least numbers to float16, the smallest among them
    assert np.all(np.abs(got - rows) <= step / 2 + 2 * rounded)


@pytest.mark.parametrize("K", [0, -32, 31, 33, 48])
def test_rows_of_no_whole_groups_are_refused(K):
    with pytest.raises(ValueError, match=f"K = {K}.*use float16"):
        quantized.quantized_shapes(K, 8, 4)
