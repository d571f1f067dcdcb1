"""Chapter 3: every kernel against its NumPy reference, on sizes that do not fit the block."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing import kernels as ch03

SIZES = [1, 31, 33, 127, 256, 1025]
SHAPES = [(1, 1), (1, 33), (31, 1), (7, 127), (33, 1025), (129, 65)]


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
