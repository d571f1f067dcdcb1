"""Chapter 13: GELU against its NumPy reference."""

import math

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import kernels as ch13

SIZES = [1, 31, 33, 127, 256, 1025]


def gelu(x):
    out = cuda.device_array(len(x), np.float32)
    ch13.gelu_kernel[ch13.gelu_launch(len(x))](cuda.to_device(x), out, len(x))
    return out.copy_to_host()


@pytest.mark.parametrize("n", SIZES)
def test_gelu(rng, n):
    x = rng.standard_normal(n, dtype=np.float32) * 3
    np.testing.assert_allclose(gelu(x), ch13.gelu_reference(x), rtol=1e-5, atol=1e-6)


def test_gelu_over_its_whole_range():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), ch13.gelu_reference(x), rtol=1e-5, atol=1e-6)


def test_gelu_is_the_tanh_form():
    """The two forms are furthest apart, by 4.7e-4, near x = ±2.7."""
    x = np.array([2.75, -2.75], np.float32)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (2.75, -2.75)]
    np.testing.assert_allclose(np.abs(gelu(x) - exact), 4.712e-4, atol=2e-6)


def test_gelu_far_out():
    x = np.array([0, -0.0, 30, -30, 1e13, -1e13, np.inf], np.float32)
    np.testing.assert_array_equal(gelu(x), np.array([0, 0, 30, 0, 1e13, 0, np.inf], np.float32))
    assert np.isnan(gelu(np.array([np.nan, -np.inf], np.float32))).all()


def test_gelu_in_place_and_no_further_than_n(rng):
    x = rng.standard_normal(300, dtype=np.float32)
    device_x = cuda.to_device(x)
    ch13.gelu_kernel[ch13.gelu_launch(299)](device_x, device_x, 299)
    result = device_x.copy_to_host()
    np.testing.assert_allclose(result[:299], ch13.gelu_reference(x[:299]), rtol=1e-5, atol=1e-6)
    assert result[299] == x[299]


@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        ch13.gelu_launch(n)
