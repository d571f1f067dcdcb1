"""Chapter 3: every kernel against its NumPy reference, on sizes that do not fit the block."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing import kernels as ch03

SIZES = [1, 31, 33, 127, 256, 1025]
SHAPES = [(1, 1), (1, 33), (31, 1), (7, 127), (33, 1025), (129, 65)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "kernel, launch",
    [(ch03.vector_add_v1_one_each, ch03.blocks_1d), (ch03.vector_add_v2_grid_stride, ch03.blocks_grid_stride)],
    ids=["v1", "v2"],
)
def test_vector_add(rng, kernel, launch, n):
    x, y = rng.standard_normal((2, n), dtype=np.float32)
    out = cuda.to_device(np.full(n + 300, 7, np.float32))
    kernel[launch(n)](cuda.to_device(x), cuda.to_device(y), out, n)
    np.testing.assert_array_equal(out.copy_to_host()[:n], ch03.vector_add_reference(x, y))
    np.testing.assert_array_equal(out.copy_to_host()[n:], 7)


@pytest.mark.parametrize("grid, block", [(1, 1), (1, 32), (3, 64), (40, 256)])
def test_a_grid_stride_loop_is_right_for_any_grid(rng, grid, block):
    x, y = rng.standard_normal((2, 1025), dtype=np.float32)
    out = cuda.device_array(1025, np.float32)
    ch03.vector_add[grid, block](cuda.to_device(x), cuda.to_device(y), out, 1025)
    np.testing.assert_array_equal(out.copy_to_host(), x + y)


def test_blocks_grid_stride_stops_growing():
    sizes = (1, 257, 1 << 18, (1 << 18) + 1, 1 << 30)
    assert [ch03.blocks_grid_stride(n)[0] for n in sizes] == [1, 2, 1024, 1024, 1024]


@pytest.mark.parametrize("n", SIZES)
def test_saxpy(rng, n):
    x, y = rng.standard_normal((2, n), dtype=np.float32)
    a = np.float32(-1.7)
    device_y = cuda.to_device(y)
    ch03.saxpy[ch03.blocks_grid_stride(n)](a, cuda.to_device(x), device_y, n)
    bound = 2.0**-23 * (np.abs(a * x) + np.abs(y))  # one rounding where the GPU fuses, two where it does not
    assert np.all(np.abs(device_y.copy_to_host() - ch03.saxpy_reference(a, x, y)) <= bound)


@pytest.mark.parametrize("n_head, n_tokens, head_dim", [(1, 1, 1), (3, 33, 31), (12, 5, 64), (2, 127, 65)])
def test_scale_heads(rng, n_head, n_tokens, head_dim):
    x = rng.standard_normal((n_head, n_tokens, head_dim), dtype=np.float32)
    scale = rng.standard_normal(n_head, dtype=np.float32)
    out = cuda.device_array(x.shape, np.float32)
    ch03.scale_heads[ch03.blocks_3d(*x.shape)](cuda.to_device(x), cuda.to_device(scale), out, *x.shape)
    np.testing.assert_array_equal(out.copy_to_host(), ch03.scale_heads_reference(x, scale))


@pytest.mark.parametrize(
    "shape, named", [((0, 5, 5), "at least 1"), ((5, 0, 5), "at least 1"), ((65536, 1, 1), "65536")]
)
def test_blocks_3d_refuses(shape, named):
    with pytest.raises(ValueError, match=named):
        ch03.blocks_3d(*shape)


@pytest.mark.parametrize("n", SIZES)
def test_residual_add(rng, n):
    x, branch = rng.standard_normal((2, n), dtype=np.float32)
    out = cuda.device_array(n, np.float32)
    ch03.residual_add[ch03.blocks_1d(n)](cuda.to_device(x), cuda.to_device(branch), out, n)
    np.testing.assert_array_equal(out.copy_to_host(), ch03.residual_add_reference(x, branch))


def test_residual_add_in_place(rng):
    x, branch = rng.standard_normal((2, 1000), dtype=np.float32)
    device_x = cuda.to_device(x)
    ch03.residual_add[ch03.blocks_1d(1000)](device_x, cuda.to_device(branch), device_x, 1000)
    np.testing.assert_array_equal(device_x.copy_to_host(), x + branch)


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_add(rng, shape):
    x, bias = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape[1], dtype=np.float32)
    out = cuda.device_array(shape, np.float32)
    ch03.bias_add[ch03.blocks_2d(*shape)](cuda.to_device(x), cuda.to_device(bias), out, *shape)
    np.testing.assert_array_equal(out.copy_to_host(), ch03.bias_add_reference(x, bias))


@pytest.mark.parametrize("n_tokens, d_model", [(1, 1), (3, 33), (31, 127), (100, 1025)])
def test_embed(rng, n_tokens, d_model):
    vocab_size, n_ctx = 257, n_tokens + 2
    wte = rng.standard_normal((vocab_size, d_model), dtype=np.float32)
    wpe = rng.standard_normal((n_ctx, d_model), dtype=np.float32)
    tokens = rng.integers(0, vocab_size, n_tokens).astype(np.int32)
    tokens[0] = vocab_size - 1
    out = cuda.device_array((n_tokens, d_model), np.float32)
    ch03.embed[ch03.blocks_2d(n_tokens, d_model)](
        cuda.to_device(tokens), cuda.to_device(wte), cuda.to_device(wpe), out, n_tokens, d_model
    )
    np.testing.assert_array_equal(out.copy_to_host(), ch03.embed_reference(tokens, wte, wpe))


def test_threads_past_the_end_write_nothing(rng):
    out = cuda.to_device(np.full(300, 7, np.float32))
    x = cuda.to_device(np.ones(300, np.float32))
    ch03.residual_add[ch03.blocks_1d(299)](x, x, out, 299)
    assert out.copy_to_host()[299] == 7


@pytest.mark.parametrize("n", [0, -3])
def test_blocks_1d_refuses_empty(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        ch03.blocks_1d(n)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_blocks_2d_refuses_empty(shape):
    with pytest.raises(ValueError, match="at least 1"):
        ch03.blocks_2d(*shape)
