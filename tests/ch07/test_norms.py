"""Chapter 7: layer norm and RMS norm, all versions, against their NumPy references and PyTorch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda

from chapters.ch07_warp_reduce import norms as ch07
from chapters.ch07_warp_reduce import rmsnorm as rms

SIZES = [1, 31, 33, 127, 4096]
ROWS = [1, 7]
LAYERNORMS = [
    ch07.layernorm_v1_two_pass,
    ch07.layernorm_v2_one_pass,
    ch07.layernorm_v3_shared_row,
    ch07.layernorm_v4_registers,
]
RMSNORMS = [rms.rmsnorm_v1_two_reads, rms.rmsnorm_v2_shared_row, rms.rmsnorm_v3_registers]
ROUNDING = dict(rtol=1e-5, atol=3e-6)  # some tens of roundings of 2^-24 on values of order 1


def name_of(kernel):
    return kernel.py_func.__name__


every_layernorm = pytest.mark.parametrize("kernel", LAYERNORMS, ids=name_of)
every_rmsnorm = pytest.mark.parametrize("kernel", RMSNORMS, ids=name_of)


def with_nan(x):
    """x on the device with NaN behind it."""
    flat = cuda.to_device(np.concatenate([x.ravel(), np.full(40, np.nan, np.float32)]))
    return flat[: x.size].reshape(x.shape)


def run(kernel, launch, x, *parameters, eps):
    """The kernel's result; NaN lies behind the inputs, 7 behind the result, which must still be there."""
    buffer = cuda.to_device(np.full(x.size + 40, 7, np.float32))
    out = buffer[: x.size].reshape(x.shape)
    kernel[launch](with_nan(x), *map(with_nan, parameters), out, x.shape[1], eps)
    assert (buffer.copy_to_host()[x.size :] == 7).all()
    return out.copy_to_host()


def layernorm(kernel, x, weight, bias, eps=1e-5, launch=None):
    if kernel is ch07.layernorm_v4_registers:
        launch = ch07.registers_launch(*x.shape, "layernorm")
    return run(kernel, launch or ch07.layernorm_launch(*x.shape), x, weight, bias, eps=eps)


def rmsnorm(kernel, x, weight, eps=1e-5, launch=None):
    if kernel is rms.rmsnorm_v3_registers:
        launch = ch07.registers_launch(*x.shape, "rmsnorm")
    return run(kernel, launch or rms.rmsnorm_launch(*x.shape), x, weight, eps=eps)


# --- layer norm ------------------------------------------------------------------------------------------------------


@every_layernorm
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("d_model", SIZES)
def test_layernorm(rng, kernel, rows, d_model):
    x = rng.standard_normal((rows, d_model), dtype=np.float32) * 3 + 2
    weight, bias = rng.standard_normal((2, d_model), dtype=np.float32)
    expected = ch07.layernorm_reference(x, weight, bias, 1e-5)
    np.testing.assert_allclose(layernorm(kernel, x, weight, bias), expected, **ROUNDING)


@every_layernorm
def test_layernorm_in_blocks_of_three_warps(rng, kernel):
    x = rng.standard_normal((3, 4096), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 4096), dtype=np.float32)
    found = layernorm(kernel, x, weight, bias, launch=(3, 96))
    np.testing.assert_allclose(found, ch07.layernorm_reference(x, weight, bias, 1e-5), **ROUNDING)


@every_layernorm
def test_layernorm_with_a_mean_far_from_zero(rng, kernel):
    """mean(x²) - mean(x)² in float32 has no correct digit left here."""
    x = rng.standard_normal((7, 1025), dtype=np.float32) + 3000
    weight, bias = np.ones(1025, np.float32), np.zeros(1025, np.float32)
    expected = ch07.layernorm_reference(x, weight, bias, 1e-5)
    np.testing.assert_allclose(layernorm(kernel, x, weight, bias), expected, atol=2e-3)


@every_layernorm
def test_layernorm_of_a_constant_row_is_its_bias(kernel):
    bias = np.arange(33, dtype=np.float32)
    out = layernorm(kernel, np.full((2, 33), 0.5, np.float32), np.ones(33, np.float32), bias)
    np.testing.assert_array_equal(out, np.stack([bias, bias]))


