"""Chapter 4: copies, layouts, and the head layout against the table of addresses in the chapter."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_1d
from chapters.ch04_memory import kernels as ch04

SIZES = [1, 3, 4, 31, 33, 127, 128, 1025]
SHAPES = [(1, 1, 1), (1, 3, 5), (2, 1, 33), (7, 12, 64), (31, 3, 32), (33, 5, 31), (65, 2, 127)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "kernel, launch",
    [(ch04.copy_v1_element, blocks_1d), (ch04.copy_v2_float4, ch04.copy_float4_launch)],
    ids=["v1", "v2"],
)
def test_copy(rng, kernel, launch, n):
    x = rng.standard_normal(n, dtype=np.float32)
    out = cuda.to_device(np.full(n + 40, 7, np.float32))
    kernel[launch(n)](cuda.to_device(x), out, n)
    np.testing.assert_array_equal(out.copy_to_host()[:n], x)
    np.testing.assert_array_equal(out.copy_to_host()[n:], 7)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 31, 33])
def test_copy_offset(rng, offset):
    x = rng.standard_normal(1025 + offset, dtype=np.float32)
    out = cuda.device_array(1025, np.float32)
    ch04.copy_offset[blocks_1d(1025)](cuda.to_device(x), out, 1025, offset)
    np.testing.assert_array_equal(out.copy_to_host(), x[offset:])


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("n", [1, 33, 1025])
def test_copy_strided(rng, n, stride):
    x = rng.standard_normal((n - 1) * stride + 1, dtype=np.float32)
    out = cuda.device_array(n, np.float32)
    ch04.copy_strided[blocks_1d(n)](cuda.to_device(x), out, n, stride)
    np.testing.assert_array_equal(out.copy_to_host(), x[::stride])


@pytest.mark.parametrize("n", SIZES)
def test_kinetic_energy_does_not_depend_on_the_layout(rng, n):
    particles = rng.standard_normal((n, len(ch04.PARTICLE)), dtype=np.float32)
    aos, soa = (cuda.to_device(np.full(n + 40, 7, np.float32)) for _ in range(2))
    ch04.kinetic_energy_aos[blocks_1d(n)](cuda.to_device(particles), aos, n)
    ch04.kinetic_energy_soa[blocks_1d(n)](cuda.to_device(np.ascontiguousarray(particles.T)), soa, n)
    np.testing.assert_array_equal(aos.copy_to_host(), soa.copy_to_host())
    np.testing.assert_array_equal(aos.copy_to_host()[n:], 7)
    np.testing.assert_allclose(aos.copy_to_host()[:n], ch04.kinetic_energy_reference(particles), rtol=1e-6)


def test_no_index_outside_the_arrays(monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, out = cuda.to_device(np.arange(33, dtype=np.float32)), cuda.device_array(33, np.float32)
    ch04.copy_v2_float4[ch04.copy_float4_launch(33)](x, out, 33)
    ch04.copy_strided[blocks_1d(11)](x, out, 11, 3)
    ch04.copy_offset[blocks_1d(31)](x, out, 31, 2)
    np.testing.assert_array_equal(out.copy_to_host()[:31], np.arange(2, 33))


@pytest.mark.parametrize("n", [0, -4])
def test_copy_launch_refuses_empty(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        ch04.copy_float4_launch(n)


def split(qkv, n_head, spare=0):
    """Runs the kernel on one host array; ``spare`` more tokens in the outputs' buffers, filled with 7."""
    n_tokens, width = qkv.shape
    d_model = width // 3
    size = d_model * n_tokens
    buffers = [cuda.to_device(np.full(size + spare * d_model, 7, np.float32)) for _ in range(3)]
    heads = [b[:size].reshape(n_head, n_tokens, d_model // n_head) for b in buffers]
    ch04.split_qkv[ch04.split_qkv_launch(n_tokens, d_model)](
        cuda.to_device(qkv), *heads, n_tokens, n_head, d_model // n_head
    )
    return [h.copy_to_host() for h in heads], [b.copy_to_host()[size:] for b in buffers]


@pytest.mark.parametrize("n_tokens, n_head, head_dim", SHAPES)
def test_split_qkv(rng, n_tokens, n_head, head_dim):
    qkv = rng.standard_normal((n_tokens, 3 * n_head * head_dim), dtype=np.float32)
    got, _ = split(qkv, n_head)
    np.testing.assert_array_equal(np.stack(got), ch04.split_qkv_reference(qkv, n_head))


def test_every_element_lies_at_the_address_of_the_table():
    n_tokens, n_head, head_dim = 3, 2, 5
    d_model = n_head * head_dim
    qkv = np.arange(n_tokens * 3 * d_model, dtype=np.float32).reshape(n_tokens, 3 * d_model)  # value = flat address
    got, _ = split(qkv, n_head)
    for third, array in enumerate(got):
        flat = array.ravel()
        for head, t, i in np.ndindex(n_head, n_tokens, head_dim):
            source = t * 3 * d_model + third * d_model + head * head_dim + i
            assert flat[head * n_tokens * head_dim + t * head_dim + i] == source


def test_threads_past_the_end_write_nothing(rng):
    qkv = rng.standard_normal((9, 3 * 35), dtype=np.float32)
    _, rest = split(qkv, 5, spare=4)
    for r in rest:
        np.testing.assert_array_equal(r, 7)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_launch_refuses_empty(shape):
    with pytest.raises(ValueError, match="at least 1"):
        ch04.split_qkv_launch(*shape)
