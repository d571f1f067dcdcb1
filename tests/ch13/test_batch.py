"""Chapter 13: rows of several sequences get their embeddings."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch13_llm_ops import batch


@pytest.mark.parametrize("n_rows, d_model", [(1, 1), (33, 31), (7, 65)])
def test_each_row_has_its_own_token_and_position(rng, n_rows, d_model):
    tokens, positions = rng.integers(0, 50, n_rows).astype(np.int32), rng.integers(0, 40, n_rows).astype(np.int32)
    wte, wpe = (rng.standard_normal((n, d_model), dtype=np.float32) for n in (50, 40))
    out = cuda.to_device(np.full((n_rows + 1, d_model), 7, np.float32))
    inputs = map(cuda.to_device, (tokens, positions, wte, wpe))
    batch.embed_rows[blocks_2d(n_rows, d_model)](*inputs, out, n_rows, d_model)
    got = out.copy_to_host()
    np.testing.assert_array_equal(got[:-1], batch.embed_rows_reference(tokens, positions, wte, wpe))
    np.testing.assert_array_equal(got[-1], 7)