@every_layernorm
def test_layernorm_eps_counts(kernel):
    x = np.array([[-1e-3, 1e-3]], np.float32)
    out = layernorm(kernel, x, np.ones(2, np.float32), np.zeros(2, np.float32), eps=1e-6)
    np.testing.assert_allclose(out, [[-(0.5**0.5), 0.5**0.5]], rtol=1e-5)


@every_layernorm
def test_layernorm_in_place(rng, kernel):
    x = rng.standard_normal((7, 127), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 127), dtype=np.float32)
    device_x = cuda.to_device(x)
    launch = ch07.layernorm_launch(7, 127)
    kernel[launch](device_x, cuda.to_device(weight), cuda.to_device(bias), device_x, 127, 1e-5)
    np.testing.assert_allclose(device_x.copy_to_host(), ch07.layernorm_reference(x, weight, bias, 1e-5), **ROUNDING)


@every_layernorm
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_layernorm_keeps_rows_apart(rng, kernel, value):
    x = rng.standard_normal((3, 133), dtype=np.float32)
    x[1, 107] = value
    out = layernorm(kernel, x, np.ones(133, np.float32), np.zeros(133, np.float32))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("kernel", LAYERNORMS[1:], ids=name_of)  # the first has no index that the third has not
def test_layernorm_has_no_index_outside_the_arrays(rng, monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, (weight, bias) = rng.standard_normal((3, 129), dtype=np.float32), rng.standard_normal((2, 129), dtype=np.float32)
    out = np.zeros_like(x)
    kernel[ch07.layernorm_launch(3, 129)](x, weight, bias, out, 129, 1e-5)
    np.testing.assert_allclose(out, ch07.layernorm_reference(x, weight, bias, 1e-5), **ROUNDING)


def test_layernorm_agrees_with_torch(torch, rng):
    x = rng.standard_normal((5, 1025), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 1025), dtype=np.float32)
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (1025,), torch.tensor(weight), torch.tensor(bias), 1e-5)
    np.testing.assert_allclose(layernorm(ch07.layernorm_row, x, weight, bias), expected.numpy(), **ROUNDING)


# --- merging moments -------------------------------------------------------------------------------------------------


@cuda.jit
def merge_kernel(a, b, out):
    count, mean, m2 = ch07.merge_moments(a[0], a[1], a[2], b[0], b[1], b[2])
    out[0] = count
    out[1] = mean
    out[2] = m2


def merge(a, b):
    out = cuda.device_array(3, np.float32)
    merge_kernel[1, 1](cuda.to_device(np.asarray(a, np.float32)), cuda.to_device(np.asarray(b, np.float32)), out)
    return out.copy_to_host()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-100, 100), max_size=9), st.lists(st.integers(-100, 100), max_size=9))
def test_merged_moments_are_those_of_the_union(first, second):
    def moments(values):
        values = np.array(values, np.float64)
        mean = values.mean() if len(values) else 0.0
        return np.array([len(values), mean, ((values - mean) ** 2).sum()])

    # distances are at most 200 and counts at most 18: a few roundings of 2^-24 on each
    np.testing.assert_allclose(merge(moments(first), moments(second)), moments(first + second), rtol=2e-6, atol=1e-4)


def test_merging_nothing_changes_nothing():
    some = [5, 1.25, 7.5]
    np.testing.assert_array_equal(merge(some, [0, 0, 0]), some)
    np.testing.assert_array_equal(merge([0, 0, 0], some), some)
    np.testing.assert_array_equal(merge([0, 0, 0], [0, 0, 0]), [0, 0, 0])


# --- RMS norm --------------------------------------------------------------------------------------------------------


@every_rmsnorm
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("d_model", SIZES)
def test_rmsnorm(rng, kernel, rows, d_model):
    x = rng.standard_normal((rows, d_model), dtype=np.float32) * 3 + 2
    weight = rng.standard_normal(d_model, dtype=np.float32)
    expected = rms.rmsnorm_reference(x, weight, 1e-5)
    np.testing.assert_allclose(rmsnorm(kernel, x, weight), expected, **ROUNDING)


