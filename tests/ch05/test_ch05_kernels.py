"""Chapter 5: the multiply-add chains, all versions, against their NumPy reference; and the kernel to wait for."""

import json
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

from chapters.ch05_measuring import kernels as ch05

SIZES = [1, 3, 4, 31, 33, 127, 1025]
CHAINS = [ch05.fma_chain_v1_one, ch05.fma_chain_v2_four, ch05.fma_chain_v3_float4, ch05.fma_chain_v4_unrolled]
every_chain = pytest.mark.parametrize("kernel", CHAINS, ids=lambda kernel: kernel.py_func.__name__)


def run(kernel, x, a, b, steps, launch=None):
    """The kernel's result; NaN lies behind x, 7 behind the result, which must still be there."""
    n = x.size
    x = cuda.to_device(np.concatenate([x, np.full(40, np.nan, np.float32)]))
    out = cuda.to_device(np.full(n + 40, 7, np.float32))
    kernel[launch or ch05.fma_chain_launch(n)](x, out, np.float32(a), np.float32(b), steps, n)
    assert (out.copy_to_host()[n:] == 7).all()
    return out.copy_to_host()[:n]


@every_chain
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 25])
def test_whole_numbers_exactly(rng, kernel, n, steps):
    """y + 3 a step: exact, and one step more or less is seen."""
    x = rng.integers(-8, 9, n).astype(np.float32)
    np.testing.assert_array_equal(run(kernel, x, 1, 3, steps), x + 3 * steps)


@every_chain
@pytest.mark.parametrize("launch", [(1, 32), (3, 96), (60, 32)], ids=str)
def test_any_launch_is_right(rng, kernel, launch):
    x = rng.integers(-8, 9, 1025).astype(np.float32)
    np.testing.assert_array_equal(run(kernel, x, -1, 5, 9, launch), 5 - x)  # an odd number of turns of 5 - y


@every_chain
def test_rounding(rng, kernel):
    x = rng.standard_normal(127, dtype=np.float32)
    expected = ch05.fma_chain_reference(x, 0.75, 0.3, 40)
    # a step rounds twice (2^-24 of values below 4) and shrinks earlier errors to 3/4: 2 * 4 * 4 * 2^-24 in all
    np.testing.assert_allclose(run(kernel, x, 0.75, 0.3, 40), expected, rtol=0, atol=2e-6)


@every_chain
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_neighbours_are_not_touched(kernel, value):
    x = np.arange(11, dtype=np.float32)
    x[5] = value
    found = run(kernel, x, 1, 1, 9)
    np.testing.assert_array_equal(found, x + 9)


@every_chain
def test_in_place(rng, kernel):
    x = rng.integers(-8, 9, 133).astype(np.float32)
    device = cuda.to_device(x)
    kernel[ch05.fma_chain_launch(133)](device, device, np.float32(1), np.float32(2), 10, 133)
    np.testing.assert_array_equal(device.copy_to_host(), x + 20)


@every_chain
def test_no_index_outside_the_arrays(monkeypatch, kernel):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, out = cuda.to_device(np.arange(133, dtype=np.float32)), cuda.device_array(133, np.float32)
    for launch in (ch05.fma_chain_launch(133), (2, 32)):
        kernel[launch](x, out, np.float32(1), np.float32(1), 9, 133)
        np.testing.assert_array_equal(out.copy_to_host(), np.arange(133) + 9)


def test_the_plain_name_is_the_fastest_rung_of_the_committed_figures():
    figures = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h100" / "ch05.json"
    roofline = json.loads(figures.read_text(encoding="utf-8"))["ladders"][0]
    assert roofline["name"] == "roofline"
    peak = {row["name"]: row["values"][-1] for row in roofline["rows"]}
    assert ch05.fma_chain.__name__ == max(peak, key=peak.get)


def test_intensity():
    assert [ch05.fma_chain_intensity(steps) for steps in (0, 1, 4, 256)] == [0, 0.25, 1, 64]
    with pytest.raises(ValueError, match="steps = -1"):
        ch05.fma_chain_intensity(-1)


def test_launches():
    assert ch05.fma_chain_launch(1) == (1, 256)
    assert ch05.fma_chain_launch(4 * 256) == (1, 256)
    assert ch05.fma_chain_launch(4 * 256 + 1) == (2, 256)
    assert ch05.fma_chain_launch(1 << 30)[0] == 1 << 14
    assert ch05.fma_chain_few_launch(64, 132) == (132, 64)
    assert ch05.busy_launch() == (1, 32)


@pytest.mark.parametrize(
    "launch, needle",
    [
        (lambda: ch05.fma_chain_launch(0), "n = 0"),
        (lambda: ch05.fma_chain_launch(-4), "n = -4"),
        (lambda: ch05.fma_chain_launch(9, 2048), "threads = 2048"),
        (lambda: ch05.fma_chain_few_launch(0, 1), "threads = 0"),
        (lambda: ch05.fma_chain_few_launch(1025, 1), "threads = 1025"),
        (lambda: ch05.fma_chain_few_launch(32, 0), "blocks = 0"),
        (lambda: ch05.busy_launch(-1), "blocks = -1"),
    ],
)
def test_a_launch_refuses(launch, needle):
    with pytest.raises(ValueError, match=needle):
        launch()


@pytest.mark.parametrize("rounds", [0, 1, 2, 1000])
@pytest.mark.parametrize("launch", [ch05.busy_launch(), ch05.busy_launch(3, 64)], ids=str)
def test_busy_kernel(rounds, launch):
    out = cuda.to_device(np.zeros(1, np.uint32))
    ch05.busy_kernel[launch](out, rounds)
    assert out.copy_to_host()[0] == ch05.busy_reference(rounds)


def test_busy_reference_is_marsaglias_generator():
    assert ch05.busy_reference(1) == 270369  # the first number of xorshift32 (13, 17, 5) from 1
