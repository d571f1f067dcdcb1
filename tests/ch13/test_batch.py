"""Chapter 13: rows of several sequences get their embeddings."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch13_llm_ops import batch


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_rows, d_model", [(1, 1), (33, 31), (7, 65)])
def test_each_row_has_its_own_token_and_position(rng, n_rows, d_model, dtype):
    """Of the host, or chosen by the step before; -1, where there was nothing to choose, and padding read as 0."""
    tokens, positions, source, chosen = (rng.integers(low, 40, n_rows).astype(np.int32) for low in (0, -1, -40, -1))
    source = np.minimum(source, n_rows - 1)
    tokens[source >= 0] = -9
    wte, wpe = (rng.standard_normal((n, d_model)).astype(dtype) for n in (50, 40))
    out = cuda.to_device(np.full((n_rows + 1, d_model), 7, np.float32))
    inputs = map(cuda.to_device, (tokens, source, chosen, positions, wte, wpe))
    batch.embed_rows[blocks_2d(n_rows, d_model)](*inputs, out, n_rows, d_model)
    got = out.copy_to_host()
    expected = batch.embed_rows_reference(tokens, source, chosen, positions, wte, wpe)
    np.testing.assert_array_equal(got[:-1], expected)
    np.testing.assert_array_equal(got[-1], 7)


@pytest.mark.parametrize("n_rows, block_size", [(1, 4), (130, 16), (7, 256)])
def test_rows_find_their_places_in_a_new_table(rng, n_rows, block_size):
    positions, slots = rng.integers(-1, 5 * block_size, n_rows).astype(np.int32), np.full(n_rows, -1, np.int32)
    table = rng.integers(0, 90, (n_rows, 5)).astype(np.int32)
    device = cuda.to_device(np.append(slots, np.int32(7)))
    batch.place_rows[batch.place_rows_launch(n_rows)](
        device, cuda.to_device(table), cuda.to_device(positions), n_rows, block_size
    )
    expected = batch.place_rows_reference(slots, table, positions, block_size)
    np.testing.assert_array_equal(device.copy_to_host(), np.append(expected, 7))


@pytest.mark.parametrize("n_rows, d_model", [(1, 1), (9, 33)])
def test_some_rows_are_taken(rng, n_rows, d_model):
    x, rows = rng.standard_normal((40, d_model), dtype=np.float32), rng.integers(0, 40, n_rows).astype(np.int32)
    out = cuda.to_device(np.full((n_rows + 2, d_model), 7, np.float32))
    batch.take_rows[blocks_2d(n_rows, d_model)](cuda.to_device(x), cuda.to_device(rows), out, n_rows, d_model)
    np.testing.assert_array_equal(out.copy_to_host(), np.concatenate([x[rows], np.full((2, d_model), 7, np.float32)]))