@every_rmsnorm
def test_rmsnorm_in_blocks_of_three_warps(rng, kernel):
    x, weight = rng.standard_normal((3, 4096), dtype=np.float32), rng.standard_normal(4096, dtype=np.float32)
    found = rmsnorm(kernel, x, weight, launch=(3, 96))
    np.testing.assert_allclose(found, rms.rmsnorm_reference(x, weight, 1e-5), **ROUNDING)


@every_rmsnorm
def test_rmsnorm_takes_no_mean_off(kernel):
    x = np.full((2, 33), -4, np.float32)
    np.testing.assert_allclose(rmsnorm(kernel, x, np.full(33, 3, np.float32), eps=0.0), np.full((2, 33), -3), rtol=1e-6)


@every_rmsnorm
def test_rmsnorm_eps_counts(kernel):
    x = np.full((1, 5), 1e-3, np.float32)
    np.testing.assert_allclose(
        rmsnorm(kernel, x, np.ones(5, np.float32), eps=1e-6), np.full((1, 5), 0.5**0.5), rtol=1e-5
    )
    np.testing.assert_array_equal(rmsnorm(kernel, x * 0, np.ones(5, np.float32)), x * 0)


@every_rmsnorm
def test_rmsnorm_in_place_and_special_values(rng, kernel):
    x = rng.standard_normal((4, 133), dtype=np.float32)
    x[1, 107], x[2, 100], x[3, 5] = np.nan, -np.inf, 2e19
    device_x, ones = cuda.to_device(x), np.ones(133, np.float32)
    kernel[rms.rmsnorm_launch(4, 133)](device_x, cuda.to_device(ones), device_x, 133, 1e-5)
    found = device_x.copy_to_host()
    np.testing.assert_allclose(found[0], rms.rmsnorm_reference(x[:1], ones, 1e-5)[0], **ROUNDING)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[2], np.where(np.arange(133) == 100, np.float32(np.nan), np.float32(0)))
    np.testing.assert_array_equal(found[3], 0)


def test_rmsnorm_has_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    x, weight = rng.standard_normal((3, 129), dtype=np.float32), rng.standard_normal(129, dtype=np.float32)
    out = np.zeros_like(x)
    rms.rmsnorm_row[rms.rmsnorm_launch(3, 129)](x, weight, out, 129, 1e-5)
    np.testing.assert_allclose(out, rms.rmsnorm_reference(x, weight, 1e-5), **ROUNDING)


def test_rmsnorm_agrees_with_torch(torch, rng):
    x, weight = rng.standard_normal((5, 1025), dtype=np.float32), rng.standard_normal(1025, dtype=np.float32)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (1025,), torch.tensor(weight), 1e-5).numpy()
    np.testing.assert_allclose(rmsnorm(rms.rmsnorm_row, x, weight), expected, **ROUNDING)


# --- launch configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launch, name", [(ch07.layernorm_launch, "layernorm_row"), (rms.rmsnorm_launch, "rmsnorm_row")]
)
def test_launch_names_what_is_wrong(launch, name):
    with pytest.raises(ValueError, match=f"^{name}: rows = 0: a launch needs at least 1 row"):
        launch(0, 768)
    with pytest.raises(ValueError, match=f"^{name}: cols = 0: a launch needs at least 1 element"):
        launch(8, 0)
    with pytest.raises(ValueError, match=f"^{name}: d_model = 4097: .*at most 4096 floats; launch layernorm_v2"):
        launch(8, 4097)
    assert launch(8, 4096) == (8, 256) and launch(8, 768) == (8, 96)


def test_registers_launch_takes_longer_rows_and_names_what_is_wrong():
    assert [ch07.registers_launch(8, d, "top") for d in (1, 512, 513, 16384)] == [(8, 32), (8, 32), (8, 64), (8, 1024)]
    with pytest.raises(ValueError, match="^top: rows = 0: a launch needs at least 1 row"):
        ch07.registers_launch(0, 768, "top")
    for d_model in (0, 16385):
        with pytest.raises(ValueError, match=f"^top: d_model = {d_model}: 1024 threads hold 1 to 16384 floats"):
            ch07.registers_launch(8, d_model, "top")


def test_the_common_launch_has_registers_for_every_row():
    for d_model in range(1, ch07.ROW_MAX_FLOATS + 1):
        assert ch07.norm_launch(1, d_model, "top")[1] * ch07.EACH >= d_model
