"""Chapter 13: the activations against their NumPy references and PyTorch."""

import math

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import kernels as ch13

SIZES = [1, 31, 33, 127, 256, 1025]
INF = np.inf
ACTIVATIONS = [
    (ch13.gelu_kernel, ch13.gelu_reference),
    (ch13.gelu_erf, ch13.gelu_erf_reference),
    (ch13.silu, ch13.silu_reference),
]
every_activation = pytest.mark.parametrize("kernel, reference", ACTIVATIONS, ids=lambda f: getattr(f, "__name__", "-"))


def activate(kernel, *inputs):
    """The kernel's result; NaN lies behind the inputs, and 7 behind the result, which must still be there."""
    n = len(inputs[0])
    out = cuda.to_device(np.full(n + 40, 7, np.float32))
    behind = np.full(40, np.nan, np.float32)
    kernel[ch13.activation_launch(n)](*[cuda.to_device(np.concatenate([x, behind])) for x in inputs], out, n)
    result = out.copy_to_host()
    assert (result[n:] == 7).all()
    return result[:n]


def gelu(x):
    return activate(ch13.gelu_kernel, x)


# --- functions of one array ------------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("n", SIZES)
def test_activation(rng, kernel, reference, n):
    x = rng.standard_normal(n, dtype=np.float32) * 3
    np.testing.assert_allclose(activate(kernel, x), reference(x), rtol=1e-5, atol=1e-6)


@every_activation
def test_activation_over_its_whole_range(kernel, reference):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    np.testing.assert_allclose(activate(kernel, x), reference(x), rtol=1e-5, atol=1e-6)


@every_activation
def test_activation_agrees_with_torch(torch, rng, kernel, reference):
    functional = torch.nn.functional
    theirs = {
        "gelu_kernel": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_erf": functional.gelu,
        "silu": functional.silu,
    }[kernel.__name__]
    x = rng.standard_normal(500, dtype=np.float32) * 4
    expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(activate(kernel, x), expected, rtol=1e-5, atol=1e-6)


@every_activation
def test_activation_has_no_index_outside_the_arrays(rng, monkeypatch, kernel, reference):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x = rng.standard_normal(257, dtype=np.float32)
    out = np.zeros_like(x)
    kernel[ch13.activation_launch(257)](x, out, 257)
    np.testing.assert_allclose(out, reference(x), rtol=1e-5, atol=1e-6)


def test_gelu_is_the_tanh_form():
    """The two forms are furthest apart, by 4.7e-4, near x = ±2.7."""
    x = np.array([2.75, -2.75], np.float32)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (2.75, -2.75)]
    np.testing.assert_allclose(np.abs(gelu(x) - exact), 4.712e-4, atol=2e-6)


@every_activation
def test_activation_far_out(kernel, reference):
    x = np.array([0, -0.0, 30, -30, 1e13, -1e13, INF], np.float32)
    expected = np.array([0, 0, 30, 0, 1e13, 0, INF], np.float32)
    np.testing.assert_allclose(activate(kernel, x), expected, rtol=1e-6, atol=1e-11)
    assert np.isnan(activate(kernel, np.array([np.nan, -INF], np.float32))).all()


def test_silu_keeps_its_digits_below_zero():
    """x / (1 + exp(-x)) subtracts nothing: right to some units in the last place until exp overflows at -88.7."""
    x = np.linspace(-87, -1, 400, dtype=np.float32)
    np.testing.assert_allclose(activate(ch13.silu, x), ch13.silu_reference(x), rtol=2e-5)


@every_activation
def test_activation_in_place(rng, kernel, reference):
    x = rng.standard_normal(300, dtype=np.float32)
    device_x = cuda.to_device(x)
    kernel[ch13.activation_launch(299)](device_x, device_x, 299)
    result = device_x.copy_to_host()
    np.testing.assert_allclose(result[:299], reference(x[:299]), rtol=1e-5, atol=1e-6)
    assert result[299] == x[299]


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_multiply(rng, n):
    x, y = rng.standard_normal((2, n), dtype=np.float32)
    np.testing.assert_array_equal(activate(ch13.multiply, x, y), x * y)
    np.testing.assert_array_equal(ch13.multiply_reference(x, y), x * y)


def test_silu_then_multiply_is_swiglu(rng):
    gate, up = rng.standard_normal((2, 1025), dtype=np.float32) * 3
    device_gate, device_up = cuda.to_device(gate), cuda.to_device(up)
    out = cuda.device_array(1025, np.float32)
    ch13.silu[ch13.activation_launch(1025)](device_gate, out, 1025)
    ch13.multiply[ch13.activation_launch(1025)](out, device_up, out, 1025)
    np.testing.assert_allclose(out.copy_to_host(), activate(ch13.swiglu, gate, up), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_swiglu(rng, n):
    gate, up = rng.standard_normal((2, n), dtype=np.float32) * 3
    expected = ch13.silu_reference(gate).astype(np.float64) * up
    np.testing.assert_allclose(activate(ch13.swiglu, gate, up), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ch13.swiglu_reference(gate, up), expected, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_swiglu_in_place(rng, place):
    inputs = rng.standard_normal((2, 129), dtype=np.float32)
    gate_up = [cuda.to_device(x) for x in inputs]
    ch13.swiglu[ch13.activation_launch(129)](*gate_up, gate_up[place], 129)
    np.testing.assert_allclose(gate_up[place].copy_to_host(), ch13.swiglu_reference(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("d_ff", [1, 31, 33, 127])
def test_swiglu_fused(rng, rows, d_ff):
    gate_up = rng.standard_normal((rows, 2 * d_ff), dtype=np.float32) * 3
    buffer = cuda.to_device(np.full(rows * d_ff + 40, 7, np.float32))
    behind = np.full((1, 2 * d_ff), np.nan, np.float32)
    device_gate_up = cuda.to_device(np.concatenate([gate_up, behind]))[:rows]
    out = buffer[: rows * d_ff].reshape(rows, d_ff)
    ch13.swiglu_fused[ch13.swiglu_fused_launch(rows, d_ff)](device_gate_up, out, rows, d_ff)
    assert (buffer.copy_to_host()[rows * d_ff :] == 7).all()
    expected = ch13.swiglu_reference(gate_up[:, :d_ff], gate_up[:, d_ff:])
    np.testing.assert_allclose(out.copy_to_host(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ch13.swiglu_fused_reference(gate_up), expected)


def test_swiglu_fused_has_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    gate_up, out = rng.standard_normal((9, 66), dtype=np.float32), np.zeros((9, 33), np.float32)
    ch13.swiglu_fused[ch13.swiglu_fused_launch(9, 33)](gate_up, out, 9, 33)
    np.testing.assert_allclose(out, ch13.swiglu_fused_reference(gate_up), rtol=1e-5, atol=1e-6)


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -3])
def test_launch_refuses_empty(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        ch13.activation_launch(n)
    with pytest.raises(ValueError, match=f"5, {n}.* at least 1"):
        ch13.swiglu_fused_launch(5, n)
