"""Chapter 4's transpose: every version against NumPy, on shapes that do not fit the tile."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch04_memory import transpose as ch04

ANY_SHAPE = [ch04.transpose_v1_naive, ch04.transpose_v2_tile, ch04.transpose_v3_padded, ch04.transpose_v4_unrolled]
SHAPES = [(1, 1), (1, 33), (31, 1), (32, 32), (33, 31), (127, 5), (64, 1025)]
MULTIPLES_OF_4 = [(4, 4), (4, 132), (64, 64), (68, 60), (128, 1028)]
TAIL = 40


def transpose(kernel, x):
    """x.T on the device; NaN lies behind x and 7 behind the result, and is checked to be there still."""
    rows, cols = x.shape
    nan, seven = np.full(TAIL, np.nan, np.float32), np.full(TAIL, 7, np.float32)
    device_x = cuda.to_device(np.concatenate([x.ravel(), nan]))[: x.size].reshape(rows, cols)
    buffer = cuda.to_device(np.concatenate([np.full(x.size, np.nan, np.float32), seven]))
    out = buffer[: x.size].reshape(cols, rows)
    wide = kernel is ch04.transpose_v5_float4
    launch = ch04.transpose_float4_launch if wide else ch04.transpose_launch
    kernel[launch(rows, cols)](device_x, out, rows, cols)
    np.testing.assert_array_equal(buffer.copy_to_host()[x.size :], 7)
    return out.copy_to_host()


@pytest.mark.parametrize("kernel", ANY_SHAPE, ids=lambda k: k.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(rng, kernel, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    np.testing.assert_array_equal(transpose(kernel, x), ch04.transpose_reference(x))


@pytest.mark.parametrize("shape", MULTIPLES_OF_4)
def test_transpose_by_fours(rng, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    np.testing.assert_array_equal(transpose(ch04.transpose_v5_float4, x), ch04.transpose_reference(x))


@pytest.mark.parametrize("kernel", [*ANY_SHAPE, ch04.transpose_v5_float4], ids=lambda k: k.__name__)
def test_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x = rng.standard_normal((36, 68) if kernel is ch04.transpose_v5_float4 else (33, 47), dtype=np.float32)
    np.testing.assert_array_equal(transpose(kernel, x), x.T)


@pytest.mark.parametrize(
    "shape, named", [((0, 5), "at least 1"), ((5, 0), "at least 1"), ((65535 * 32 + 1, 1), "65535")]
)
def test_launch_refuses(shape, named):
    with pytest.raises(ValueError, match=named):
        ch04.transpose_launch(*shape)


@pytest.mark.parametrize("shape, named", [((6, 4), "rows = 6"), ((4, 0), "cols = 0"), ((65536 * 64, 4), "65535")])
def test_launch_by_fours_refuses(shape, named):
    with pytest.raises(ValueError, match=named):
        ch04.transpose_float4_launch(*shape)
