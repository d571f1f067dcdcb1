"""Chapter 4: the head layout against NumPy's transpose, and against the table of addresses in the chapter."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch04_memory import kernels as ch04

SHAPES = [(1, 1, 1), (1, 3, 5), (2, 1, 33), (7, 12, 64), (31, 3, 32), (33, 5, 31), (65, 2, 127)]


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
